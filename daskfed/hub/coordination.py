"""Variables, Queues, Locks, Events, published datasets, topics and metadata of a whole federation, kept at the hub.

They are distributed's own scheduler extensions (:mod:`daskfed.hub.extensions`), attached to the hub. Values that users
put into them are never opened: the hub's comms hand over what is not plain as ``Serialized`` or ``Pickled`` (see
:mod:`daskfed.comm.opaque`), the extensions keep it and give it back.

Who wants a key::

    client        what a connected client wants; it ends with the client
    variable-x    (queue-x, published-x) what coordination state holds; it ends when the state lets go of it
    site/client   what a task at a site got out of a Variable or Queue; it ends with the site, or when the site says so

The host is told of each through ``client_desires_keys`` and ``client_releases_keys``, and need not tell them apart.

All of it is journalled before anybody is told, and restored by a hub that starts anew. It lets nobody take anything
before those are back whom it knew, so that a future that is taken is one whose key is known. A request that its sender
repeats, since its connection broke, carries an id: it is done once.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Collection, Container, Mapping
from typing import Any, Protocol

from daskfed.hub.extensions import (
    Datasets,
    Events,
    Metadata,
    MultiLocks,
    Queues,
    Replies,
    SchedulerView,
    Semaphores,
    Variables,
    request_id,
)
from daskfed.hub.journal import Journal
from daskfed.hub.topics import Topics, TopicsHost
from daskfed.messages import REQUEST, Key

RELEASE = "client-releases-keys"
"""What a site sends when its tasks no longer want keys that they got here."""
DESIRE = "client-desires-keys"
"""What a site sends when its tasks want keys by name; the reply says which of them the federation knows."""
LOG_EVENT = "log_event"
"""What a site sends for each event that its tasks log."""
TAKING = ("semaphore_acquire", "multi_lock_acquire", "queue_get", "variable_get", "publish_get")
"""Ops that wait, after a restart, until those who were there are back."""


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


class CoordinationHost(TopicsHost, Protocol):
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


def attach(
    host: CoordinationHost, journal: Journal | None = None, recovered: Callable[[], Awaitable[None]] | None = None
) -> Coordination:
    """Make ``host`` serve all of coordination; call it once, on the event loop of the host.

    ``journal`` keeps it; ``recovered`` returns once those are back who were there before the host started anew.
    """
    return Coordination(host, journal or Journal(), recovered)


class Coordination:
    """All coordination state of a federation; :func:`attach` makes it.

    The host calls :meth:`restore` before it serves anybody, :meth:`client_back`, :meth:`client_gone`,
    :meth:`site_gone` and :meth:`close`, and passes on what a site's agent forwards with :meth:`serve_site`.
    """

    def __init__(
        self, host: CoordinationHost, journal: Journal, recovered: Callable[[], Awaitable[None]] | None
    ) -> None:
        self._view = SchedulerView(host, journal)
        self._recovered = recovered
        self._running: dict[str, asyncio.Task[Any]] = {}  # by request
        self.replies = Replies(journal)
        self.variables = Variables(self._view)
        self.queues = Queues(self._view, self.replies)
        self.events = Events(self._view)
        self.semaphores = Semaphores(self._view)
        self.multi_locks = MultiLocks(self._view)
        self.datasets = Datasets(self._view)
        self.topics = Topics(self._view)
        self.metadata = Metadata(self._view)
        self._handlers = {op: self._once(op, handler) for op, handler in self._view.handlers.items()}
        host.handlers.update(self._handlers)
        host.stream_handlers.update(self._view.stream_handlers)

    def restore(self) -> None:
        """Read back what an earlier hub kept."""
        self._view.restore()
        self.replies.restore()
        kept = (self.variables, self.queues, self.events, self.semaphores, self.multi_locks, self.datasets)
        for extension in (*kept, self.metadata):
            extension.restore()

    def _once(self, op: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return a handler that does a repeated request once, and takes nothing before all are back."""

        @functools.wraps(handler)
        async def serve(**kwargs: Any) -> Any:
            request = kwargs.pop(REQUEST, None)
            if request is None:
                return await self._serve(op, handler, kwargs)
            if (task := self._running.get(request)) is None:
                context = contextvars.copy_context()
                context.run(request_id.set, request)
                task = asyncio.create_task(self._serve(op, handler, kwargs), context=context)
                self._running[request] = task
                task.add_done_callback(lambda task: self._finished(request, task))
            return await asyncio.shield(task)

        return serve

    def _finished(self, request: str, task: asyncio.Task[Any]) -> None:
        del self._running[request]
        if not task.cancelled():
            task.exception()  # it was raised where somebody still waited

    async def _serve(self, op: str, handler: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
        if op in TAKING and self._recovered is not None:
            await self._recovered()
        result = handler(**kwargs)
        return await result if inspect.isawaitable(result) else result

    def hold(self, keys: Collection[Key], holder: str) -> None:
        """Want ``keys`` in the name of something that is no client, across restarts of the hub."""
        self._view.client_desires_keys(keys, holder)

    def let_go(self, keys: Collection[Key], holder: str) -> None:
        """End :meth:`hold`."""
        self._view.client_releases_keys(keys, holder)

    def log_event(self, topic: str | Collection[str], msg: Any) -> None:
        """Tell every owner's subscribers of ``topic`` (or of several) about ``msg``, which msgpack can write."""
        self.topics.publish_to_all(topic, msg)

    def client_back(self, client: str) -> None:
        """``client`` has a new stream: what it sent on the one before may be lost."""
        self.datasets.returned.add(client)

    def client_gone(self, client: str) -> None:
        """Forget what only mattered to ``client``, which has disconnected; the keys that it wants are the host's."""
        self.topics.unsubscribe_all(client)
        self.datasets.returned.discard(client)
        self.variables.forget(client)

    def site_gone(self, site: str) -> None:
        """Let go of all that tasks at ``site`` got out of Variables and Queues."""
        for client in {c for c in (*self._view.held, *self.variables.unconfirmed) if c.startswith(f"{site}/")}:
            self.client_gone(client)
            self._view.remove_client(client)

    async def serve_site(self, site: str, op: str, kwargs: Mapping[str, Any], request: str | None = None) -> Any:
        """Do for a task at ``site`` what it asked of the site's scheduler, and return the reply.

        ``op`` is an RPC or stream op of coordination, or ``client-releases-keys``; a ``client`` in ``kwargs`` is an id
        known at the site only; an RPC that is repeated with the same ``request`` is done once. Raises ValueError for
        any other op, and whatever the op raises.
        """
        if "client" in kwargs:
            kwargs = {**kwargs, "client": f"{site}/{kwargs['client']}"}
        if op == RELEASE:
            return self._view.client_releases_keys(**kwargs)
        if op == DESIRE:
            known = [key for key in kwargs["keys"] if key in self._view.tasks]
            self._view.client_desires_keys(known, kwargs["client"])
            return known
        if op == LOG_EVENT:
            return self.topics.from_site(site, **kwargs)
        if (handler := self._handlers.get(op)) is not None:
            return await handler(**kwargs, **{REQUEST: request})
        if (handler := self._view.stream_handlers.get(op)) is None:
            raise ValueError(f"{op!r} is no coordination op: a site cannot forward it")
        result = handler(**kwargs)
        return await result if inspect.isawaitable(result) else result

    def close(self) -> None:
        """Stop what runs in the background."""
        for task in self._running.values():
            task.cancel()
        self._view.close()
