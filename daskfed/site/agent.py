"""The agent of a site: starts its cluster, joins the hub, and does what the hub asks.

::

    hub  <──control stream, channels, calls, relays──  agent  ──raw client protocol──>  site's scheduler
                                                         ^
                          other agents, workers ──door──┘        (keys of this site, imports for its workers)

The agent opens nothing that users pickled: payloads go through it as they are, and the Cluster with its scheduler lives
in a process of its own, unless everything lives in one process anyway (the embedded default).
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import os
import platform
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dask.utils import format_time
from distributed.comm.addressing import get_address_host, unparse_host_port
from distributed.comm.core import Comm
from distributed.core import Status

from daskfed import config
from daskfed.collecting import Relaxed
from daskfed.comm.opaque import OpaqueServer
from daskfed.comm.pacing import Paced
from daskfed.data.transfer import Door
from daskfed.ending import end_tasks
from daskfed.errors import DaskfedError, TransferError
from daskfed.keys import KeyFolder
from daskfed.locations import data_locations
from daskfed.messages import PROTOCOL_VERSION, Key, Message, SiteHello
from daskfed.site.actors import ActorCalls
from daskfed.site.clusters import ClusterAdapter, ClusterSpec
from daskfed.site.forwarding import ForwardCoordination, agent_handlers, forward_to_hub
from daskfed.site.plugins import SitePlugins
from daskfed.site.ports import HubPort, RemoteHub
from daskfed.site.replay import make_again
from daskfed.site.session import Session

logger = logging.getLogger(__name__)

MOVED_S = 1.0  # how often it is looked whether the hub has another address
TOLD = ("dask", "distributed", "daskfed", "numpy", "pandas", "pyarrow", "scipy", "xarray", "zarr")
"""Packages that a site tells the version of, so that clients need not ask."""
LOOKING = frozenset({"who_has", "fed-holders", "has_what", "nbytes", "story", "get_story", "replicate", "rebalance"})
"""Ops of a scheduler that are about results: those of calls that it does not know are shown to it before."""
REJOIN_S = (0.05, 5.0)  # first and longest pause between attempts to reach a hub that went away
DRAIN_TIMEOUT_S = 300.0
BRING_TIMEOUT_S = 60.0
POLL_S = 0.01
REASK_S = 0.2  # pause before the hub is asked again after its connection broke


class Agent:
    """A site named ``name`` whose cluster is given by ``spec``.

    ``hub`` is the address of a hub, or what returns it where it may change, or a port to one in this process, which
    must then hand its messages to :meth:`deliver` and its calls to :meth:`call`. ``data`` are paths and URLs, relative
    ones below ``directory``, by default where this process runs. ``security`` or ``keys`` are for the connections with
    the hub. Without a hub the site ends itself after ``orphan_timeout_s``.
    """

    def __init__(
        self,
        name: str,
        spec: ClusterSpec,
        *,
        hub: str | Callable[[], str] | HubPort,
        labels: Mapping[str, str] | None = None,
        environments: tuple[str, ...] = ("default",),
        resources: Mapping[str, float] | None = None,
        data: Collection[str] = (),
        data_binding: str = "prefer",
        directory: str | os.PathLike[str] | None = None,
        security: Any = None,
        keys: KeyFolder | None = None,
        orphan_timeout_s: float | None = None,
    ) -> None:
        self.name = name
        self.cluster: ClusterAdapter = spec.adapter()
        self._collector = Relaxed()
        self.labels = dict(labels or {})
        self.environments = environments
        self.resources = dict(resources or {})
        self.data = tuple(data_locations(data, directory))
        self.data_binding = data_binding
        self._hub = hub
        self._hub_args = security.get_connection_args("worker") if security is not None else {}
        self._hub_args |= {"keys": keys} if keys is not None else {}
        self._orphan_timeout_s = config.orphan_timeout_s() if orphan_timeout_s is None else orphan_timeout_s
        self._door = OpaqueServer(self._door_handlers())
        self._door_token = secrets.token_urlsafe(32)
        self._session: Session | None = None
        self._port: HubPort | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._closed = False
        self.reason = ""  # why the site ended by itself
        self.failed = False  # it ended though nobody asked for it
        self._actor_calls = ActorCalls(self._ask_scheduler, self._ask_hub)
        self._handlers = self._hub_handlers()

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the cluster and connect to its scheduler; raises SiteStartError, and leaves nothing behind then."""
        try:
            await self.cluster.start()
            await self._open_door()
            self._session = await self._new_session()
            self._watcher = asyncio.create_task(self._watch_cluster(), name="watch cluster")
        except BaseException:
            await self.close()
            raise

    async def _open_door(self) -> None:
        """Listen where the site's workers reach the scheduler too."""
        address, security = self.cluster.scheduler_address, self.cluster.security
        scheme = address.split("://", 1)[0]
        where = "" if scheme == "inproc" else unparse_host_port(get_address_host(address), 0)
        listen_args = security.get_listen_args("scheduler") if security is not None else {}
        await self._door.listen(f"{scheme}://{where}", **listen_args)
        await self._door.start()

    async def _new_session(self) -> Session:
        security = self.cluster.security
        session = Session(
            self.cluster.scheduler_address,
            self._door.address,
            self._door_token,
            on_stop=self._end,
            on_scheduler_lost=lambda: self._end("its scheduler is gone", failed=True),
            connection_args=security.get_connection_args("client") if security is not None else None,
        )
        await session.start()
        await session.register_plugin(ForwardCoordination(self._door.address, self._door_token, session.client))
        return session

    async def _watch_cluster(self) -> None:
        await self.cluster.finished()
        self._end("its cluster has ended", failed=True)

    async def joined(self) -> None:
        """Join the hub and tell it what there is; raises ConnectionRefused with its reason, OSError if it is gone."""
        hub = self._hub
        if isinstance(hub, str) or callable(hub):
            port = self._port = RemoteHub(hub if callable(hub) else lambda: hub, self._hub_args)
            await self._register(port)
            self._keeper = asyncio.create_task(self._keep_joined(port), name="keep joined")
        else:
            self._port = hub
            await self.session.join(hub, self)

    async def _register(self, port: RemoteHub) -> None:
        if not await port.register(self.hello, self, self.session.take_message):
            await self.session.join(port, self)

    async def _keep_joined(self, port: RemoteHub) -> None:
        """Join again whenever the connection with the hub broke; work goes on meanwhile."""
        while True:
            while not port.lost.is_set():
                port.leave_where_moved()
                with suppress(TimeoutError):
                    await asyncio.wait_for(port.lost.wait(), MOVED_S)
            logger.warning("site %s lost its hub at %s and tries to join it again", self.name, port.address)
            try:
                async with asyncio.timeout(self._orphan_timeout_s):
                    await self._rejoin(port)
            except TimeoutError:
                waited = format_time(self._orphan_timeout_s)
                self._end(f"there was no hub for {waited} (its orphan-timeout)", failed=True)
                return
            logger.info("site %s is connected with its hub again", self.name)

    async def _rejoin(self, port: RemoteHub) -> None:
        pause, longest = REJOIN_S
        while True:
            try:
                await self._register(port)
                return
            except (OSError, DaskfedError) as exc:
                logger.info("site %s cannot join %s yet: %s", self.name, port.address, exc)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _end(self, reason: str, failed: bool = False) -> None:
        if not self._closed and not self._ended.is_set():
            self.reason, self.failed = reason, failed
            logger.info("site %s ends: %s", self.name, reason)
            self._ended.set()

    async def finished(self) -> str:
        """Wait until the hub ends the site, or its cluster ends, and return the reason."""
        await self._ended.wait()
        return self.reason

    async def drain(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Take no more blocks, hand all keys over to other sites, and end; raises TimeoutError after ``timeout_s``."""
        self.session.drain()
        await asyncio.wait_for(self._ended.wait(), timeout_s)

    async def close(self) -> None:
        """End connections, scheduler and workers."""
        if self._closed:
            return
        self._closed = True
        await end_tasks(self._keeper, self._watcher)
        await self._actor_calls.close()
        if self._session is not None:
            await self._session.close()
        if isinstance(self._port, RemoteHub):
            await self._port.close()
        await self._door.close()
        await self.cluster.close()
        self._collector.end()
        self._ended.set()

    @property
    def session(self) -> Session:
        """The present connection with the scheduler and the hub."""
        assert self._session is not None, "the agent was not started"
        return self._session

    @property
    def hello(self) -> SiteHello:
        """What the site says of itself when it joins."""
        return SiteHello(
            site=self.name,
            incarnation=self.session.incarnation,
            protocol=PROTOCOL_VERSION,
            labels=tuple(sorted(self.labels.items())),
            environments=self.environments,
            resources=tuple(sorted(self.resources.items())),
            data_address=self._door.address,
            network=own_network(),
            dashboard=self.cluster.dashboard,
            versions=_versions(),
            data=self.data,
            data_binding=self.data_binding,
        )

    # -- for the hub -------------------------------------------------------------------------------------------------

    def deliver(self, message: Message, payload: Any = None) -> None:
        """Take in a message of the hub, with what travelled beside it."""
        if not self._closed:
            self.session.take_message(message, payload)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Do what the hub asks and return the answer; raises OpaqueError where the site's scheduler raised."""
        if op not in self._handlers:
            raise ValueError(f"an agent has no {op!r}; there are {', '.join(self._handlers)}")
        return await self._handlers[op](**kwargs)

    def stream_keys(self, keys: Collection[Key], checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages of a stream with ``keys``, for a site that cannot connect to this one, or for a client."""
        return self.session.stream_keys(keys, checked)

    def _hub_handlers(self) -> dict[str, Callable[..., Any]]:
        plugins = SitePlugins(lambda op, **kwargs: self.session.ask_scheduler(op, **kwargs))
        return {
            "gather": self._gather,
            "scatter_keys": self._scatter_keys,
            "scheduler_rpc": self._scheduler_rpc,
            "explain": self._explain,
            "cluster": self._cluster,
            "forward_to_hub": self._forward_to_hub,
            "announce_keys": self.announce_keys,
            "make_again": self._make_again,
            "register_plugin": plugins.register,
            "unregister_plugin": plugins.unregister,
            "agree_on_plugins": plugins.agree,
            "ping": self._ping,
            "find_keys": self._find_keys,
            "call_actor": self._actor_calls.start,
        }

    async def _gather(self, keys: Collection[Key]) -> dict[str, Any]:
        values = await self.session.gather_values(list(keys))
        missing = [key for key in keys if key not in values]
        return {"status": "error", "keys": missing} if missing else {"status": "OK", "data": values}

    async def _scatter_keys(
        self, data: dict[Key, Any], broadcast: bool | int = False, workers: Collection[str] | None = None
    ) -> dict[str, Any]:
        return {"status": "OK", "nbytes": await self.session.scatter(dict(data), broadcast, workers)}

    async def _scheduler_rpc(self, scheduler_op: str, kwargs: Mapping[str, Any]) -> Any:
        if scheduler_op in LOOKING:
            await self.session.show(kwargs.get("keys"))
        return await self.session.ask_scheduler(scheduler_op, **kwargs)

    async def _ask_scheduler(self, op: str, **kwargs: Any) -> Any:
        return await self.session.ask_scheduler(op, **kwargs)

    async def _find_keys(self, keys: Collection[Key]) -> list[Key]:
        """Return those of ``keys`` that the scheduler knows, since tasks made them; they are held from now on."""
        return list(await self.session.ask_scheduler("fed-find", keys=list(keys), client=self.session.client))

    async def _explain(self, key: Key) -> dict[str, Any]:
        return await self.session.explain(key)

    async def _cluster(self, method: str, kwargs: Mapping[str, Any]) -> Any:
        if method == "drain":
            self.session.drain()
            return None
        return await self.cluster.call(method, kwargs)

    async def _make_again(self, keys: Collection[Key]) -> dict[Key, Any]:
        return await make_again(self.session, list(keys))

    async def _ping(self) -> str:
        return "pong"

    # -- for other agents and for the site's own workers -------------------------------------------------------------

    def _door_handlers(self) -> dict[str, Callable[..., Any]]:
        return {
            "get_keys": self._get_keys,
            "get-import": self._get_import,
            "forward-to-hub": self._serve_forwarding,
            "lane": self._serve_lane,
        }

    async def _serve_lane(self, comm: Comm, token: str, lane: str, worker: str) -> Status:
        return await self.session.lanes.serve(comm, token, lane, worker)

    async def _get_keys(self, comm: Comm, keys: Collection[Key], token: str, site: str) -> Status:
        trusted = self._port is not None and hmac.compare_digest(token, self._port.door)
        if not trusted or site != self.name:
            error = f"this is site {self.name!r}, which does not know the caller"
            await comm.write({"end": True, "stranger": True, "error": error})
            return Status.dont_reply
        await Paced(comm).write_all(self.stream_keys(keys))
        return Status.dont_reply

    async def _get_import(self, key: Key, token: str) -> dict[str, Any]:
        if not hmac.compare_digest(token, self._door_token):
            return {"status": "error", "reason": "the agent does not know the caller"}
        return self.session.import_for_worker(key)

    async def _serve_forwarding(self, **request: Any) -> Any:
        return await agent_handlers(self, self._door_token)["forward-to-hub"](**request)

    # -- for forwarding and transfers: what others ask of the hub ----------------------------------------------------

    async def call_hub(self, op: str, **kwargs: Any) -> Any:
        """Have the hub do a coordination op for this site and return its reply, unopened; raises OpaqueError."""
        return await self._ask_hub("forward", hub_op=op, kwargs=kwargs, request=secrets.token_hex(8))

    async def _ask_hub(self, op: str, **kwargs: Any) -> Any:
        """Call the hub in the name of this site; one that is gone is waited for."""
        while True:
            port = self._joined_port()
            try:
                return await port.call(op, site=self.name, token=port.federation, **kwargs)
            except OSError:
                if not isinstance(port, RemoteHub) or self._closed:
                    raise
                await asyncio.sleep(REASK_S)
                await port.found.wait()

    async def _forward_to_hub(self, hub_op: str, kwargs: Mapping[str, Any]) -> Any:
        return await forward_to_hub(self, hub_op, kwargs)

    async def announce_keys(self, keys: Collection[Key]) -> None:
        """Tell the hub of keys that tasks made here; raises OSError where the hub is gone."""
        await self._ask_hub("announce-keys", keys=list(keys))

    async def bring_keys(self, keys: Collection[Key]) -> None:
        """Have the hub bring keys, or their errors, and wait until they are here; raises TransferError if not."""
        await self._ask_hub("bring-keys", keys=list(keys))
        try:
            async with asyncio.timeout(BRING_TIMEOUT_S):
                while not self.session.are_here(keys):
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise TransferError(f"{list(keys)[:3]} did not arrive within {BRING_TIMEOUT_S:g} s") from None

    async def door_of(self, site: str) -> Door:
        """Return where the agent of another site can be dialled, if it may be. Raises OSError."""
        port = self._joined_port()
        reply = await port.call("site-address", site=site, token=port.federation, network=own_network())
        if reply["status"] != "OK":
            raise TransferError(reply["reason"])
        return Door(str(reply["address"]), str(reply["door"]))

    def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of a stream of keys of another site, which comes through the hub."""
        return self._joined_port().relay(site, keys)

    def _joined_port(self) -> HubPort:
        if self._port is None:
            raise ConnectionError(f"site {self.name!r} has not joined a hub")
        return self._port


def own_network() -> str:
    """Return what stands for the loopback of this process: that of another machine or container is another one."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


@functools.cache  # it takes 10 ms, and who asks is often told what an agent says of itself
def _versions() -> tuple[tuple[str, str], ...]:
    """Return (package, version) of what should agree between a client and a site, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in TOLD:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return tuple(sorted(found.items()))
