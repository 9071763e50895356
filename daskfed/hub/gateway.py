"""RPCs of clients that need the sites: scatter, identity and their like. Results pass unopened."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from distributed.comm.addressing import parse_host_port
from distributed.comm.core import Comm
from distributed.core import Status, error_message

from daskfed.comm.opaque import relays_errors
from daskfed.comm.pacing import Paced
from daskfed.config import is_loopback
from daskfed.errors import UnknownSiteError
from daskfed.hub import events as ev
from daskfed.hub.credentials import may_have_all_of
from daskfed.hub.dispatch import SiteState
from daskfed.hub.fanout import answers_errors
from daskfed.hub.gathering import Gathering
from daskfed.hub.inspection import progress_of
from daskfed.hub.lookups import Roster
from daskfed.hub.observing import Observing
from daskfed.hub.peers import key_holder
from daskfed.hub.replay import Replay
from daskfed.hub.scattering import scatter
from daskfed.hub.states import KeyPhase
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

EXPLAIN_S = 5.0  # for a site to say what it knows of a key


class Gateway:
    """Answers to clients' RPCs."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.observing = Observing(hub)
        self.replay = Replay(hub)
        self.roster = Roster(hub.fanout)
        self.gathering = Gathering(hub)

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        return {
            "identity": self.identity,
            **self.gathering.handlers(),
            "scatter": answers_errors(self.scatter),
            "retry": self.retry,
            "subscribe_worker_status": self.subscribe_worker_status,
            "fed_sites": self.fed_sites,
            "fed_transfers": self.fed_transfers,
            "fed_explain": self.fed_explain,
            "fed_progress": self.fed_progress,
            "fed_cluster": relays_errors(self.fed_cluster),
            "site-address": self.site_address,
            **self.observing.handlers(),
            **self.replay.handlers(),
        }

    def client_gone(self, client: str) -> None:
        """End what goes on at sites for a client that is gone."""
        if self.hub.status is Status.running:
            self.hub._ongoing_background_tasks.call_soon(self.observing.client_gone, client)

    # -- what there is -----------------------------------------------------------------------------------------------

    async def identity(self, n_workers: int = -1) -> dict[str, Any]:
        """Return what a scheduler's ``identity`` returns, for all sites together."""
        workers = await self.roster.workers() if n_workers else {}
        statuses = [site.status for site in self.hub.core.sites.values() if site.status is not None]
        return {
            "type": "Hub",
            "id": self.hub.id,
            "address": self.hub.address,
            "services": self.hub.dashboard.services,
            "started": self.hub.started_at,
            "n_workers": sum(status.workers for status in statuses),
            "total_threads": sum(status.threads for status in statuses),
            "total_memory": sum(status.memory_limit for status in statuses),
            "workers": dict(list(workers.items())[: n_workers if n_workers > 0 else None]),
            "fed": {
                "fixed": self.hub.fixed,
                "sites": sorted(self.hub.core.sites),
                "data": {name: data_info(site) for name, site in self.hub.core.sites.items() if site.hello.data},
                "epoch": self.hub.core.ledger.epoch,
                "dashboard": self.dashboard_link(),
            },
        }

    def dashboard_link(self) -> str:
        """Return the URL of the hub's page; of a hub that has none, of the dashboard of the first site with one."""
        first = next((port.hello.dashboard for port in self.hub.ports.values() if port.hello.dashboard), "")
        return self.hub.dashboard.link or first

    def sites_info(self) -> dict[str, dict[str, Any]]:
        """Return name -> what ``client.sites()`` shows."""
        held: dict[str, int] = defaultdict(int)
        for _, state in self.hub.core.ledger.keys.peeks():
            for site in state.holders:
                held[site] += state.nbytes
        return {name: site_info(site, held[name]) for name, site in self.hub.core.sites.items()}

    async def fed_sites(self) -> dict[str, Any]:
        """Return name -> facts of every site."""
        return self.sites_info()

    async def fed_transfers(self) -> list[tuple[str, str, int, int, float, int]]:
        """Return (from, to, count, bytes, seconds, how many were relayed) for every pair of sites that moved a key."""
        totals = self.hub.core.dispatcher.links.totals
        return [(*pair, t.count, t.nbytes, t.seconds, t.relayed) for pair, t in totals.items()]

    async def fed_explain(self, key: Key) -> dict[str, Any]:
        """Return why a key waits, or where and why it ran; under ``seen_at`` what each site knows of it."""
        ports = {name: port for name, port in self.hub.ports.items() if port.connected}
        asked = [asyncio.wait_for(port.call("explain", key=key), EXPLAIN_S) for port in ports.values()]
        told = zip(ports, await asyncio.gather(*asked, return_exceptions=True), strict=True)
        seen = {name: known for name, known in told if not isinstance(known, BaseException) and is_known(known)}
        return {**self.hub.core.explain(key), "seen_at": seen}

    async def fed_progress(self, keys: Collection[Key]) -> dict[str, dict[str, int]]:
        """Return how many tasks the graph behind ``keys`` has, and how many remain, per key prefix."""
        return progress_of(self.hub.core.ledger, keys)

    async def fed_cluster(self, site: str, method: str, kwargs: Mapping[str, Any]) -> Any:
        """Call ``scale``, ``adapt``, ``logs`` or ``drain`` of a site's cluster.

        Raises PermissionError for all but the hub's own user, UnknownSiteError.
        """
        self.hub.owners.check_rules(f"call {method!r} of the cluster of site {site!r}")
        if site not in self.hub.ports:
            raise UnknownSiteError(f"no site {site!r}; sites are {sorted(self.hub.ports)}")
        return await self.hub.ports[site].call("cluster", method=method, kwargs=dict(kwargs))

    async def site_address(self, comm: Comm | None, site: str, token: str, network: str = "") -> dict[str, Any]:
        """Tell an agent where it may fetch keys of another site; an empty address means: only through the hub.

        So it is where that site serves somebody whom the one which asks does not: the hub sees which keys are whose.
        And where it is on the loopback of another machine: there the one which asks has something else of its own.
        """
        port = self.hub.ports.get(site)
        if port is None or not self.hub.trusts(token):
            return {"status": "error", "reason": f"no site {site!r} is connected, or the caller is no site of the hub"}
        elsewhere = port.hello.network != network and is_on_loopback(port.hello.data_address)
        if elsewhere or not may_have_all_of(key_holder(comm), port.hello.serves):
            return {"status": "OK", "address": "", "door": ""}
        return {"status": "OK", "address": port.hello.data_address, "door": self.hub.door_of(port.hello)}

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

    # -- keys --------------------------------------------------------------------------------------------------------

    async def scatter(self, data: Mapping[Key, Any], workers: Any, client: str, **how: Any) -> list[Key]:
        """Put a client's data at sites; ``how`` as for :func:`daskfed.hub.scattering.scatter`, ``mark`` beside it."""
        await self.hub.sessions.caught_up(client, how.pop("mark", 0))
        there = workers or self.hub.sessions.home_of_stock(client) or None
        return await scatter(self.hub, data, there, client, **how)

    async def retry(self, keys: Collection[Key], client: str) -> list[Key]:
        """Have failed keys made again, with what they failed from and what failed from them; return those of them."""
        known = self.hub.core.ledger.keys
        failed = [key for key in keys if key in known and known[key].phase is KeyPhase.FAILED]
        self.hub.take(ev.KeysRetried(tuple(keys)))
        return [key for key in failed if key in known and known[key].phase is not KeyPhase.FAILED]

    # -- moving ------------------------------------------------------------------------------------------------------

    async def relay_fetch(self, comm: Comm, site: str, keys: Collection[Key], token: str) -> Status:
        """Stream keys of one site to another that cannot reach it, as fast as that one reads."""
        port = self.hub.ports.get(site)
        if port is None or not self.hub.trusts(token):
            await comm.write({"end": True, "error": f"site {site!r} is not connected to the hub"})
            return Status.dont_reply
        await Paced(comm).write_all(port.stream_keys(keys, token))
        return Status.dont_reply


