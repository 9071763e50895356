"""What a worker does with imported values that refer to other things: futures, and actors at other sites.

Both are of little use as they come out of a pickle: a future is bound to no client, and an actor would be called at an
address that may belong to another worker here. :class:`Homing` is sent to workers by value, and needs only distributed.
"""

from __future__ import annotations

from typing import Any

from distributed import Future, WorkerPlugin, get_client
from distributed.actor import Actor, ProxyRPC

MOST_ITEMS = 1000  # containers with more are not searched for futures
DEPTH = 3  # of containers that are


class Homing(WorkerPlugin):
    """Gives a worker :func:`at_home`, which :func:`daskfed.data.fetch.open_import` calls with each imported value."""

    name = "daskfed-homing"
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Begin; called by the worker."""
        worker.daskfed_at_home = at_home


def at_home(value: Any) -> Any:
    """Return a value with its futures bound to the worker's client, or in place of an actor one that is called afar."""
    if isinstance(value, Actor):
        return ActorElsewhere(*value.__reduce__()[1])
    if found := futures_in(value):
        client: Any = get_client()
        for future in found:
            future.bind_client(client)
        client._send_to_scheduler({"op": "client-desires-keys", "keys": [future.key for future in found]})
    return value


def futures_in(value: Any, depth: int = DEPTH) -> list[Any]:
    """Return the futures in a value, or in small containers in it."""
    if isinstance(value, Future):
        return [value]
    if not isinstance(value, (list, tuple, set, dict)) or len(value) > MOST_ITEMS or depth == 0:
        return []
    items = value.values() if isinstance(value, dict) else value
    return [future for item in items for future in futures_in(item, depth - 1)]


class ActorElsewhere(Actor):
    """An actor at another site: this site's scheduler passes calls on, since its worker cannot be dialled."""

    @property
    def _worker_rpc(self) -> Any:
        return ProxyRPC(self._scheduler_rpc, self._address)

    def __reduce__(self) -> Any:
        return (ActorElsewhere, (self._cls, self._address, self.key))
