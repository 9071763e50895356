"""What a worker does with imported values: it takes small ones over at once, and mends those that refer to others.

A future is of little use as it comes out of a pickle, bound to no client, and so is an actor, which would be called at
an address that may belong to another worker here. :class:`Homing` is sent to workers by value, and needs only
distributed.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import Context
from functools import partial
from typing import Any

from distributed import Future, WorkerPlugin, get_client
from distributed.actor import Actor, ProxyRPC
from distributed.core import Status

from daskfed.dask_private import UpdateDataEvent
from daskfed.data.fetch import give_back, untie

INLINE = "daskfed-inline-import"  # annotation of a task whose value came with it, and is small
GIVE_BACK = "daskfed-give-back"  # what a scheduler tells a worker, with keys, for it to do so

REMEMBERED = 2000  # keys of small imports
# States in which a worker leaves a task as it is when it is told to run it once more.
KEPT = frozenset({"waiting", "ready", "constrained", "executing", "long-running", "memory"})

MOST_ITEMS = 1000  # containers with more are not searched for futures
DEPTH = 3  # of containers that are


class Homing(WorkerPlugin):
    """Gives a worker :func:`at_home`, which :func:`daskfed.data.fetch.open_import` calls with each imported value.

    It also has the worker take over small imports as they come, see :func:`land`, forget what a key was made from
    before, see :func:`forget_former_inputs`, and give back what it does not run.
    """

    name = "daskfed-homing"
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Begin; called by the worker."""
        worker.daskfed_at_home = at_home
        worker.daskfed_landed = {}
        worker.stream_handlers[GIVE_BACK] = partial(give_back, dask_worker=worker)
        worker.stream_handlers["compute-task"] = partial(take, worker, worker.stream_handlers["compute-task"])


def take(worker: Any, compute: Any, **message: Any) -> None:
    """Prepare a worker for a task that its scheduler gives it; then the task goes its way, to ``compute``."""
    forget_former_inputs(worker, message["key"], message["nbytes"])
    land(worker, **message)
    compute(**message)


def forget_former_inputs(worker: Any, key: Any, inputs: Collection[Any]) -> None:
    """Have a worker forget what it made a key from before, where the task of that name is made from ``inputs`` now.

    A worker that knows dependents of a key remembers what it made the key from. It would wait for that as well, and
    where it is to make some of it for another task, it would take that for something that another worker has.
    """
    task = worker.state.tasks.get(key)
    if task is None or task.state in KEPT:
        return
    if former := [each for each in task.dependencies if each.key not in inputs]:
        untie(task, former, worker)


def land(worker: Any, **message: Any) -> None:
    """Take the value of a small import over without a thread; of any other task nothing.

    A thread takes some milliseconds for a task, however short, and a shuffle over two sites has an import for each
    pair of partitions. Dask opens what comes from another worker on its event loop as well. A worker that is asked for
    what it has already says so: that is the scheduler's answer. What cannot be opened fails as a task does.

    A key that comes again takes the long way. Its scheduler may have given it out twice, and takes the first of two
    answers for one that is out of date: it gives the key out anew, and has the next answer before the worker has heard
    of that. In a thread the two become one.
    """
    if (message.get("annotations") or {}).get(INLINE) and _is_free(worker, message["key"]):
        try:
            value = Context().run(message["run_spec"])  # in which no worker is current, so it comes as it was pickled
            plain = not isinstance(value, Actor) and not futures_in(value)
        except Exception:
            plain = False
        if plain:
            _remember(worker.daskfed_landed, message["key"])
            worker.handle_stimulus(UpdateDataEvent(data={message["key"]: value}, stimulus_id=message["stimulus_id"]))


def _is_free(worker: Any, key: Any) -> bool:
    """Say whether the worker has room, and had nothing under the name that might be in the way."""
    task = worker.state.tasks.get(key)
    unknown = task is None or (task.state == "released" and not task.dependencies)
    return unknown and worker.status is Status.running and key not in worker.daskfed_landed


def _remember(landed: dict[Any, None], key: Any) -> None:
    if len(landed) >= REMEMBERED:
        del landed[next(iter(landed))]
    landed[key] = None


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