class Handlers(dict[str, Callable[..., Any]]):
    """RPC handlers by op. One that is missing answers with an error, where a server would answer with nothing."""

    def __missing__(self, op: str) -> Callable[..., Any]:
        def refuse(**kwargs: Any) -> Any:
            problem = f"a federation does not do {op!r} yet, only one site's own scheduler does"
            return error_message(NotImplementedError(problem), status="uncaught-error")

        return refuse


def is_on_loopback(address: str) -> bool:
    """Whether only processes of one machine reach an address."""
    scheme, _, rest = address.partition("://")
    return scheme != "inproc" and bool(rest) and is_loopback(parse_host_port(rest, 0)[0])


def is_known(told: Mapping[str, Any]) -> bool:
    """Say whether a site that was asked about a key has something to tell of it."""
    return bool(told["story"] or told["task"])


def site_info(site: SiteState, held_nbytes: int) -> dict[str, Any]:
    """Return what ``client.sites()`` shows of a site; sizes in bytes."""
    status = site.status
    found: dict[str, Any] = {
        "status": _status(site),
        "labels": dict(site.hello.labels),
        "environments": list(site.hello.environments),
        **data_info(site),
        "versions": dict(site.hello.versions),
        "dashboard": site.hello.dashboard,
        "held": held_nbytes,
        "blocks": len(site.blocks),
    }
    names = ("workers", "threads", "memory_limit", "memory_used", "running", "queued")
    return found | {name: getattr(status, name) if status is not None else 0 for name in names}


def data_info(site: SiteState) -> dict[str, Any]:
    """Return which data a site has, as ``client.sites()`` shows it."""
    return {"data": list(site.hello.data), "data_binding": site.hello.data_binding}


def _status(site: SiteState) -> str:
    if site.away:
        return "away"
    return "joining" if site.status is None else "draining" if site.draining else "running"
