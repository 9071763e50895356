"""The memo store: values by token, kept between runs in a folder of this user. It knows nothing of clients.

A token says what was computed (:mod:`daskfed.data.content`), the value is bytes that nobody opens here. In the folder::

    memo.sqlite           entries (token -> digest of the value, name, when it was last used), and small values
    blobs/ab/ab12…        larger values, each in a file that is named by its SHA-256

Values are what somebody will unpickle, so the folder has to belong to the user, and nobody else may write to it. A
value is compared with its digest when it is read; one that is damaged or gone is a miss, and is forgotten. Many
processes may use one folder at a time: a file gets its name inside the transaction that writes its row, and loses it
inside the one that deletes it. Who is killed in between leaves a file without a row, which :meth:`Memo.sweep` clears
away, or a row without a file, which is a miss.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from toolz import partition_all

from daskfed.errors import ConfigurationError

FILE = "memo.sqlite"
BLOBS = "blobs"
INLINE = 8 * 2**10  # values up to so many bytes lie in the database
ENTRY_NBYTES = 256  # what an entry counts besides its value
ASKED = 500  # tokens that one query names
WAIT_S = 10.0  # for another process that writes
ABANDONED_S = 3600.0  # files without a row that are older belong to nobody
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS blobs (digest TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, data BLOB);
CREATE TABLE IF NOT EXISTS entries (
    token TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_digest ON entries (digest);
CREATE INDEX IF NOT EXISTS entries_used ON entries (used);
CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), nbytes INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS blob_in AFTER INSERT ON blobs BEGIN UPDATE total SET nbytes = nbytes + new.nbytes; END;
CREATE TRIGGER IF NOT EXISTS blob_out AFTER DELETE ON blobs BEGIN UPDATE total SET nbytes = nbytes - old.nbytes; END;
CREATE TRIGGER IF NOT EXISTS entry_in AFTER INSERT ON entries
    BEGIN UPDATE total SET nbytes = nbytes + {ENTRY_NBYTES}; END;
CREATE TRIGGER IF NOT EXISTS entry_out AFTER DELETE ON entries
    BEGIN UPDATE total SET nbytes = nbytes - {ENTRY_NBYTES}; END;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value to be kept."""

    token: str
    name: str  # what was computed, for people: :meth:`Memo.clear` takes what it begins with
    value: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What a store has."""

    entries: int
    nbytes: int  # of values, and something for each entry


class Memo:
    """The store in ``folder``, which is made if need be. May be used from several threads.

    ``size``: bytes that it may have; beyond, what was not used for longest goes. ``clock`` gives seconds.

    Raises ConfigurationError where the folder cannot be used, or others may write to it. All methods raise OSError and
    sqlite3.Error where the disk is full, say, or another process does not end its transaction.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int, clock: Callable[[], float] = time.time) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.size = size
        self._clock = clock
        self._prepare()
        try:
            self._reader, self._writer = self._connect(), self._connect()
        except sqlite3.OperationalError as exc:
            raise self._unusable(exc) from None
        except sqlite3.DatabaseError:  # what this file is, nobody knows any more
            self._set_aside()
            self._reader, self._writer = self._connect(), self._connect()
        self._reading, self._writing = threading.Lock(), threading.Lock()

    def _prepare(self) -> None:
        try:
            (self.folder / BLOBS).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(self.folder)
            (self.folder / BLOBS).mkdir(mode=0o700, exist_ok=True)
            check_private(self.folder / BLOBS)
            os.close(os.open(self.folder / FILE, os.O_RDWR | os.O_CREAT, 0o600))
            check_private(self.folder / FILE)
        except OSError as exc:
            raise self._unusable(exc) from None

    def _unusable(self, exc: Exception) -> ConfigurationError:
        hint = "name another folder in daskfed.cache.directory, or leave out cache=True"
        return ConfigurationError(f"results cannot be kept in {self.folder}: {exc}; {hint}")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.folder / FILE, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'entry_out'").fetchone() == (0,):
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        return db

    def _set_aside(self) -> None:
        """Begin anew where the database is none; what it was is kept, its values are cleared away by and by."""
        (self.folder / FILE).rename(self.folder / f"{FILE}.damaged-{int(self._clock())}")
        for ending in ("-wal", "-shm"):
            (self.folder / f"{FILE}{ending}").unlink(missing_ok=True)
        self._prepare()

    def close(self) -> None:
        """End the connections to the database."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, token: str) -> bytes | None:
        """Return the value of a token; None where there is none."""
        return next((value for _, value in self.found((token,))), None)

    def known(self, tokens: Collection[str]) -> set[str]:
        """Return those tokens that have a value, which was not read."""
        known: set[str] = set()
        for some in partition_all(ASKED, dict.fromkeys(tokens)):
            query = f"SELECT token FROM entries WHERE token IN ({','.join('?' * len(some))})"
            with self._reading:
                known.update(token for (token,) in self._reader.execute(query, some))
        return known

    def found(self, tokens: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield token and value of those tokens that have one, in any order; one value is in memory at a time."""
        for some in partition_all(ASKED, dict.fromkeys(tokens)):
            for token, digest, data in self._rows(some):
                value = self._read(digest) if data is None else bytes(data)
                if value is not None and hashlib.sha256(value).hexdigest() == digest:
                    yield token, value
                else:
                    self._forget_damaged(digest)

    def _rows(self, tokens: Collection[str]) -> list[tuple[str, str, bytes | None]]:
        places = ",".join("?" * len(tokens))
        query = f"SELECT token, digest, data FROM entries JOIN blobs USING (digest) WHERE token IN ({places})"
        with self._reading:
            return self._reader.execute(query, tuple(tokens)).fetchall()

    def _read(self, digest: str) -> bytes | None:
        try:
            return self._path(digest).read_bytes()
        except FileNotFoundError:  # evicted a moment ago, or damaged
            return None

    def _forget_damaged(self, digest: str) -> None:
        """Forget a value that is not what it was, unless somebody has written it anew meanwhile."""
        with self._transaction() as db:
            row = db.execute("SELECT data FROM blobs WHERE digest = ?", (digest,)).fetchone()
            if row is None:
                return
            value = self._read(digest) if row[0] is None else bytes(row[0])
            if value is None or hashlib.sha256(value).hexdigest() != digest:
                db.execute("DELETE FROM entries WHERE digest = ?", (digest,))
                self._delete_blobs(db, [digest])

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, entries: Iterable[Entry]) -> None:
        """Keep values; a token that has one keeps it. What was not used for longest goes, where there is no room."""
        named = [(each, hashlib.sha256(each.value).hexdigest()) for each in entries if len(each.value) <= self.size]
        files: dict[str, Path] = {}
        try:
            for entry, digest in named:
                if len(entry.value) > INLINE and digest not in files:
                    files[digest] = self._written(entry.value)
            with self._transaction() as db:
                for entry, digest in named:
                    self._insert(db, entry, digest, files)
                self._evict(db)
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)

    def _written(self, value: bytes) -> Path:
        """Write a value to a file that has no name yet."""
        path = self.folder / BLOBS / f"new-{uuid.uuid4().hex}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(value)
        return path

    def _insert(self, db: sqlite3.Connection, entry: Entry, digest: str, files: dict[str, Path]) -> None:
        now = self._clock()
        if db.execute("UPDATE entries SET used = ? WHERE token = ?", (now, entry.token)).rowcount:
            return
        if (new := files.pop(digest, None)) is not None:
            self._path(digest).parent.mkdir(mode=0o700, exist_ok=True)
            new.replace(self._path(digest))
        data = entry.value if len(entry.value) <= INLINE else None
        db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", (digest, len(entry.value), data))
        db.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (entry.token, entry.name, digest, now))

    def touch(self, tokens: Collection[str]) -> None:
        """Say that values were used."""
        now = self._clock()
        with self._transaction() as db:
            db.executemany("UPDATE entries SET used = ? WHERE token = ?", [(now, token) for token in tokens])

    def _evict(self, db: sqlite3.Connection) -> None:
        while self._total(db) > self.size:
            oldest = db.execute("SELECT token, digest FROM entries ORDER BY used, token LIMIT 1").fetchone()
            if oldest is None:
                return
            self._delete(db, [oldest])

    def _delete(self, db: sqlite3.Connection, rows: Collection[tuple[str, str]]) -> None:
        """Delete entries, given as token and digest, and the values that no other entry has."""
        db.executemany("DELETE FROM entries WHERE token = ?", [(token,) for token, _ in rows])
        self._delete_blobs(db, dict.fromkeys(digest for _, digest in rows))

    def _delete_blobs(self, db: sqlite3.Connection, digests: Iterable[str]) -> None:
        unused = "DELETE FROM blobs WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM entries WHERE digest = ?)"
        for digest in digests:
            if db.execute(unused, (digest, digest)).rowcount:
                self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / BLOBS / digest[:2] / digest

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the database to this thread of this process alone, to write to."""
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise

    # -- looking after -----------------------------------------------------------------------------------------------

    def contents(self, prefix: str | None = None) -> Contents:
        """Return how much there is, or of the entries whose names begin with ``prefix``."""
        with self._reading:
            if prefix is None:
                (entries,) = self._reader.execute("SELECT count(*) FROM entries").fetchone()
                return Contents(entries, self._total(self._reader))
            query = "SELECT nbytes FROM entries JOIN blobs USING (digest) WHERE substr(name, 1, ?) = ?"
            sizes = [nbytes for (nbytes,) in self._reader.execute(query, (len(prefix), prefix))]
        return Contents(len(sizes), sum(sizes) + ENTRY_NBYTES * len(sizes))

    def _total(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT nbytes FROM total").fetchone()[0])

    def clear(self, prefix: str | None = None) -> int:
        """Forget everything, or the entries whose names begin with ``prefix``; return how many there were."""
        start = prefix or ""
        with self._transaction() as db:
            query = "SELECT token, digest FROM entries WHERE substr(name, 1, ?) = ?"
            rows = db.execute(query, (len(start), start)).fetchall()
            self._delete(db, rows)
        return len(rows)

    def sweep(self) -> int:
        """Delete what processes that were killed have left behind; return how many files."""
        before = self._clock() - ABANDONED_S
        files = [path for path in (self.folder / BLOBS).rglob("*") if _is_old_file(path, before)]
        gone = 0
        for some in partition_all(ASKED, files):
            with self._transaction() as db:
                gone += sum(self._sweep_file(db, path, before) for path in some)
        return gone

    def _sweep_file(self, db: sqlite3.Connection, path: Path, before: float) -> bool:
        known = db.execute("SELECT 1 FROM blobs WHERE digest = ? AND data IS NULL", (path.name,)).fetchone()
        if known or not _is_old_file(path, before):
            return False
        path.unlink(missing_ok=True)
        return True

    def check(self) -> None:
        """Raise AssertionError where the database contradicts itself; for tests."""
        with self._transaction() as db:
            counted = "SELECT (SELECT coalesce(sum(nbytes), 0) FROM blobs) + ? * (SELECT count(*) FROM entries)"
            assert db.execute(counted, (ENTRY_NBYTES,)).fetchone() == (self._total(db),), "the total is wrong"
            orphans = "SELECT digest FROM blobs WHERE digest NOT IN (SELECT digest FROM entries)"
            assert not db.execute(orphans).fetchall(), "there are values that no entry has"
            lacking = "SELECT token FROM entries WHERE digest NOT IN (SELECT digest FROM blobs)"
            assert not db.execute(lacking).fetchall(), "there are entries without a value"
            assert self._total(db) <= self.size, "there is more than there may be"


def _is_old_file(path: Path, before: float) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_mtime < before


def check_private(path: Path) -> None:
    """Raise ConfigurationError where a folder or a file is not this user's, or others may write to it."""
    found = path.stat()
    if found.st_uid != os.getuid():
        raise ConfigurationError(
            f"{path} belongs to another user, who could have this one open what they like: "
            "name another folder in daskfed.cache.directory"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"others may write to {path}, and could have this user open what they like: chmod go-w {path}"
        )
