"""RPCs of clients that need the sites: gather, scatter, identity, who_has and their like. Results pass unopened."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed.comm.core import Comm
from distributed.core import Status, error_message

from daskfed.comm.opaque import relays_errors
from daskfed.errors import UnknownSiteError
from daskfed.hub import events as ev
from daskfed.hub import lookups
from daskfed.hub.dispatch import SiteState, matches
from daskfed.hub.inspection import progress_of
from daskfed.hub.lookups import Roster
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

SCHEME = "fed://"
SCATTER_POLL_S = 0.05


class Gateway:
    """Answers to clients' RPCs."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.roster = Roster(self)

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        return {
            "identity": self.identity,
            "gather": relays_errors(self.gather),
            "scatter": relays_errors(self.scatter),
            "who_has": self.who_has,
            "has_what": self.has_what,
            "ncores": self.ncores,
            "ncores_running": self.ncores,
            "nbytes": self.nbytes,
            "logs": self.no_logs,
            "get_logs": self.no_logs,
            "worker_logs": self.worker_logs,
            "subscribe_worker_status": self.subscribe_worker_status,
            "fed_sites": self.fed_sites,
            "fed_transfers": self.fed_transfers,
            "fed_explain": self.fed_explain,
            "fed_progress": self.fed_progress,
            "fed_cluster": relays_errors(self.fed_cluster),
            "site-address": self.site_address,
        }

    # -- what there is -----------------------------------------------------------------------------------------------

    async def identity(self, n_workers: int = -1) -> dict[str, Any]:
        """Return what a scheduler's ``identity`` returns, for all sites together."""
        workers = await self.roster.workers() if n_workers else {}
        statuses = [site.status for site in self.hub.core.sites.values() if site.status is not None]
        return {
            "type": "Hub",
            "id": self.hub.id,
            "address": self.hub.address,
            "services": {},
            "started": self.hub.started_at,
            "n_workers": sum(status.workers for status in statuses),
            "total_threads": sum(status.threads for status in statuses),
            "total_memory": sum(status.memory_limit for status in statuses),
            "workers": dict(list(workers.items())[: n_workers if n_workers > 0 else None]),
            "fed": {
                "fixed": self.hub.fixed,
                "sites": sorted(self.hub.core.sites),
                "epoch": self.hub.core.ledger.epoch,
            },
        }

    def shown(self, site: str, worker: str) -> str:
        """Return a worker's address as clients see it: plain where there is and will be one site, as in stock Dask."""
        return worker if self.hub.fixed and len(self.hub.ports) == 1 else address_at(site, worker)

    async def ask_all(self, op: str, **kwargs: Any) -> dict[str, Any]:
        """Call an op of every site's scheduler; a site that is gone meanwhile is left out."""
        return await self._ask(op, dict.fromkeys(self.hub.ports, kwargs))

    async def ask_each(self, op: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Call an op of some sites' schedulers, each with its own value of one argument."""
        return await self._ask(op, {site: {name: value} for site, value in values.items()})

    async def _ask(self, op: str, kwargs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        asked = {site: self.hub.ports[site] for site in kwargs if site in self.hub.ports}
        calls = [port.call("scheduler_rpc", scheduler_op=op, kwargs=kwargs[site]) for site, port in asked.items()]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, OSError):
                raise reply
        return {name: reply for name, reply in zip(asked, replies, strict=True) if not isinstance(reply, BaseException)}

    def sites_info(self) -> dict[str, dict[str, Any]]:
        """Return name -> what ``client.sites()`` shows."""
        held: dict[str, int] = defaultdict(int)
        for state in self.hub.core.ledger.keys.values():
            for site in state.holders:
                held[site] += state.nbytes
        found = {name: site_info(site, held[name]) for name, site in self.hub.core.sites.items()}
        for name, port in self.hub.ports.items():
            if name in found and not port.connected:
                found[name]["status"] = "away"
        return found

    async def fed_sites(self) -> dict[str, Any]:
        """Return name -> facts of every site."""
        return self.sites_info()

    async def fed_transfers(self) -> list[tuple[str, str, int, int, float, int]]:
        """Return (from, to, count, bytes, seconds, how many were relayed) for every pair of sites that moved a key."""
        totals = self.hub.core.dispatcher.links.totals
        return [(*pair, t.count, t.nbytes, t.seconds, t.relayed) for pair, t in totals.items()]

    async def fed_explain(self, key: Key) -> dict[str, Any]:
        """Return why a key waits, or where and why it ran."""
        return self.hub.core.explain(key)

    async def fed_progress(self, keys: Collection[Key]) -> dict[str, dict[str, int]]:
        """Return how many tasks the graph behind ``keys`` has, and how many remain, per key prefix."""
        return progress_of(self.hub.core.ledger, keys)

    async def fed_cluster(self, site: str, method: str, kwargs: Mapping[str, Any]) -> Any:
        """Call ``scale``, ``adapt``, ``logs`` or ``drain`` of a site's cluster; raises UnknownSiteError."""
        if site not in self.hub.ports:
            raise UnknownSiteError(f"no site {site!r}; sites are {sorted(self.hub.ports)}")
        return await self.hub.ports[site].call("cluster", method=method, kwargs=dict(kwargs))

    async def site_address(self, site: str, token: str) -> dict[str, Any]:
        """Tell an agent where it may fetch keys of another site; an empty address means: only through the hub."""
        port = self.hub.ports.get(site)
        if port is None or not self.hub.trusts(token):
            return {"status": "error", "reason": f"no site {site!r} is connected, or the caller is no site of the hub"}
        return {"status": "OK", "address": port.hello.data_address, "federation": self.hub.secret}

    async def no_logs(self, n: int | None = None) -> list[Any]:
        """The hub keeps no log of its own for clients."""
        return []

    async def worker_logs(self, n: int | None = None, workers: Any = None, nanny: bool = False) -> dict[str, Any]:
        """Return the logs of all workers."""
        replies = await self.ask_all("worker_logs", n=n, nanny=nanny)
        return {self.shown(site, worker): log for site, reply in replies.items() for worker, log in reply.items()}

    async def subscribe_worker_status(self, comm: Comm) -> Status:
        """Tell a cluster object about workers, as a scheduler does."""
        identity = await self.identity(n_workers=-1)
        await comm.write(identity)
        self.hub.watchers[comm] = set(identity["workers"])
        try:
            while not comm.closed():
                await asyncio.sleep(0.5)
        finally:
            del self.hub.watchers[comm]
        return Status.dont_reply

    async def ncores(self, workers: Any = None) -> dict[str, int]:
        """Return worker -> threads."""
        return {address: info["nthreads"] for address, info in (await self.roster.workers()).items()}

    # -- keys --------------------------------------------------------------------------------------------------------

    async def who_has(self, keys: Collection[Key] | None = None) -> dict[Key, list[str]]:
        """Return key -> workers that hold it."""
        return await lookups.who_has(self, keys)

    async def has_what(self, workers: Any = None) -> dict[str, list[Key]]:
        """Return worker -> keys that it holds."""
        return await lookups.has_what(self)

    async def nbytes(self, keys: Collection[Key] | None = None, summary: bool = True) -> dict[Any, int]:
        """Return key -> bytes; or with ``summary`` key prefix -> bytes."""
        known = self.hub.core.ledger.keys
        asked = self.hub.owners.readable() if keys is None else list(keys)
        if not summary:
            return {key: known[key].nbytes for key in asked if key in known}
        replies = await self.ask_all("nbytes", keys=asked, summary=True)
        totals: dict[Any, int] = defaultdict(int)
        for reply in replies.values():
            for prefix, nbytes in reply.items():
                totals[prefix] += nbytes
        return dict(totals)

    async def gather(self, keys: Collection[Key], serializers: Any = None) -> dict[str, Any]:
        """Return ``{"status": "OK", "data": {key: value}}``, values unopened, or which keys could not be had."""
        by_site, absent = self._locate(keys)
        if absent:
            return {"status": "error", "keys": absent}
        calls = [self.hub.ports[site].call("gather", keys=there) for site, there in by_site.items()]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        data: dict[Key, Any] = {}
        for there, reply in zip(by_site.values(), replies, strict=True):
            if isinstance(reply, OSError):
                absent.extend(there)
            elif isinstance(reply, BaseException):
                raise reply
            elif reply["status"] != "OK":
                absent.extend(reply["keys"])
            else:
                data |= reply["data"]
        return {"status": "error", "keys": absent} if absent else {"status": "OK", "data": data}

    def _locate(self, keys: Collection[Key]) -> tuple[dict[str, list[Key]], list[Key]]:
        by_site: dict[str, list[Key]] = defaultdict(list)
        absent: list[Key] = []
        for key in keys:
            state = self.hub.core.ledger.keys.get(key)
            site = next((name for name in state.holders if name in self.hub.ports), None) if state else None
            if site is None:
                absent.append(key)
            else:
                by_site[site].append(key)
        return by_site, absent

    async def scatter(
        self,
        data: Mapping[Key, Any],
        workers: Any,
        client: str,
        broadcast: bool | int = False,
        timeout: float = 30,
        kept: bool = False,
        again: bool = False,
        replicas: int = 1,
    ) -> list[Key]:
        """Put a client's data at a site; raises TimeoutError if none can take it, UnknownSiteError for a wrong name.

        ``workers`` may hold ``fed://`` addresses of workers, sites or labels. ``kept``, ``again`` and ``replicas`` as
        for :class:`~daskfed.hub.events.KeysScattered`.
        """
        deadline = time.monotonic() + (timeout or 0)
        while True:
            where = selectors_of(workers) or self.hub.sessions.home_of_stock(client)
            site = await self._scatter_site(where, deadline)
            with suppress(OSError):  # it is gone: the next one takes the data
                reply = await self.hub.ports[site.name].call("scatter_keys", data=dict(data), broadcast=broadcast)
                break
        sizes = tuple((key, reply["nbytes"].get(key, 0)) for key in data)
        self.hub.take(ev.KeysScattered(client, site.name, sizes, kept, again, replicas))
        return list(data)

    async def _scatter_site(self, selectors: Collection[str], deadline: float) -> SiteState:
        while True:
            sites = [site for site in self.hub.core.sites.values() if self._can_take(site)]
            fitting = [s for s in sites if not selectors or any(matches(s.hello, x) for x in selectors)]
            if fitting:
                return min(fitting, key=lambda site: (site.backlog_s / site.threads, site.name))
            if sites and selectors:
                raise UnknownSiteError(f"no site matches {list(selectors)}; sites are {sorted(self.hub.core.sites)}")
            if time.monotonic() > deadline:
                raise TimeoutError("no site has a worker that could take the data")
            await asyncio.sleep(SCATTER_POLL_S)

    def _can_take(self, site: SiteState) -> bool:
        port = self.hub.ports.get(site.name)
        return bool(site.threads) and not site.draining and port is not None and port.connected

    # -- moving ------------------------------------------------------------------------------------------------------

    async def relay_fetch(self, comm: Comm, site: str, keys: Collection[Key], token: str) -> Status:
        """Stream keys of one site to another that cannot reach it; each message is written before the next is read."""
        port = self.hub.ports.get(site)
        if port is None or not self.hub.trusts(token):
            await comm.write({"end": True, "error": f"site {site!r} is not connected to the hub"})
            return Status.dont_reply
        async for message in port.stream_keys(keys, token):
            await comm.write(message)
        return Status.dont_reply


class Handlers(dict[str, Callable[..., Any]]):
    """RPC handlers by op. One that is missing answers with an error, where a server would answer with nothing."""

    def __missing__(self, op: str) -> Callable[..., Any]:
        def refuse(**kwargs: Any) -> Any:
            problem = f"a federation does not do {op!r} yet, only one site's own scheduler does"
            return error_message(NotImplementedError(problem), status="uncaught-error")

        return refuse


def address_at(site: str, address: str) -> str:
    """Return a worker's address as it is shown across sites: ``fed://site/host:port``."""
    return f"{SCHEME}{site}/{address.split('://', 1)[-1]}"


def selectors_of(workers: Any) -> list[str]:
    """Return the sites or labels that ``fed://`` addresses name."""
    given = [workers] if isinstance(workers, str) else list(workers or ())
    return [name.removeprefix(SCHEME).split("/")[0] for name in given if str(name).startswith(SCHEME)]


def site_info(site: SiteState, held_nbytes: int) -> dict[str, Any]:
    """Return what ``client.sites()`` shows of a site; sizes in bytes."""
    status = site.status
    found: dict[str, Any] = {
        "status": "joining" if status is None else "draining" if site.draining else "running",
        "labels": dict(site.hello.labels),
        "environments": list(site.hello.environments),
        "versions": dict(site.hello.versions),
        "dashboard": site.hello.dashboard,
        "held": held_nbytes,
        "blocks": len(site.blocks),
    }
    names = ("workers", "threads", "memory_limit", "memory_used", "running", "queued")
    return found | {name: getattr(status, name) if status is not None else 0 for name in names}
