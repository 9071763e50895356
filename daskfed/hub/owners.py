"""What is whose: for whom a connection speaks, which keys it may name, and names that each owner has for itself.

A stream is one client's, which has one owner. A call says no more than what to do, so for whom it speaks is found out::

    with a session's secret    for that client, whatever ``client`` it names; daskfed's clients send it with each call
    without                    for the user at the other end (:mod:`.peers`), and for that user's stock clients only

Everybody may be the user whom this machine knows them to be. Who is the hub's own user, or comes from another machine
(which takes certificates), may also say whom they act for.

Keys belong to the owner of the block that makes them, or of the client that scattered them. What is shared by name
(Variables, Queues, Locks, datasets, metadata ...) is under the owner's name: the hub's own user has the plain names.
What tasks at a site share is their owner's, if all blocks there are of one owner; else nobody can tell.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
import hmac
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distributed.comm.core import Comm

from daskfed.hub.coordination import DESIRE
from daskfed.hub.credentials import SITES, is_admin
from daskfed.hub.peers import FOREIGN, own_user, user_at
from daskfed.hub.recovery import is_promise
from daskfed.messages import COORDINATION, SESSION, Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

MARK = "\x1f"  # between an owner and a name of theirs; no owner's name has it
SHARED = (*COORDINATION, "variable-", "queue-")  # ops on what is shared by name begin so
METADATA = ("get_metadata", "set_metadata")
RESERVED = ("variable-", "queue-", "published-", "announced-", "fire-and-forget", "finder-", "scatter-")
"""What holds keys and is no client is named so."""
OF_TASKS = (DESIRE, "proxy")  # what tasks do with keys that the hub knows, beside what is shared by name
UNCHECKED = frozenset((*SITES, "register-client"))
HELLO_S = 2.0  # how long a call waits for the hello of its client, which comes on another connection
POLL_S = 0.005
BRIEF = 80  # letters of something strange that an error shows


@dataclass(frozen=True, slots=True)
class Caller:
    """For whom a call speaks."""

    owner: str
    client: str | None = None  # id of the client; None where the call does not say, as with stock clients
    admin: bool = False  # its key lets it do what concerns everybody


current: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("current", default=None)
"""For whom the call speaks that is being served; None where the hub calls itself."""


class Owners:
    """The hub's knowledge of who may do what."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.mine = own_user()
        self._users: WeakKeyDictionary[Comm, str] = WeakKeyDictionary()
        self._at: dict[str, str] = {}  # site -> whose blocks it had last
        left = {str(entry["spec"]["owner"]) for _, entry in hub.journal.things("block")}
        self.seen = left.union(hub.journal.awaited().clients.values())  # owners whose keys there may be

    # -- who it is ---------------------------------------------------------------------------------------------------

    def user(self, comm: Comm) -> str:
        """Return the user at the other end of a connection."""
        if comm not in self._users:
            self._users[comm] = user_at(comm)
            self.seen.add(self._users[comm])
        return self._users[comm]

    def accepted(self, user: str, claimed: str) -> str:
        """Return for whom ``user``, who says that it is for ``claimed``, acts."""
        named = "".join(letter for letter in claimed if letter.isprintable()).removeprefix(FOREIGN)
        owner = named if named and (user in (self.mine, "root") or user.startswith(FOREIGN)) else user
        self.seen.add(owner)
        return owner

    async def caller(self, comm: Comm, secret: str | None, client: str | None) -> Caller:
        """Return for whom a call speaks; raises PermissionError where it names a client that is not its own."""
        deadline = time.monotonic() + HELLO_S
        while secret is not None and time.monotonic() < deadline:
            if (session := self._session_of(secret)) is not None:
                return Caller(session.owner, session.client, is_admin(comm))
            await asyncio.sleep(POLL_S)
        user = self.user(comm)
        named = self.hub.sessions.sessions.get(client or "")
        if client is not None and (named is None or named.secret or named.owner != user):
            raise PermissionError(f"this connection does not speak for client {client!r}")
        return Caller(user, client, is_admin(comm))

    def _session_of(self, secret: str) -> Any:
        sessions = self.hub.sessions.sessions.values()
        return next((each for each in sessions if each.secret and hmac.compare_digest(each.secret, secret)), None)

    def at(self, site: str) -> str:
        """Return the owner of the tasks at a site; raises PermissionError where there are several."""
        state = self.hub.core.sites.get(site)
        blocks = self.hub.core.ledger.blocks
        owners = {blocks[name].spec.owner for name in (state.blocks if state is not None else ())}
        if len(owners) > 1:
            raise PermissionError(
                f"site {site!r} runs work of {' and '.join(sorted(owners))}: the hub cannot tell whose task asks for "
                "a Lock, a Variable or the like; use it in the client, or run at a site of your own"
            )
        self._at.update(dict.fromkeys((site,) if owners else (), next(iter(owners), "")))
        return self._at.get(site, self.mine)

    def alone_at(self, site: str, owner: str) -> bool:
        """Say whether the tasks at a site are ``owner``'s, so that what they made there may be theirs only."""
        with suppress(PermissionError):
            return self.at(site) == owner
        return False

    def placed(self, site: str, owner: str) -> None:
        """A site gets a block of this owner."""
        self._at[site] = owner

    # -- calls -------------------------------------------------------------------------------------------------------

    def guard(self, handlers: MutableMapping[str, Callable[..., Any]]) -> None:
        """Have each of the handlers of clients' calls know for whom it is, and refuse what is another's."""
        for op, handler in list(handlers.items()):
            if op not in UNCHECKED:
                handlers[op] = self._guarded(op, handler)

    def _guarded(self, op: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        names_client = "client" in (parameters := inspect.signature(handler).parameters)
        with_comm = next(iter(parameters), None) == "comm"

        async def serve(comm: Comm, **kwargs: Any) -> Any:
            caller = await self.caller(comm, kwargs.pop(SESSION, None), kwargs.get("client"))
            current.set(caller)
            if names_client and caller.client is not None:
                kwargs["client"] = caller.client
            self.check(named_keys(op, kwargs), caller.owner)
            result = handler(*((comm,) if with_comm else ()), **self.under_owner(op, caller.owner, kwargs))
            return self._shown(op, caller.owner, await result if inspect.isawaitable(result) else result)

        serve.__name__ = getattr(handler, "__name__", op)
        return serve

    def _shown(self, op: str, owner: str, result: Any) -> Any:
        if op == "publish_list":
            names = (self._plain(owner, name) for name in result)
            return [name for name in names if name is not None]
        if op == "get_metadata" and isinstance(result, dict) and owner == self.mine:
            return {name: value for name, value in result.items() if not str(name).endswith(MARK)}
        return result

    # -- keys --------------------------------------------------------------------------------------------------------

    def foreign(self, keys: Iterable[Key], owner: str) -> list[Key]:
        """Return those of ``keys`` that exist, or are being made, and are another's; TypeError for what is no key."""
        known = self.hub.core.ledger.keys
        theirs, peek = [], known.peek
        for key in keys:  # of which there may be thousands
            if type(key) is str or is_key(key):
                state = peek(key)
                if state is not None and state.owner != owner and state.owner:
                    theirs.append(key)
        return [key for key in theirs if not is_promise(known[key])]

    def check(self, keys: Iterable[Key], owner: str) -> None:
        """Raise PermissionError where some of ``keys`` are another's."""
        if theirs := self.foreign(keys, owner):
            raise PermissionError(not_yours(theirs))

    def readable(self) -> list[Key]:
        """Return the keys of the present caller."""
        owner = self.calling()
        return [key for key, state in self.hub.core.ledger.keys.peeks() if state.owner in (owner, "")]

    def hidden(self) -> set[Key]:
        """Return the keys that are another's than the present caller's."""
        owner = self.calling()
        if self.seen <= {owner}:  # as mostly: nobody else was ever here
            return set()
        return {key for key, state in self.hub.core.ledger.keys.peeks() if state.owner not in (owner, "")}

    def calling(self) -> str:
        """Return for whom the call is that is being served; what the hub itself asks is for its own user."""
        caller = current.get()
        return self.mine if caller is None else caller.owner

    def rules(self) -> bool:
        """Say whether the present caller may do what concerns everybody: the hub's own user, root, an admin's key."""
        caller = current.get()
        return self.calling() in (self.mine, "root") or (caller is not None and caller.admin)

    def check_rules(self, what: str) -> None:
        """Raise PermissionError where the present caller may not do ``what``, which concerns everybody."""
        if not self.rules():
            raise PermissionError(f"{self.calling()!r} may not {what}: only {self.mine!r}, who runs the hub, may")

    # -- names -------------------------------------------------------------------------------------------------------

    def under_owner(self, op: str, owner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``kwargs`` of an op with the names of what is shared as the hub keeps them."""
        given = dict(kwargs)
        if owner == self.mine:
            return given
        put = functools.partial(self._named, owner)
        if op.startswith(SHARED):
            given |= {"name": put(given["name"])} if given.get("name") is not None else {}
            given |= {several: list(map(put, given[several])) for several in ("names", "locks") if several in given}
        elif op in METADATA:
            given["keys"] = [owner + MARK, *given["keys"]]
        return given

    def of_task(self, site: str, op: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``kwargs`` of an op that a task at ``site`` asks for, as :meth:`under_owner`.

        Raises PermissionError where it names another's keys.
        """
        by_name = {"name", "names", "locks"}.intersection(kwargs) and op.startswith(SHARED)
        if not by_name and op not in OF_TASKS:
            return dict(kwargs)
        self.check(named_keys(op, kwargs), owner := self.at(site))
        return self.under_owner(op, owner, kwargs)

    def _named(self, owner: str, name: Any) -> Any:
        return f"{owner}{MARK}{name}" if isinstance(name, str) else (owner + MARK, name)

    def _plain(self, owner: str, name: Any) -> Any:
        """Return the name that ``owner`` knows a thing by; None where it is another's."""
        whose, plain = self.mine, name
        if isinstance(name, str) and MARK in name:
            whose, _, plain = name.partition(MARK)
        elif isinstance(name, tuple) and len(name) == 2 and str(name[0]).endswith(MARK):
            whose, plain = name[0].removesuffix(MARK), name[1]
        return plain if whose == owner else None


def is_key(key: Any) -> bool:
    """Whether something that came over the wire is a key, as Dask means it; raises TypeError where it is none."""
    if isinstance(key, str | bytes | int | float) or (isinstance(key, tuple) and all(map(is_key, key))):
        return True
    if isinstance(key, Real):  # numpy's, within one process
        return True
    raise TypeError(
        f"{brief(key)} cannot be a key: it is a {type(key).__name__}; use a string, a number, bytes, or a tuple of such"
    )


def brief(something: Any) -> str:
    """Return what came over the wire in words, cut where it is long."""
    words = repr(something)
    return words if len(words) <= BRIEF else words[:BRIEF] + " ..."


def proof_of(secret: str) -> str:
    """Return what the hub keeps to know a client again that has shown it ``secret``."""
    return hashlib.sha256(secret.encode()).hexdigest() if secret else ""


def reserved(client: str) -> str | None:
    """Return why nobody may have ``client`` as its id; None where there is no reason."""
    if not client or "/" in client or client.startswith(RESERVED):
        return f"{client!r} cannot be the id of a client"
    return None


def named_keys(op: str, kwargs: Mapping[str, Any]) -> list[Key]:
    """Return the keys that a call names."""
    if op in METADATA:
        return []
    several = list(kwargs.get("keys") or ())
    if op == "publish_put":
        several = [key for keys in several for key in keys]
    one = [kwargs["key"]] if kwargs.get("key") is not None else []
    if op == "proxy" and isinstance(msg := kwargs.get("msg"), Mapping) and msg.get("actor") is not None:
        one = [msg["actor"]]
    data = kwargs.get("data")
    return several + one + (list(data) if op == "scatter" and isinstance(data, Mapping) else [])


def not_yours(keys: Collection[Key]) -> str:
    """Return in words that keys are another owner's."""
    first = ", ".join(repr(key) for key in list(keys)[:3]) + (" ..." if len(keys) > 3 else "")
    return f"{first}: not yours; another user of this hub made what has this name, so choose another key"
