"""Locks, Queues, Variables, Events and datasets that tasks use are the federation's, not those of their site.

A task talks to its site's stock scheduler. There :class:`ForwardCoordination`, a plugin that the agent registers, puts
forwarders in place of the scheduler's own handlers; they pass each request to the agent, which relays it to the hub::

    task ──▶ site's scheduler ──forward-to-hub──▶ agent ──▶ hub
             ForwardCoordination                  forward_to_hub on an AgentPort

Requests and replies stay unopened all the way. Futures need more than passing on:

- A future that a task puts where others see it names a key that the hub may not know, since the task made it: the agent
  announces it first (:meth:`AgentPort.announce_keys`).
- A future that a task has got otherwise, as in what another task returned, names a key that its site's scheduler does
  not know: the plugin has the hub look for it, hold it and bring it.
- A future that a task takes names a key that the site may not have: the agent brings it (:meth:`AgentPort.bring_keys`)
  before the task hears of it. The hub holds it for the task until the task's client lets go of it.

Events that tasks log (``print``, ``warn`` and the user's own topics) go to the hub too, and stay at the site as well.
Workers say which task logged an event (:mod:`daskfed.site.naming`); the hub is told the nearest key above that task
that it knows, and so whose the event is.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from distributed import SchedulerPlugin

from daskfed.comm.opaque import MOST_CALLS, OpaqueError, OpaquePool, relays_errors, settle
from daskfed.data.fetch import by_value
from daskfed.messages import COORDINATION, Key
from daskfed.site.naming import NameTasks, opened

logger = logging.getLogger(__name__)

TAKEN_OPS = ("variable-future-received-confirm", "queue-future-release")
"""Stream ops by which a task's client says that it has a future now; the hub then holds the key for it."""
RELEASE = "client-releases-keys"
DESIRE = "client-desires-keys"
ACTOR_OPS = ("actor_execute", "actor_attribute")
"""What a scheduler is asked to pass on to the worker of an actor."""
LOCAL_TOPICS = ("worker-", "invalid-worker-")
"""Topics that begin so are a worker's own; so are those named after an address."""
POLL_S = 0.01
KNOWN_WITHIN_S = 5.0
"""How long a key may take to reach the scheduler after the request that names it, which goes another way."""


# -- at the agent ----------------------------------------------------------------------------------------------------


class AgentPort(Protocol):
    """What forwarding needs of a site's agent."""

    async def call_hub(self, op: str, **kwargs: Any) -> Any:
        """Have the hub do ``op`` for this site and return its reply, unopened, however long it takes.

        Raises OpaqueError where the hub's handler raised.
        """
        ...

    async def announce_keys(self, keys: Mapping[Key, int | None]) -> None:
        """Tell the hub that ``keys``, which tasks made, are at this site.

        The agent's client wants them already. A key comes with its bytes, or None while it is not in memory: then the
        scheduler tells the agent's client when it is, perhaps before this call.
        """
        ...

    async def bring_keys(self, keys: Collection[Key]) -> None:
        """Bring ``keys``, which the hub knows; when it returns, the site's scheduler knows them, made or not yet."""
        ...


def agent_handlers(port: AgentPort, token: str) -> dict[str, Callable[..., Any]]:
    """Return the RPC handlers that an agent's server needs; they serve only who knows ``token``."""

    @relays_errors
    async def serve(token: str, hub_op: str, kwargs: dict[str, Any], announce: Any = None) -> Any:
        if not hmac.compare_digest(str(token), expected):
            raise PermissionError("the token is not this agent's: another site's scheduler called it")
        return await forward_to_hub(port, hub_op, kwargs, announce)

    expected = token
    return {"forward-to-hub": serve}


async def forward_to_hub(port: AgentPort, op: str, kwargs: Mapping[str, Any], announce: Any = None) -> Any:
    """Relay what a task asked to the hub and return the reply; ``announce`` are keys that the hub may not know yet,
    as for :meth:`AgentPort.announce_keys`. Raises OpaqueError where the hub's handler raised, and what the port raises.
    """
    if announce:
        await port.announce_keys(announce)
    reply = await port.call_hub(op, **kwargs)
    if keys := keys_taken(op, reply):
        await port.bring_keys(keys)
    return reply


def keys_taken(op: str, reply: Any) -> list[Key]:
    """Return the keys of the futures that a reply of the hub hands out."""
    if op == DESIRE:
        return list(reply)
    if op == "publish_get":
        return [key for dataset in reply if dataset is not None for key in dataset["keys"]]
    if op not in ("variable_get", "queue_get"):
        return []
    records = [reply] if isinstance(reply, dict) else reply
    return [record["value"] for record in records if record.get("type") == "Future"]


