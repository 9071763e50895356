"""What the hub must not forget when its process is killed: a small database, written before anybody is answered.

It has what exists nowhere else: the secret of the federation, which sites and clients there are, and coordination
state. Blocks, keys and results are not in it: clients and sites know them, and tell a hub that starts anew.

Every write is committed when it returns. That outlives the process, however it ends; a machine that loses power may
lose the last moments.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgpack

from daskfed.data.spill import read, written
from daskfed.errors import ConfigurationError
from daskfed.hub.recovery import Awaited

FILE = "hub.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sites (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS clients (id TEXT PRIMARY KEY, owner TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS things (kind TEXT, name BLOB, value BLOB NOT NULL, PRIMARY KEY (kind, name));
"""


class Journal:
    """The hub's database in ``folder``, which is made if need be; in memory, and so of no use later, without one.

    Raises ConfigurationError where the folder cannot be used, or another hub uses it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.durable = folder is not None
        self._lock: int | None = None
        where = ":memory:" if folder is None else self._prepared(Path(folder))
        self._db = sqlite3.connect(where, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
        except sqlite3.DatabaseError as exc:
            self.close()
            raise ConfigurationError(f"the hub cannot keep its state in {where}: {exc}") from None
        self.secret = self._fact("secret") or secrets.token_urlsafe(32)
        self._set_fact("secret", self.secret)

    def _prepared(self, folder: Path) -> Path:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            os.lockf(self._lock, os.F_TLOCK, 0)
            os.close(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600))
        except BlockingIOError:
            problem = f"another hub keeps its state in {folder}: end it, or name another folder"
            raise ConfigurationError(problem) from None
        except OSError as exc:
            raise ConfigurationError(f"the hub cannot keep its state in {folder}: {exc}") from None
        return folder / FILE

    # -- facts -------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The latest epoch that a hub with this journal had."""
        return int(self._fact("epoch") or 0)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._set_fact("epoch", str(epoch))

    def _fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _set_fact(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # -- who is there ------------------------------------------------------------------------------------------------

    def awaited(self) -> Awaited:
        """Return the sites and clients that were there when the last hub ended."""
        sites = frozenset(name for (name,) in self._db.execute("SELECT name FROM sites"))
        clients = dict(self._db.execute("SELECT id, owner FROM clients").fetchall())
        return Awaited(sites, MappingProxyType(clients))

    def keep_site(self, name: str) -> None:
        """A site has joined."""
        self._db.execute("INSERT OR IGNORE INTO sites VALUES (?)", (name,))

    def forget_site(self, name: str) -> None:
        """A site is gone."""
        self._db.execute("DELETE FROM sites WHERE name = ?", (name,))

    def keep_client(self, client: str, owner: str) -> None:
        """A client has connected."""
        self._db.execute("INSERT OR REPLACE INTO clients VALUES (?, ?)", (client, owner))

    def forget_client(self, client: str) -> None:
        """A client is gone for good."""
        self._db.execute("DELETE FROM clients WHERE id = ?", (client,))

    # -- things ------------------------------------------------------------------------------------------------------

    def keep(self, kind: str, name: Any, value: Any = None) -> None:
        """Keep the present value of a thing, say of the queue ``name``; whatever msgpack writes, and unopened parts."""
        if self.durable:
            self._db.execute("INSERT OR REPLACE INTO things VALUES (?, ?, ?)", (kind, packed(name), written(value)))

    def forget(self, kind: str, name: Any) -> None:
        """Forget a thing."""
        if self.durable:
            self._db.execute("DELETE FROM things WHERE kind = ? AND name = ?", (kind, packed(name)))

    def things(self, kind: str) -> list[tuple[Any, Any]]:
        """Return (name, value) of all things of a kind, the one that was kept longest ago first."""
        rows = self._db.execute("SELECT name, value FROM things WHERE kind = ? ORDER BY rowid", (kind,)).fetchall()
        return [(unpacked(name), read(value)) for name, value in rows]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is kept and forgotten within this context is so all at once."""
        if not self.durable or self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the database; another hub may use it then."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def packed(name: Any) -> bytes:
    """Return a name as bytes; tuples come back as tuples."""
    return cast(bytes, msgpack.packb(name, use_bin_type=True))


def unpacked(name: bytes) -> Any:
    """Return the name that was packed."""
    return msgpack.unpackb(name, use_list=False, strict_map_key=False)
