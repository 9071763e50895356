"""Variables, Queues, Locks, Events, published datasets, topics and metadata of a whole federation, kept at the hub.

They are distributed's own scheduler extensions, attached to the hub: what they ask of a scheduler is little, and
:class:`_SchedulerView` has it. Values that users put into them are never opened: the hub's comms hand over what is not
plain as ``Serialized`` or ``Pickled`` (see :mod:`daskfed.comm.opaque`), the extensions keep it and give it back.

Who wants a key::

    client        what a connected client wants; it ends with the client
    variable-x    (queue-x, published-x) what coordination state holds; it ends when the state lets go of it
    site/client   what a task at a site got out of a Variable or Queue; it ends with the site, or when the site says so

The host is told of each through ``client_desires_keys`` and ``client_releases_keys``, and need not tell them apart.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Coroutine, Mapping
from typing import Any, Protocol

import dask
from dask.typing import no_default

from daskfed.comm.opaque import UnopenedEnum
from daskfed.dask_private import (
    Broker,
    EventExtension,
    MultiLockExtension,
    PublishExtension,
    QueueExtension,
    SemaphoreExtension,
    VariableExtension,
)
from daskfed.messages import Key

RELEASE = "client-releases-keys"
"""What a site sends when its tasks no longer want keys that they got here."""


class TaskBlame(Protocol):
    """The failed task that is to blame for the failure of a key."""

    exception: Any
    """Its exception, unopened."""
    traceback: Any
    """Its traceback, unopened, or None."""


class TaskView(Protocol):
    """How a key stands, in the words of Dask."""

    state: str
    """``memory``, ``erred``, ``waiting``, ``processing``, ``released`` ..."""
    exception_blame: Any
    """A :class:`TaskBlame` where the state is ``erred``."""


class CoordinationHost(Protocol):
    """What coordination needs of the hub, a ``distributed.core.Server`` whose comms open nothing."""

    handlers: dict[str, Callable[..., Any]]
    """RPC handlers by op; those of coordination are added."""
    stream_handlers: dict[str, Callable[..., Any]]
    """Handlers of what clients say on their streams, by op; called with the ``client`` whose stream it is."""
    periodic_callbacks: dict[str, Any]
    loop: Any
    """The tornado loop that it all runs on."""

    @property
    def clients(self) -> Container[str]:
        """The ids of the clients that are connected."""
        ...

    @property
    def tasks(self) -> Mapping[Key, TaskView]:
        """Every key that the federation knows."""
        ...

    def client_desires_keys(self, keys: Collection[Key], client: str) -> None:
        """``client``, which may be one that never connected, wants ``keys`` kept."""
        ...

    def client_releases_keys(self, keys: Collection[Key], client: str) -> None:
        """``client`` wants ``keys`` no more."""
        ...

    def send_all(self, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        """Send each client its messages on its stream; clients that are gone are left out."""
        ...


def attach(host: CoordinationHost) -> Coordination:
    """Make ``host`` serve all of coordination; call it once, on the event loop of the host."""
    return Coordination(host)


class Coordination:
    """All coordination state of a federation; :func:`attach` makes it.

    The host calls :meth:`client_gone`, :meth:`site_gone` and :meth:`close`, and passes on what a site's agent forwards
    with :meth:`serve_site`.
    """

    def __init__(self, host: CoordinationHost) -> None:
        self._view = _SchedulerView(host)
        self.variables = _Variables(self._view)
        self.queues = QueueExtension(self._view)
        self.events = EventExtension(self._view)
        self.semaphores = SemaphoreExtension(self._view)
        self.multi_locks = MultiLockExtension(self._view)
        self.datasets = PublishExtension(self._view)
        self.topics = _Topics(self._view)
        self.metadata = _Metadata(self._view)
        host.handlers.update(self._view.handlers)
        host.stream_handlers.update(self._view.stream_handlers)

    def log_event(self, topic: str | Collection[str], msg: Any) -> None:
        """Tell the subscribers of ``topic`` (or of several) about ``msg``, which msgpack must be able to write."""
        self.topics.broker.publish(topic, msg)

    def client_gone(self, client: str) -> None:
        """Forget what only mattered to ``client``, which has disconnected; the keys that it wants are the host's."""
        self.topics.unsubscribe_all(client)
        self.variables.forget(client)

    def site_gone(self, site: str) -> None:
        """Let go of all that tasks at ``site`` got out of Variables and Queues."""
        for client in {c for c in (*self._view.held, *self.variables.unconfirmed) if c.startswith(f"{site}/")}:
            self.client_gone(client)
            self._view.remove_client(client)

    async def serve_site(self, site: str, op: str, kwargs: Mapping[str, Any]) -> Any:
        """Do for a task at ``site`` what it asked of the site's scheduler, and return the reply.

        ``op`` is an RPC or stream op of coordination, or ``client-releases-keys``; a ``client`` in ``kwargs`` is an id
        known at the site only. Raises ValueError for any other op, and whatever the op raises.
        """
        if "client" in kwargs:
            kwargs = {**kwargs, "client": f"{site}/{kwargs['client']}"}
        if op == RELEASE:
            return self._view.client_releases_keys(**kwargs)
        handler = self._view.handlers.get(op) or self._view.stream_handlers.get(op)
        if handler is None:
            raise ValueError(f"{op!r} is no coordination op: a site cannot forward it")
        result = handler(**kwargs)
        return await result if inspect.isawaitable(result) else result

    def close(self) -> None:
        """Stop what runs in the background."""
        self._view.close()