def keys_put(op: str, kwargs: Mapping[str, Any]) -> list[Key]:
    """Return the keys of the futures that a request puts where others see them."""
    if op == "publish_put":
        return [key for keys in kwargs["keys"] for key in keys]
    key = kwargs.get("key")
    return [key] if op in ("variable_set", "queue_put") and key is not None else []


# -- in the site's scheduler -----------------------------------------------------------------------------------------


class ForwardCoordination(SchedulerPlugin):
    """Makes a stock scheduler forward coordination to the agent at ``agent_address``, which knows ``token``.

    ``agent_client`` is the id of the agent's own client of that scheduler: it is made to want the keys that tasks put.
    The plugin dials the agent with the scheduler's own security. Registered again (``idempotent=False``), with another
    address or token, it replaces the earlier one.
    """

    name = "daskfed-forward-coordination"
    idempotent = False

    def __init__(self, agent_address: str, token: str, agent_client: str) -> None:
        self.agent_address = agent_address
        self.token = token
        self.agent_client = agent_client

    async def start(self, scheduler: Any) -> None:
        """Put the forwarders in place; called by the scheduler."""
        if isinstance(earlier := scheduler.plugins.get(self.name), ForwardCoordination):
            await earlier.close()
            scheduler.remove_plugin(self.name)
        self.scheduler = scheduler
        self.held: dict[str, set[Key]] = defaultdict(set)  # by the hub for the clients of tasks
        self._queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self._expected: dict[str, set[Key]] = defaultdict(set)  # by client: keys that are being brought for it
        self._bringing: set[asyncio.Task[None]] = set()
        self._pool = OpaquePool(limit=MOST_CALLS, connection_args=scheduler.connection_args)
        await self._pool.start()
        self._sender = asyncio.create_task(self._send_in_order())
        self._replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._replace(scheduler.handlers, self._rpc_handlers(scheduler.handlers))
        self._replace(scheduler.stream_handlers, self._stream_handlers(scheduler.stream_handlers))
        await scheduler.register_worker_plugin(None, by_value(NameTasks()), NameTasks.name, idempotent=False)

    async def close(self) -> None:
        """Give the scheduler its own handlers back and let go of the agent; called by the scheduler when it ends."""
        for handlers, own in self._replaced:
            handlers.update(own)
        for task in (self._sender, *self._bringing):
            task.cancel()
        await self._pool.close()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Let go of what the hub holds for a task's client that has gone; called by the scheduler."""
        self._expected.pop(client, None)
        self._let_go(client, self.held.get(client, ()))

    # -- handlers ----------------------------------------------------------------------------------------------------

    def _replace(self, handlers: dict[str, Any], new: Mapping[str, Callable[..., Any]]) -> None:
        self._replaced.append((handlers, {op: handlers[op] for op in new}))
        handlers.update(new)

    def _rpc_handlers(self, own: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        forwarded = {op: self._forwarder(op) for op in own if op.startswith(COORDINATION)}
        return forwarded | {"log_event": self._logger(own["log_event"]), "proxy": self._proxy(own["proxy"])}

    def _stream_handlers(self, own: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        forwarded = {op: self._stream_forwarder(op) for op in own if op.startswith((*COORDINATION, *TAKEN_OPS))}
        keys = {RELEASE: self._releaser(own[RELEASE]), DESIRE: self._desirer(own[DESIRE])}
        return forwarded | keys | {"log-event": self._logger(own["log-event"])}

    def _proxy(self, own: Callable[..., Any]) -> Callable[..., Any]:
        async def proxy(msg: dict[str, Any], worker: str, **how: Any) -> Any:
            actor = self.scheduler.tasks.get(msg.get("actor"))
            if msg.get("op") not in ACTOR_OPS or (actor is not None and actor.actor):
                return await own(msg=msg, worker=worker, **how)
            reply = await self._forward("proxy", {"worker": worker, "msg": msg})  # it is at another site
            return settle(reply) if self.scheduler.address.startswith("inproc://") else reply

        return proxy

    def _forwarder(self, op: str) -> Callable[..., Any]:
        async def forward(**kwargs: Any) -> Any:
            reply = await self._forward(op, kwargs)
            return settle(reply) if self.scheduler.address.startswith("inproc://") else reply

        return forward

    def _stream_forwarder(self, op: str) -> Callable[..., Any]:
        def forward(**kwargs: Any) -> None:
            if op in TAKEN_OPS:
                self.held[kwargs["client"]].add(kwargs["key"])
                if kwargs["key"] in self.scheduler.tasks:  # its client may not know yet how it stands
                    self.scheduler.client_desires_keys([kwargs["key"]], kwargs["client"])
            self._queue.put_nowait((op, kwargs))

        return forward

    def _releaser(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def release(keys: Collection[Key], client: str, **rest: Any) -> None:
            self._expected[client].difference_update(keys)
            own(keys=keys, client=client, **rest)
            self._let_go(client, keys)

        return release

    def _desirer(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def desire(keys: Collection[Key], client: str, **rest: Any) -> None:
            known = self.scheduler.tasks
            own(keys=[key for key in keys if key in known], client=client, **rest)
            if unknown := [key for key in keys if key not in known]:
                self._expected[client].update(unknown)
                task = asyncio.create_task(self._bring(unknown, client, own))
                self._bringing.add(task)
                task.add_done_callback(self._bringing.discard)

        return desire

    async def _bring(self, keys: list[Key], client: str, own: Callable[..., Any]) -> None:
        """Have keys brought that a task's client wants and this scheduler does not know; it hears if there are none."""
        try:
            reply = await self._forward(DESIRE, {"keys": keys, "client": client})
        except OSError as exc:
            reply = {"exception_text": str(exc)}
        found = [] if isinstance(reply, dict) else list(reply)
        if isinstance(reply, dict):
            logger.warning("Could not bring %s for a task: %s", keys[:3], reply.get("exception_text"))
        wanted = [key for key in keys if key in self._expected[client]]
        self._expected[client].difference_update(keys)
        self.held[client].update(found)
        for key in found:
            await self._task(key)
        own(keys=[key for key in wanted if key in found], client=client)
        if lost := [key for key in wanted if key not in found]:
            gone = {"op": "cancelled-keys", "keys": lost, "reason": "lost dependencies", "msg": None}
            self.scheduler.report(gone, client=client)
        self._let_go(client, [key for key in found if key not in wanted])

    def _let_go(self, client: str, keys: Collection[Key]) -> None:
        if client not in self.held:
            return
        if gone := self.held[client].intersection(keys):
            self.held[client] -= gone
            self._queue.put_nowait((RELEASE, {"keys": list(gone), "client": client}))
        if not self.held[client]:
            del self.held[client]

    def _logger(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def log(topic: str | Collection[str], msg: Any, **worker: Any) -> None:
            key, msg = opened(msg) if worker else (None, msg)  # a client's message is the client's
            own(topic=topic, msg=msg, **worker)
            topics = [topic] if isinstance(topic, str) else topic
            if shared := [each for each in topics if "://" not in each and not each.startswith(LOCAL_TOPICS)]:
                self._queue.put_nowait(("log_event", {"topic": shared, "msg": msg, "task": self._asked_for(key)}))

        return log

    def _asked_for(self, key: Key | None) -> Key | None:
        """Return the nearest key above a task, or its own, that the agent asked for: the hub knows that one."""
        stack = [] if key is None else [self.scheduler.tasks.get(key)]
        seen = set(stack)
        while stack:
            if (task := stack.pop()) is None:
                continue
            if any(client.client_key == self.agent_client for client in task.who_wants or ()):
                return task.key  # type: ignore[no-any-return]
            new = task.dependents - seen
            seen |= new
            stack.extend(new)
        return None

    # -- to the agent ------------------------------------------------------------------------------------------------

    async def _forward(self, op: str, kwargs: dict[str, Any]) -> Any:
        announce = await self._hold(keys_put(op, kwargs))
        try:
            return await self._pool.call(
                self.agent_address, "forward-to-hub", token=self.token, hub_op=op, kwargs=kwargs, announce=announce
            )
        except OpaqueError as exc:
            return exc.reply()

    async def _hold(self, keys: Collection[Key]) -> dict[Key, int | None]:
        """Make the agent's client want ``keys`` before a task can let go; returns those of this site, with sizes."""
        sizes = {}
        for key in keys:
            task = await self._task(key)
            if task is not None and (task.run_spec is not None or task.who_has):
                sizes[key] = task.nbytes if task.state == "memory" else None
                self.scheduler.client_desires_keys([key], self.agent_client)
        return sizes

    async def _task(self, key: Key) -> Any:
        """Return the scheduler's state of ``key``, once it has heard of it, or None if it does not."""
        for _ in range(int(KNOWN_WITHIN_S / POLL_S)):
            if task := self.scheduler.tasks.get(key):
                return task
            await asyncio.sleep(POLL_S)
        return None

    async def _send_in_order(self) -> None:
        """Forward what clients said on their streams, one by one: their order matters, their replies do not."""
        while True:
            op, kwargs = await self._queue.get()
            try:
                reply = await self._forward(op, kwargs)
            except OSError as exc:
                logger.warning("Could not pass %r on to the agent at %s: %s", op, self.agent_address, exc)
            else:
                if isinstance(reply, dict) and reply.get("status") == "uncaught-error":
                    logger.warning("The hub could not do %r: %s", op, reply.get("exception_text"))
