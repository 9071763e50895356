"""What distributed's coordination extensions see of the hub: clients, tasks and who wants which key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daskfed.hub import events as ev
from daskfed.hub.keytable import KeyState
from daskfed.hub.states import KeyPhase
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

DASK_STATES = {
    KeyPhase.PENDING: "waiting",
    KeyPhase.HELD: "memory",
    KeyPhase.FAILED: "erred",
    KeyPhase.RETIRED: "released",
}


@dataclass(frozen=True, slots=True)
class Blame:
    """The error of a failed key, unopened."""

    exception: Any
    traceback: Any


@dataclass(frozen=True, slots=True)
class Task:
    """A key, in the words of Dask's scheduler."""

    hub: Hub
    key: KeyState

    @property
    def state(self) -> str:
        """``memory``, ``erred``, ``waiting`` or ``released``."""
        return DASK_STATES[self.key.phase]

    @property
    def exception_blame(self) -> Blame:
        """The error that the key failed with."""
        return Blame(**self.hub.stores.errors[self.key.key])


class Tasks(Mapping[Key, Task]):
    """Every key that the federation knows."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __getitem__(self, key: Key) -> Task:
        return Task(self.hub, self.hub.core.ledger.keys[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self.hub.core.ledger.keys)

    def __len__(self) -> int:
        return len(self.hub.core.ledger.keys)


class Hosting:
    """The part of a hub that coordination needs; the hub derives from it."""

    @property
    def clients(self: Any) -> Any:
        """The ids of the clients that are connected."""
        return self.sessions.sessions

    @property
    def tasks(self: Any) -> Tasks:
        """Every key that the federation knows."""
        return Tasks(self)

    def client_desires_keys(self: Any, keys: Collection[Key], client: str) -> None:
        """A client, which may be one that never connected, wants ``keys`` kept."""
        self.take(ev.KeysDesired(client, tuple(keys)))

    def client_releases_keys(self: Any, keys: Collection[Key], client: str) -> None:
        """A client wants ``keys`` no more."""
        self.take(ev.KeysReleased(client, tuple(keys)))

    def send_all(self: Any, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        """Send clients their messages; those that are gone are left out."""
        for client, messages in client_msgs.items():
            if (session := self.sessions.sessions.get(client)) is not None:
                for message in messages:
                    session.send(message)

    def owner_of(self: Any, client: str) -> str:
        """Return the owner for whom a connected client acts; of any other name, the hub's own user."""
        session = self.sessions.sessions.get(client)
        return str(self.owners.mine if session is None else session.owner)

    def owner_calling(self: Any) -> str:
        """Return for whom the call is that is being served."""
        return str(self.owners.calling())

    def owner_at(self: Any, site: str, key: Key | None) -> str | None:
        """Return the owner of a key, also of one that ended lately: events may come after the result was released.

        Without a key that is known, return the owner of all clients, where they have but one.
        """
        ledger = self.core.ledger
        if (state := ledger.keys.peek(key)) is not None:
            return str(state.owner)
        if key in ledger.former:
            return str(ledger.former[key])
        owners = {session.owner for session in self.sessions.sessions.values()}
        return owners.pop() if len(owners) == 1 else None

    def origin(self: Any, site: str, worker: str) -> Mapping[str, str]:
        """Return the address under which clients know a worker, and its site, where there may be several."""
        shown = self.fanout.shown(site, worker)
        return {"worker": worker} if shown == worker else {"worker": shown, "site": site}