class _SchedulerView:
    """The hub, as distributed's extensions see a scheduler."""

    def __init__(self, host: CoordinationHost) -> None:
        self.host = host
        self.handlers: dict[str, Callable[..., Any]] = {}
        self.stream_handlers: dict[str, Callable[..., Any]] = {}
        self.periodic_callbacks = host.periodic_callbacks
        self.loop = host.loop
        self.plugins: dict[str, Any] = {}
        self.held: dict[str, set[Key]] = defaultdict(set)  # by clients that are not connected ones
        self._background: set[asyncio.Task[None]] = set()

    @property
    def clients(self) -> Container[str]:
        return self.host.clients

    @property
    def tasks(self) -> Mapping[Key, TaskView]:
        return self.host.tasks

    def client_desires_keys(self, keys: Collection[Key], client: str) -> None:
        if client not in self.host.clients:
            self.held[client].update(keys)
        self.host.client_desires_keys(keys=list(keys), client=client)

    def client_releases_keys(self, keys: Collection[Key], client: str) -> None:
        if client in self.held:
            self.held[client].difference_update(keys)
            if not self.held[client]:
                del self.held[client]
        self.host.client_releases_keys(keys=list(keys), client=client)

    def remove_client(self, client: str) -> None:
        if keys := self.held.pop(client, None):
            self.host.client_releases_keys(keys=list(keys), client=client)

    def send_all(self, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        self.host.send_all(client_msgs, worker_msgs)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` in the background until it is done or the hub closes."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        for task in self._background:
            task.cancel()


class _Variables(VariableExtension):
    """Variables; a future that one gives away is held for the taker until it confirms, or is gone."""

    def __init__(self, view: _SchedulerView) -> None:
        self.unconfirmed: dict[str, set[tuple[Key, str, str]]] = defaultdict(set)  # client -> (key, name, token)
        super().__init__(view)
        view.stream_handlers["variable_delete"] = self.delete_soon

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


class _Topics:
    """Events by topic: distributed's broker, and the ops by which clients reach it."""

    def __init__(self, view: _SchedulerView) -> None:
        self.broker = Broker(dask.config.get("distributed.admin.low-level-log-length"), view)
        view.handlers.update({"log_event": self.log_event, "events": self.get_events})
        view.stream_handlers.update({"subscribe-topic": self.subscribe, "unsubscribe-topic": self.unsubscribe})

    def log_event(self, topic: str | Collection[str], msg: Any) -> None:
        """Publish ``msg`` under one topic or several."""
        self.broker.publish(topic, msg)

    def get_events(self, topic: str | None = None) -> Any:
        """Return the latest events of ``topic``, or of all, each as (time, message)."""
        return self.broker.get_events(topic)

    def subscribe(self, topic: str, client: str) -> None:
        """Send ``client`` each event of ``topic`` from now on."""
        self.broker.subscribe(topic, client)

    def unsubscribe(self, topic: str, client: str) -> None:
        """Send ``client`` no more events of ``topic``."""
        self.broker.unsubscribe(topic, client)

    def unsubscribe_all(self, client: str) -> None:
        """Send ``client`` no more events."""
        for topic in self.broker._topics.values():
            topic.unsubscribe(client)


class _Metadata:
    """A tree of values by path, as ``Client.set_metadata`` and ``get_metadata`` know it."""

    def __init__(self, view: _SchedulerView) -> None:
        self.tree: dict[Any, Any] = {}
        view.handlers.update({"get_metadata": self.get, "set_metadata": self.set})

    def set(self, keys: Collection[Any], value: Any = None) -> None:
        """Set the value at the path ``keys``; a value on the way that is no branch makes room for one."""
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
