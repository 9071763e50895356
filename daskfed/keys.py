"""Key files: who I am, which hubs I trust, and whom my hub lets in.

All lie in one folder (``daskfed.keys`` in Dask's configuration, by default ``~/.config/daskfed/keys``)::

    id.secret id.public      of this user, as a client and for the sites that they start
    hub.secret hub.public    of a hub that this user runs
    authorized               whom that hub lets in: a line for each key, ``pub-… role+role owner [name=value …]``
    invitations/             what a site is told that joins with a token: a file for each (:mod:`daskfed.reach.tokens`)
    known-hubs               the public keys of hubs: a line for each, ``address pub-…``

Keys are those of CurveZMQ: 32 bytes on Curve25519, written in base64 without ``+`` and ``/``. Secret ones are readable
by their user alone; one that others can read is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import dask
import zmq
from zmq.utils import z85

from daskfed.config import hint_for
from daskfed.errors import KeyFileError
from daskfed.files import locked, write_whole

DEFAULT_FOLDER = "~/.config/daskfed/keys"
KEY_BYTES = 32
PUBLIC, SECRET = "pub-", "sec-"
NAME = re.compile(r"\w[\w.@+$\\-]*")  # as users are called, also those of a domain
MOST_KEYS = 1000  # of one owner


class Role(StrEnum):
    """What a key lets its holder do."""

    CLIENT = "client"  # submit work, and see what is their own
    SITE = "site"  # join as a site, which runs the work of its owner
    ADMIN = "admin"  # all of it, also for others
    JOIN = "join"  # have another key let in for a site, once: that of a token


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Both halves of a key."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> KeyPair:
        """Return a key that nobody else has."""
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))


@dataclass(frozen=True, slots=True)
class Authorized:
    """Somebody whom a hub lets in."""

    public: bytes
    roles: frozenset[Role]
    owner: str
    expires: datetime | None = None
    shared: frozenset[str] = frozenset()  # of a site: whose work it serves as well; "*" is everybody's
    site: str = ""  # of a token: the site that it is for

    def may(self, role: Role) -> bool:
        """Whether it is let in for what a role does."""
        return role in self.roles or Role.ADMIN in self.roles

    @property
    def serves(self) -> tuple[str, ...]:
        """Whose work a site with this key runs; empty: everybody's."""
        return () if "*" in self.shared else tuple(sorted({self.owner} | self.shared))

    def valid(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires

    def line(self) -> str:
        """Return how it is written down."""
        options = [f"expires={self.expires.isoformat(timespec='seconds')}"] if self.expires else []
        options += [f"shared={','.join(sorted(self.shared))}"] if self.shared else []
        options += [f"site={self.site}"] if self.site else []
        owner = owner_named(self.owner)  # else the line could not be read, and nobody new would be let in
        return " ".join((written(self.public), "+".join(sorted(self.roles)), owner, *options))

    @classmethod
    def read(cls, line: str) -> Authorized:
        """Return what a line says; raises KeyFileError."""
        words = line.split()
        if len(words) < 3:
            raise KeyFileError(f"{line!r} must be: key, roles, owner")
        return cls(parsed(words[0]), roles_named(words[1]), owner_named(words[2]), **_options(words[3:]))


class KeyFolder:
    """The key files of a user."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        given = path or dask.config.get("daskfed.keys", None) or DEFAULT_FOLDER
        self.path = Path(given).expanduser()

    # -- own keys ----------------------------------------------------------------------------------------------------

    def own(self, name: str) -> KeyPair | None:
        """Return the key ``id`` or ``hub``, None where there is none; raises KeyFileError where others may read it."""
        file = self.path / f"{name}.secret"
        try:
            mode, text = file.stat().st_mode, file.read_text()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise KeyFileError(f"cannot read {file}: {exc.strerror}") from exc
        if stat.S_IMODE(mode) & 0o077:
            raise KeyFileError(f"others may read {file}: if nobody has, do chmod 600 {file}, else make a new key")
        try:
            secret = parsed(text.strip(), SECRET)
        except KeyFileError as exc:
            raise KeyFileError(f"{file}: {exc}") from None
        return pair_of(secret)

    def has_hub_key(self) -> bool:
        """Say whether there is a key of a hub; raises KeyFileError where others may read it."""
        return self.own("hub") is not None

    def new(self, name: str) -> KeyPair:
        """Make the key ``id`` or ``hub``; raises KeyFileError where there is one already."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.path / f"{name}.secret"
        pair = KeyPair.new()
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise KeyFileError(f"there is {file} already: who trusts that key would know a new one no more") from None
        except OSError as exc:
            raise KeyFileError(f"cannot write {file}: {exc.strerror}") from exc
        with os.fdopen(descriptor, "w") as stream:
            stream.write(written(pair.secret, SECRET) + "\n")
        _write(self.path / f"{name}.public", [written(pair.public)])
        return pair

    def ensured(self, name: str) -> KeyPair:
        """Return the key ``id`` or ``hub``, which is made where there is none; raises KeyFileError."""
        with self._alone():
            return self.own(name) or self.new(name)

    # -- whom a hub lets in ------------------------------------------------------------------------------------------

    @property
    def authorized_file(self) -> Path:
        """Where it is written down."""
        return self.path / "authorized"

    def authorized(self) -> dict[bytes, Authorized]:
        """Return who is let in, by key; raises KeyFileError naming the line that is wrong."""
        found = {}
        for number, line in _lines(self.authorized_file):
            with _placed(self.authorized_file, number):
                entry = Authorized.read(line)
            found[entry.public] = entry
        return found

    def named_in_file(self) -> str:
        """Return the text that says who is let in, whatever is wrong with it."""
        try:
            return self.authorized_file.read_text(errors="replace")
        except OSError:
            return ""

    def authorize(self, entry: Authorized) -> None:
        """Let somebody in from now on; who was let in before with this key is now what ``entry`` says."""
        with self._alone():
            self._change({**self.authorized(), entry.public: entry}.values())

    def admit(self, entry: Authorized) -> None:
        """Let somebody in as well: who is let in already, for the same owner, may do more from now on, not less.

        Raises KeyFileError where the key is another owner's, has expired, or the owner has very many.
        """
        with self._alone():
            entries = self.authorized()
            former = entries.get(entry.public)
            if former is None and sum(each.owner == entry.owner for each in entries.values()) >= MOST_KEYS:
                raise KeyFileError(f"{entry.owner!r} has {MOST_KEYS} keys already: daskfed keys revoke takes some back")
            entry = _merged(former, entry)
            if entry != former:
                self._change({**entries, entry.public: entry}.values())

    def revoke(self, which: str) -> list[Authorized]:
        """Let a key, or all keys of an owner, in no more; return them. Raises KeyFileError where there is none."""
        with self._alone():
            entries = list(self.authorized().values())
            gone = [entry for entry in entries if which in (entry.owner, written(entry.public))]
            if not gone:
                raise KeyFileError(f"nobody is let in as {which!r}: daskfed keys list shows who is")
            self._change(entry for entry in entries if entry not in gone)
        return gone

    def enrol(self, token: bytes, public: bytes) -> Authorized:
        """Let in a key as that of the site which a token is for; the token is of no use from then on.

        Raises KeyFileError where the token was used, taken back, or has expired.
        """
        with self._alone():
            entries = self.authorized()
            used = entries.pop(token, None)
            if used is None or Role.JOIN not in used.roles or not used.valid(datetime.now(UTC)):
                raise KeyFileError("this token was used or taken back, or has expired: ask for a new one")
            entry = _merged(entries.get(public), Authorized(public, frozenset({Role.SITE}), used.owner))
            self._change({**entries, public: entry}.values())
        return used

    def share(self, which: str, whom: Iterable[str], shared: bool = True) -> list[Authorized]:
        """Have the sites of an owner, or the site with this key, serve others as well, or no more."""
        with self._alone():
            return self._share(which, frozenset(whom), shared)

    def _share(self, which: str, names: frozenset[str], shared: bool) -> list[Authorized]:
        entries = self.authorized()
        sites = [e for e in entries.values() if e.may(Role.SITE) and which in (e.owner, written(e.public))]
        if not sites:
            raise KeyFileError(f"no site is let in as {which!r}: daskfed keys list shows who is")
        changed = [replace(each, shared=each.shared | names if shared else each.shared - names) for each in sites]
        self._change({**entries, **{each.public: each for each in changed}}.values())
        return changed

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other commands from changing who is let in meanwhile: what one revokes another would write back."""
        with locked(self.path / "lock"):
            yield

    def _change(self, entries: Iterable[Authorized]) -> None:
        _write(self.authorized_file, [entry.line() for entry in entries])

    # -- which hubs this user trusts ---------------------------------------------------------------------------------

    @property
    def hubs_file(self) -> Path:
        """Where it is written down."""
        return self.path / "known-hubs"

    def hubs(self) -> dict[str, bytes]:
        """Return the keys of the hubs that this user trusts, by address without scheme."""
        found = {}
        for number, line in _lines(self.hubs_file):
            with _placed(self.hubs_file, number):
                address, _, key = line.partition(" ")
                found[address] = parsed(key.strip())
        return found

    def hub_at(self, address: str) -> bytes | None:
        """Return the key that the hub at an address must have; None where none is known."""
        return self.hubs().get(plain(address))

    def trust(self, address: str, public: bytes) -> None:
        """Trust the hub at an address if it has this key; raises KeyFileError where another one is known."""
        where, known = plain(address), self.hubs()
        if known.get(where, public) != public:
            raise KeyFileError(
                f"{self.hubs_file} has another key of {where}: if the hub has a new one, take the old line out first"
            )
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(self.hubs_file, [f"{each} {written(key)}" for each, key in {**known, where: public}.items()])


def _merged(former: Authorized | None, entry: Authorized) -> Authorized:
    """Return what a key is let in for from now on; raises KeyFileError where it is another's, or has expired."""
    if former is None:
        return entry
    if former.owner != entry.owner:
        raise KeyFileError(f"{written(entry.public)} is the key of {former.owner!r}, not of {entry.owner!r}")
    if not former.valid(datetime.now(UTC)):
        raise KeyFileError(f"{written(entry.public)} has expired: daskfed keys authorize lets it in again")
    return replace(former, roles=former.roles | entry.roles)


class GivenKeys(KeyFolder):
    """Keys for one hub, which is known by its key alone: through a tunnel its address says nothing.

    ``pair`` stands for the key ``id``; where it is not given, that is the user's own.
    """

    def __init__(self, hub: bytes, pair: KeyPair | None = None) -> None:
        super().__init__()
        self._hub, self._pair = hub, pair

    def own(self, name: str) -> KeyPair | None:
        """Return the key that was given, or the user's own."""
        return self._pair or super().own(name)

    def hub_at(self, address: str) -> bytes | None:
        """Return the key of the hub."""
        return self._hub


def pair_of(secret: bytes) -> KeyPair:
    """Return both halves of a key from its secret one."""
    return KeyPair(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


def plain(address: str) -> str:
    """Return an address without its scheme."""
    return address.rpartition("://")[2].rstrip("/")


def written(key: bytes, kind: str = PUBLIC) -> str:
    """Return a key as text."""
    return kind + base64.urlsafe_b64encode(key).decode().rstrip("=")


def parsed(text: str, kind: str = PUBLIC) -> bytes:
    """Return the key that a text is; raises KeyFileError, which does not repeat what may be a secret."""
    if kind == PUBLIC and text.startswith(SECRET):
        raise KeyFileError("this is a secret key, which must be given to nobody: the public one begins with pub-")
    with suppress(ValueError, binascii.Error):
        key = base64.b64decode(text.removeprefix(kind) + "=", altchars=b"-_", validate=True)
        if text.startswith(kind) and len(key) == KEY_BYTES:
            return key
    shown = repr(text) if kind == PUBLIC else "what is there"
    raise KeyFileError(f"{shown} is no key: it begins with {kind} and has 43 letters more")


def roles_named(text: str) -> frozenset[Role]:
    """Return roles by their names, joined with ``+``; raises KeyFileError."""
    known = [str(role) for role in Role]
    if wrong := [name for name in text.split("+") if name not in known]:
        raise KeyFileError(f"{wrong[0]!r} is no role: {hint_for(wrong[0], known, 'roles are')}")
    return frozenset(map(Role, text.split("+")))


def owner_named(text: str) -> str:
    """Return the name of an owner; raises KeyFileError where it cannot be one."""
    if not NAME.fullmatch(text):
        raise KeyFileError(f"{text!r} is no name of a user: letters, digits, and . _ - @ + $ \\ after the first")
    return text


def _options(words: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "expires":
            found[name] = moment(value)
        elif name == "shared":
            found[name] = frozenset(value.split(","))
        elif name == "site":
            found[name] = value
        else:
            raise KeyFileError(f"{word!r} is unknown: {hint_for(name, ['expires', 'shared', 'site'], 'there are')}")
    return found


def moment(text: str) -> datetime:
    """Return a time as it is written down, by default in UTC; raises KeyFileError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise KeyFileError(f"{text!r} is no time: it is written like 2027-01-31T12:00:00+00:00") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        mode, text = file.stat().st_mode, file.read_text()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as exc:
        raise KeyFileError(f"cannot read {file}: {exc}") from exc
    if stat.S_IMODE(mode) & 0o022:
        raise KeyFileError(f"others may change {file}: see that nobody has, and do chmod 600 {file}")
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield number, line


@contextmanager
def _placed(file: Path, number: int) -> Iterator[None]:
    try:
        yield
    except KeyFileError as exc:
        raise KeyFileError(f"{file}, line {number}: {exc}") from None


def _write(file: Path, lines: list[str]) -> None:
    """Write a file so that a reader finds the old one or the new one."""
    try:
        write_whole(file, "".join(f"{line}\n" for line in lines))
    except OSError as exc:
        raise KeyFileError(f"cannot write {file}: {exc.strerror}") from exc
