"""distributed's scheduler extensions as a hub hosts them: what they hold is journalled before anybody is told.

Each class is one of distributed's own, with what changes its state overridden to write the change down, and a
``restore`` that reads it back when a hub starts anew. What a journal holds, by kind::

    variable           name -> record                        queue        name -> largest size, users
    event              name -> True                          queue-item   (name, number) -> record, first in first out
    semaphore          name -> most leases, timeout          queue-future (name, key) -> how often
    lease              (name, lease) -> None                 dataset      name -> data, keys
    multi-lock         user -> the locks that it holds       metadata     path -> value
    want               (holder, key) -> None                 reply        request -> records taken
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Container, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from dask.typing import no_default

from daskfed.comm.opaque import UnopenedEnum
from daskfed.dask_private import (
    EventExtension,
    MultiLockExtension,
    PublishExtension,
    QueueExtension,
    SemaphoreExtension,
    VariableExtension,
)
from daskfed.hub.journal import Journal
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.coordination import CoordinationHost, TaskView

REPLIES = 1000
"""So many of the latest requests can be repeated without being done twice."""

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""The request that is being served, where its sender may repeat it."""


class SchedulerView:
    """The hub, as distributed's extensions see a scheduler."""

    def __init__(self, host: CoordinationHost, journal: Journal) -> None:
        self.host = host
        self.journal = journal
        self.handlers: dict[str, Callable[..., Any]] = {}
        self.stream_handlers: dict[str, Callable[..., Any]] = {}
        self.periodic_callbacks = host.periodic_callbacks
        self.loop = host.loop
        self.plugins: dict[str, Any] = {}
        self.held: dict[str, set[Key]] = defaultdict(set)  # by clients that are not connected ones
        self._background: set[asyncio.Task[None]] = set()

    def restore(self) -> None:
        """Want what was wanted by those that are not clients."""
        for (holder, key), _ in self.journal.things("want"):
            self.held[holder].add(key)
        for holder, keys in self.held.items():
            self.host.client_desires_keys(keys=list(keys), client=holder)

    @property
    def clients(self) -> Container[str]:
        """The ids of the clients that are connected."""
        return self.host.clients

    @property
    def tasks(self) -> Mapping[Key, TaskView]:
        """Every key that the federation knows."""
        return self.host.tasks

    def client_desires_keys(self, keys: Collection[Key], client: str) -> None:
        """``client``, or whatever holds ``keys`` under that name, wants them."""
        if client not in self.host.clients:
            for key in keys:
                if key not in self.held[client]:
                    self.journal.keep("want", (client, key))
            self.held[client].update(keys)
        self.host.client_desires_keys(keys=list(keys), client=client)

    def client_releases_keys(self, keys: Collection[Key], client: str) -> None:
        """``client`` wants ``keys`` no more."""
        if client in self.held:
            self._let_go(client, self.held[client].intersection(keys))
        self.host.client_releases_keys(keys=list(keys), client=client)

    def _let_go(self, client: str, keys: Collection[Key]) -> None:
        for key in keys:
            self.journal.forget("want", (client, key))
        self.held[client].difference_update(keys)
        if not self.held[client]:
            del self.held[client]

    def remove_client(self, client: str) -> None:
        """Whatever held keys under this name is gone."""
        if keys := list(self.held.get(client, ())):
            self._let_go(client, keys)
            self.host.client_releases_keys(keys=keys, client=client)

    def send_all(self, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        """Send each client its messages."""
        self.host.send_all(client_msgs, worker_msgs)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the background until it is done or the hub closes."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """End what runs in the background."""
        for task in self._background:
            task.cancel()


class Variables(VariableExtension):
    """Variables; a future that one gives away is held for the taker until it confirms, or is gone."""

    def __init__(self, view: SchedulerView) -> None:
        self.unconfirmed: dict[str, set[tuple[Key, str, str]]] = defaultdict(set)  # client -> (key, name, token)
        self.journal = view.journal
        super().__init__(view)
        view.stream_handlers["variable_delete"] = self.delete_soon

    def restore(self) -> None:
        """Read the variables back."""
        self.variables.update(self.journal.things("variable"))

    async def set(self, name: Any = None, **kwargs: Any) -> None:
        """Set a variable; ``kwargs`` as for distributed's."""
        await super().set(name=name, **kwargs)
        self.journal.keep("variable", name, self.variables[name])

    async def delete(self, name: Any = None, client: str | None = None) -> None:
        """Delete a variable once all takers have confirmed."""
        await super().delete(name=name, client=client)
        self.journal.forget("variable", name)

    async def get(self, name: str, client: str = "", timeout: float | None = None) -> dict[str, Any]:
        """Return the record of a variable, once it is set; raises TimeoutError after ``timeout`` seconds."""
        record: dict[str, Any] = await super().get(name=name, client=client, timeout=timeout)
        if "token" in record:
            self.unconfirmed[client].add((record["value"], name, record["token"]))
        return record

    async def future_received_confirm(self, name: str, key: Key, token: str, client: str) -> None:
        """``client`` has its own hold on ``key`` now."""
        self.unconfirmed[client].discard((key, name, token))
        self.waiting[key, name].add(token)  # it may have been forgotten while the client was away
        await super().future_received_confirm(name=name, key=key, token=token, client=client)

    def delete_soon(self, name: str, client: str = "") -> None:
        """Delete a variable, without making the client's stream wait until all takers have confirmed."""
        self.scheduler.spawn(self.delete(name=name, client=client))

    def forget(self, client: str) -> None:
        """Wait no longer for ``client`` to confirm what it took."""
        for key, name, token in self.unconfirmed.pop(client, set()):
            self.waiting[key, name].discard(token)
            self.scheduler.spawn(self._notify(name))

    async def _notify(self, name: str) -> None:
        async with self.waiting_conditions[name]:
            self.waiting_conditions[name].notify_all()


class _Items(asyncio.Queue[dict[str, Any]]):
    """The items of one queue; what goes in and comes out is written down in the same step.

    An item leaves for a request: it and the request change together, so that neither is lost nor given out twice.
    """

    def __init__(self, name: Any, maxsize: int, queues: Queues) -> None:
        self._name = name
        self._queues = queues
        self._numbers: deque[int] = deque()
        self._last = 0
        super().__init__(maxsize)

    def restore(self, number: int, record: dict[str, Any]) -> None:
        """Put back an item that was there."""
        self._last = number
        self._numbers.append(number)
        super()._put(record)

    def _put(self, item: dict[str, Any]) -> None:
        self._last += 1
        with self._queues.journal.together():
            self._queues.journal.keep("queue-item", (self._name, self._last), item)
            self._queues.replies.add(None)
        self._numbers.append(self._last)
        super()._put(item)

    def _get(self) -> dict[str, Any]:
        item: dict[str, Any] = super()._get()
        with self._queues.journal.together():
            self._queues.journal.forget("queue-item", (self._name, self._numbers.popleft()))
            self._queues.replies.add(item)
        return item

    def clear(self) -> None:
        """Forget all items."""
        for number in self._numbers:
            self._queues.journal.forget("queue-item", (self._name, number))


class Replies:
    """What was done for the latest requests that can be repeated: the records that they took, if any."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.records: OrderedDict[str, list[Any]] = OrderedDict()

    def restore(self) -> None:
        """Read them back."""
        self.records.update(self.journal.things("reply"))

    def add(self, record: Any) -> None:
        """The present request has put something, or taken ``record``."""
        if (request := request_id.get()) is None:
            return
        records = self.records.setdefault(request, [])
        if record is not None:
            records.append(record)
        self.journal.keep("reply", request, records)
        while len(self.records) > REPLIES:
            self.journal.forget("reply", self.records.popitem(last=False)[0])

    def earlier(self) -> list[Any] | None:
        """Return what the present request took when it came first; None where it was not done before."""
        found = self.records.get(request_id.get() or "")
        return None if found is None else list(found)


class Queues(QueueExtension):
    """Queues; an item that is taken is taken once, also where the request is repeated."""

    def __init__(self, view: SchedulerView, replies: Replies) -> None:
        self.journal = view.journal
        self.replies = replies
        super().__init__(view)

    def restore(self) -> None:
        """Read the queues and their items back."""
        for name, (maxsize, users) in self.journal.things("queue"):
            self.queues[name] = _Items(name, maxsize, self)
            self.client_refcount[name] = users
        for (name, number), record in self.journal.things("queue-item"):
            if name in self.queues:
                self.queues[name].restore(number, record)
        self.future_refcount.update(self.journal.things("queue-future"))

    def create(self, name: Any = None, client: str | None = None, maxsize: int = 0) -> None:
        """Make a queue, or count one more user of it."""
        if name not in self.queues:
            self.queues[name] = _Items(name, maxsize, self)
            self.client_refcount[name] = 0
        self.client_refcount[name] += 1
        self.journal.keep("queue", name, (self.queues[name].maxsize, self.client_refcount[name]))

    def release(self, name: Any = None, client: str | None = None) -> None:
        """Count one user of a queue less; with the last it ends."""
        items = self.queues.get(name)
        super().release(name=name, client=client)
        if name in self.queues:
            self.journal.keep("queue", name, (items.maxsize, self.client_refcount[name]))
        elif items is not None:
            items.clear()
            self.journal.forget("queue", name)

    async def put(self, name: Any = None, key: Key | None = None, **kwargs: Any) -> None:
        """Put an item; ``kwargs`` as for distributed's."""
        if self.replies.earlier() is not None:
            return
        await super().put(name=name, key=key, **kwargs)
        if key is not None:
            self.journal.keep("queue-future", (name, key), self.future_refcount[name, key])

    def future_release(self, name: Any = None, key: Key | None = None, client: str | None = None) -> None:
        """``client`` has its own hold on a future that it took."""
        super().future_release(name=name, key=key, client=client)
        if left := self.future_refcount.get((name, key), 0):
            self.journal.keep("queue-future", (name, key), left)
        else:
            self.journal.forget("queue-future", (name, key))

    async def get(
        self, name: Any = None, client: str | None = None, timeout: float | None = None, batch: bool | int = False
    ) -> Any:
        """Take one item, or a list of up to ``batch``; what a request took before it was repeated comes first."""
        earlier = self.replies.earlier() or []
        if not batch:
            return self._told(earlier[0]) if earlier else await super().get(name=name, client=client, timeout=timeout)
        wanted = batch if batch is True else max(0, batch - len(earlier))
        more = await super().get(name=name, client=client, timeout=timeout, batch=wanted) if wanted else []
        return [self._told(record) for record in earlier] + more

    def _told(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record as its taker is told it: of a future also how it stands."""
        if record["type"] != "Future":
            return record
        task = self.scheduler.tasks.get(record["value"])
        told = {**record, "state": "lost" if task is None else task.state}
        if task is not None and task.state == "erred":
            told |= {"exception": task.exception_blame.exception, "traceback": task.exception_blame.traceback}
        return told


class Events(EventExtension):
    """Events."""

    def __init__(self, view: SchedulerView) -> None:
        self.journal = view.journal
        super().__init__(view)

    def restore(self) -> None:
        """Set again what was set."""
        for name, _ in self.journal.things("event"):
            super().event_set(name)

    def event_set(self, name: Any = None) -> None:
        """Set an event."""
        super().event_set(name)
        self.journal.keep("event", self._normalize_name(name))

    def event_clear(self, name: Any = None) -> None:
        """Clear an event."""
        super().event_clear(name)
        self.journal.forget("event", self._normalize_name(name))


class Semaphores(SemaphoreExtension):
    """Semaphores, and Locks, which are semaphores of one. A lease that was held when the hub ended is held still."""

    def __init__(self, view: SchedulerView) -> None:
        self.journal = view.journal
        super().__init__(view)

    def restore(self) -> None:
        """Read the leases back; the holder of each has its whole timeout again to say that it is still there."""
        for name, (most, timeout) in self.journal.things("semaphore"):
            self.max_leases[name], self.lease_timeouts[name] = most, timeout
        for (name, lease), _ in self.journal.things("lease"):
            self.leases[name][lease] = time.time()

    def create(self, name: Any, max_leases: int, lease_timeout: float) -> None:
        """Make a semaphore, if there is none of this name."""
        super().create(name, max_leases, lease_timeout)
        self.journal.keep("semaphore", name, (self.max_leases[name], self.lease_timeouts[name]))

    def refresh_leases(self, name: Any = None, lease_ids: Collection[str] = ()) -> None:
        """The holder of leases is still there."""
        unknown = [lease for lease in lease_ids if lease not in self.leases[name]]
        super().refresh_leases(name, lease_ids)
        for lease in unknown:
            self.journal.keep("lease", (name, lease))

    def _get_lease(self, name: Any, lease_id: str) -> bool:
        granted = bool(super()._get_lease(name, lease_id))
        if granted:
            self.journal.keep("lease", (name, lease_id))
        return granted

    def _release_value(self, name: Any, lease_id: str) -> None:
        super()._release_value(name, lease_id)
        self.journal.forget("lease", (name, lease_id))

    def close(self, name: Any = None) -> None:
        """End a semaphore with all its leases."""
        for lease in self.leases.get(name, ()):
            self.journal.forget("lease", (name, lease))
        super().close(name)
        self.journal.forget("semaphore", name)


class MultiLocks(MultiLockExtension):
    """Several locks taken as one."""

    def __init__(self, view: SchedulerView) -> None:
        self.journal = view.journal
        super().__init__(view)

    def restore(self) -> None:
        """Read back who holds which locks; those who waited ask again."""
        for user, locks in self.journal.things("multi-lock"):
            self.requests[user], self.requests_left[user] = set(locks), 0
            for lock in locks:
                self.locks[lock].insert(0, user)

    async def acquire(
        self, locks: Any = None, id: Any = None, timeout: float | None = None, num_locks: int | None = None
    ) -> bool:
        """Wait until ``num_locks`` of ``locks`` are held; says whether they are."""
        if self.requests_left.get(id) == 0:
            return True  # the request is repeated
        granted = bool(await super().acquire(locks=locks, id=id, timeout=timeout, num_locks=num_locks))
        if granted:
            self.journal.keep("multi-lock", id, [lock for lock in self.requests[id] if self.locks[lock][0] == id])
        return granted

    def release(self, id: Any = None) -> None:
        """Give back what is held, if anything is."""
        if id in self.requests:
            super().release(id)
            self.journal.forget("multi-lock", id)


class Datasets(PublishExtension):
    """Published datasets."""

    def __init__(self, view: SchedulerView) -> None:
        self.journal = view.journal
        self.returned: set[str] = set()  # clients whose streams broke since: what they sent on them may be lost
        super().__init__(view)

    def restore(self) -> None:
        """Read the datasets back."""
        self.datasets.update(self.journal.things("dataset"))

    async def put(self, names: Collection[Key], **kwargs: Any) -> None:
        """Publish datasets; ``kwargs`` as for distributed's."""
        try:
            await super().put(names=names, **kwargs)
        finally:
            for name in names:
                if name in self.datasets:
                    self.journal.keep("dataset", name, self.datasets[name])

    async def delete(self, names: Collection[Key], **kwargs: Any) -> None:
        """Unpublish datasets."""
        await super().delete(names=names, **kwargs)
        for name in names:
            self.journal.forget("dataset", name)

    async def _sync_batched_send(self, client: str, uid: bytes) -> None:
        if client not in self.returned:
            await super()._sync_batched_send(client, uid)


class Metadata:
    """A tree of values by path, as ``Client.set_metadata`` and ``get_metadata`` know it."""

    def __init__(self, view: SchedulerView) -> None:
        self.tree: dict[Any, Any] = {}
        self.journal = view.journal
        view.handlers.update({"get_metadata": self.get, "set_metadata": self.set})

    def restore(self) -> None:
        """Set all values again, in the order in which they were set."""
        for path, value in self.journal.things("metadata"):
            self._set(path, value)

    def set(self, keys: Collection[Any], value: Any = None) -> None:
        """Set the value at the path ``keys``; a value on the way that is no branch makes room for one."""
        self._set(keys, value)
        self.journal.keep("metadata", tuple(keys), value)

    def _set(self, keys: Collection[Any], value: Any) -> None:
        *path, last = keys
        branch = self.tree
        for key in path:
            if not isinstance(branch.get(key), dict):
                branch[key] = {}
            branch = branch[key]
        branch[last] = value

    def get(self, keys: Collection[Any], default: Any = no_default) -> Any:
        """Return the value at the path ``keys``, else ``default``; raises KeyError where there is no default either."""
        found: Any = self.tree
        try:
            for key in keys:
                found = found[key]
        except (KeyError, TypeError):  # nothing there, or a value that has no branches
            if _is_no_default(default):
                raise KeyError(key) from None
            return default
        return found


def _is_no_default(default: Any) -> bool:
    """Whether the user gave no default: an enum member says so, which arrives unopened over a socket."""
    return default is no_default or (isinstance(default, UnopenedEnum) and default.get("name") == no_default.name)
