"""What clients ask of workers and schedulers, asked of all sites that it concerns and merged into one answer.

Each handler is an RPC of Dask's scheduler, by the same name and with the same arguments, so that a stock client finds
it too. Workers are named as in :mod:`daskfed.hub.addresses`, and shown by the addresses that are theirs across sites.
Functions and what they return, and the errors of both, pass unopened.

A site that is gone is left out of the answer, as workers that are gone are in Dask; a worker that was named is answered
for: the call to it has failed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from dask.utils import key_split
from distributed.core import error_message

from daskfed.comm.opaque import OpaqueError
from daskfed.errors import ConfigurationError, DaskfedError, SiteLostError, UnknownSiteError, UnknownWorkerError
from daskfed.holders import Holders, by_key, of_all
from daskfed.hub import events as ev
from daskfed.hub.addresses import (
    Targets,
    Worker,
    address_at,
    fill,
    listed,
    resolve,
    sites_named,
    take_from_largest,
    workers_of,
)
from daskfed.hub.inspection import running_at
from daskfed.hub.ports import answers
from daskfed.hub.states import KeyPhase
from daskfed.messages import BlockSpec, Key, SiteHello

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

logger = logging.getLogger(__name__)

POLL_S = 0.02
REMEMBERED_S = 1.0  # how long the names of workers are remembered while tasks are submitted that use them
COPY_TRIES = 3  # of a key that is to be brought to a site
NUMBERS = ("n", "target", "minimum")  # of workers, which are shared out over the sites


def answers_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an RPC handler: what it raises since its caller was wrong is its reply, and no news for a log."""

    @functools.wraps(handler)
    async def answering(*args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(*args, **kwargs)
        except OpaqueError as exc:
            return exc.reply()
        except (DaskfedError, PermissionError, ValueError, TypeError) as exc:
            return error_message(exc, status="uncaught-error")

    return answering


class Fanout:
    """Answers that need the schedulers or workers of several sites."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._remembered: list[Worker] = []  # all workers, as they were
        self._remembered_at = -inf  # then, in seconds of the monotonic clock

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        own: dict[str, Callable[..., Any]] = {
            "fed_workers": self.fed_workers,
            "fed_check_workers": self.fed_check_workers,
            "logs": self.logs,
            "get_logs": self.logs,
            "run_function": self.run_function,
            "versions": self.versions,
            "fed_versions": self.fed_versions,
            "amm_handler": self.amm_handler,
        }
        of_workers: dict[str, Callable[..., Any]] = {
            "broadcast": self.broadcast,
            "ncores": self._by_worker("ncores"),
            "ncores_running": self._by_worker("ncores_running"),
            "processing": self._by_worker("processing"),
            "has_what": self.has_what,
            "worker_logs": self._by_worker("worker_logs"),
            "restart": self.restart,
            "restart_workers": self.restart_workers,
            "retire_workers": self.retire_workers,
        }
        of_keys: dict[str, Callable[..., Any]] = {
            "who_has": self.who_has,
            "fed_holders": self.holders,
            "nbytes": self.nbytes,
            "call_stack": self.call_stack,
            "replicate": self.replicate,
            "rebalance": self.rebalance,
        }
        return {op: answers_errors(handler) for op, handler in (own | of_workers | of_keys).items()}

    # -- asking ------------------------------------------------------------------------------------------------------

    async def ask(
        self, op: str, per_site: Mapping[str, Mapping[str, Any]], keep_errors: bool = False
    ) -> dict[str, Any]:
        """Call an op of the schedulers of several sites, site -> keywords; a site that is gone is left out.

        Raises OpaqueError where a scheduler raised; with ``keep_errors`` that is its reply.
        """
        ports = {site: port for site in per_site if (port := self.hub.ports.get(site)) is not None}
        calls = {s: port.call("scheduler_rpc", scheduler_op=op, kwargs=dict(per_site[s])) for s, port in ports.items()}
        return await answers(calls, (OpaqueError,) if keep_errors else ())

    def everywhere(self, **kwargs: Any) -> dict[str, dict[str, Any]]:
        """Return the same keywords for every site that is connected."""
        return {site: kwargs for site, port in self.hub.ports.items() if port.connected}

    async def ask_all(self, op: str, **kwargs: Any) -> dict[str, Any]:
        """Call an op of the scheduler of every site with the same keywords."""
        return await self.ask(op, dict.fromkeys(self.hub.ports, kwargs))

    def shown(self, site: str, worker: str) -> str:
        """Return a worker's address as clients see it: plain where there is and will be one site, as in stock Dask."""
        return worker if self.alone else address_at(site, worker)

    @property
    def alone(self) -> bool:
        """Whether there is one site and there will be no other: then its answers are given as they are."""
        return self.hub.fixed and len(self.hub.ports) == 1

    def merged(self, replies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return worker as shown -> what was said of it, of several sites."""
        return {self.shown(site, worker): said for site, reply in replies.items() for worker, said in reply.items()}

    def _by_worker(self, op: str) -> Callable[..., Any]:
        """Return a handler of an op that takes ``workers`` and answers with a dict by worker."""

        async def serve(workers: Any = None, **kwargs: Any) -> dict[str, Any]:
            targets = await self.targets(workers)
            return self.merged(await self.ask(op, {s: {**kwargs, "workers": w} for s, w in targets.items()}))

        return serve

    # -- workers -----------------------------------------------------------------------------------------------------

    async def workers(self, sites: Collection[str] | None = None) -> list[Worker]:
        """Return all workers, or those of some sites."""
        asked = self.hub.ports if sites is None else sites
        replies = await self.ask("identity", dict.fromkeys(asked, {"n_workers": -1}))
        return [worker for site, reply in replies.items() for worker in workers_of(site, reply)]

    async def targets(self, workers: Any = None, sites: Collection[str] = ()) -> Targets:
        """Return which workers of which sites are meant; raises UnknownWorkerError.

        ``sites`` are names and labels of sites to which workers must belong. None means all workers. Where there is one
        site only, its scheduler gets to see also what no worker is called: it does as it would without a hub.
        """
        hellos = self._hellos(sites)
        names = [hello.site for hello in hellos]
        if workers is None:
            return dict.fromkeys(names)
        selectors = listed(workers)
        known = [] if all(sites_named(each, hellos) for each in selectors) else await self.workers(names)
        try:
            return resolve(selectors, known, hellos)
        except UnknownWorkerError:
            if not self.alone:
                raise
            return {names[0]: [_address(each, known) for each in selectors]}

    def _hellos(self, sites: Collection[str]) -> list[SiteHello]:
        """Return what sites said of themselves: all, or those that these names and labels select."""
        hellos = [port.hello for port in self.hub.ports.values()]
        if not sites:
            return hellos
        allowed = {name for selector in sites for name in sites_named(selector, hellos)}
        return [hello for hello in hellos if hello.site in allowed]

    async def fed_workers(self, workers: Any, sites: Collection[str] = ()) -> list[list[str]]:
        """Return, for each of ``workers``, the addresses of the workers that it means; raises as :meth:`targets`."""
        found: list[list[str]] = []
        for selector in listed(workers):
            targets = await self.targets([selector], sites)
            everybody = [site for site, there in targets.items() if there is None]
            there = [self.shown(worker.site, worker.address) for worker in await self.workers(everybody)]
            named = [self.shown(site, each) for site, some in targets.items() for each in some or ()]
            found.append([*there, *named])
        return found

    async def fed_check_workers(self, workers: Any, sites: Collection[str] = ()) -> None:
        """Raise where ``workers`` of tasks name what :meth:`targets` does not find."""
        await self._remembered_targets(workers, sites)

    async def bound(self, blocks: Iterable[BlockSpec]) -> tuple[tuple[BlockSpec, ...], tuple[tuple[str, str], ...]]:
        """Return blocks with the sites of the workers that they name, and (block, why) where there are none such."""
        found, refused = [], []
        for block in blocks:
            constraint = block.constraint
            if constraint.workers and not constraint.allow_other_workers:
                try:
                    sites = await self._remembered_targets(constraint.workers, constraint.sites)
                    block = replace(block, constraint=replace(constraint, sites=tuple(sites)))
                except ConfigurationError as exc:
                    refused.append((block.id, str(exc)))
            found.append(block)
        return tuple(found), tuple(refused)

    async def _remembered_targets(self, workers: Any, sites: Collection[str]) -> Targets:
        """Return what workers are meant, from what was known a moment ago where that is enough."""
        age_s = time.monotonic() - self._remembered_at
        if age_s < REMEMBERED_S:
            hellos = self._hellos(sites)
            names = {hello.site for hello in hellos}
            with suppress(ConfigurationError):
                return resolve(listed(workers), [each for each in self._remembered if each.site in names], hellos)
        self._remembered, self._remembered_at = await self.workers(), time.monotonic()
        return await self.targets(workers, sites)

    async def broadcast(
        self, msg: Mapping[str, Any], workers: Any = None, on_error: str = "raise", **kwargs: Any
    ) -> dict[str, Any]:
        """Send a message to workers, or nannies, and return worker -> reply; as of Dask's scheduler."""
        targets = await self.targets(workers)
        asked = {site: {"msg": msg, "workers": w, "on_error": on_error, **kwargs} for site, w in targets.items()}
        replies = await self.ask("broadcast", asked)
        lost = {site: there for site, there in targets.items() if site not in replies and there}
        return self.merged(replies) | self._lost_workers(lost, on_error)

    def _lost_workers(self, lost: Mapping[str, list[str]], on_error: str) -> dict[str, Any]:
        """Return what a caller hears of workers that were named and whose site is gone; raises SiteLostError."""
        if not lost or on_error == "ignore":
            return {}
        error = SiteLostError(f"the site {next(iter(lost))!r} is gone, and its workers with it")
        if on_error != "return_pickle":
            raise error
        return dict.fromkeys((self.shown(s, w) for s, there in lost.items() for w in there), pickle.dumps(error))

    async def restart(self, **how: Any) -> None:
        """Forget all keys of all clients, and restart all workers; ``how`` as for Dask's scheduler."""
        for session in self.hub.sessions.sessions.values():  # first: a client keeps copies while it has futures
            session.send({"op": "restart"})
        for holder, keys in list(self.hub.core.ledger.wants.items()):
            self._forget_wants(holder, tuple(keys))
        await self.ask_all("restart", **how)

    def _forget_wants(self, holder: str, keys: tuple[Key, ...]) -> None:
        if holder in self.hub.sessions.sessions:
            self.hub.take(ev.KeysReleased(holder, keys))
        else:
            self.hub.coordination.let_go(keys, holder)

    async def restart_workers(self, workers: Any = None, **how: Any) -> dict[str, str]:
        """Restart workers and return worker -> ``OK``, ``removed`` or ``timed out``."""
        targets = await self.targets(workers)
        replies = await self.ask("restart_workers", {s: {**how, "workers": w} for s, w in targets.items()})
        lost = {site: dict.fromkeys(there or (), "removed") for site, there in targets.items() if site not in replies}
        return self.merged(replies | lost)

    async def retire_workers(self, workers: Any = None, names: Any = None, **how: Any) -> dict[str, Any]:
        """Retire workers, whose keys go to other workers of their sites, and return worker -> facts.

        A number of workers (``n``, ``target``, ``minimum``) is one of all sites together; those that have most workers
        give them up.
        """
        if workers is not None and names is not None:
            raise TypeError("names and workers are mutually exclusive")
        if workers is None and names is None:
            return self.merged(await self.ask("retire_workers", await self._shared_out(how)))
        targets = await self.targets(workers if names is None else names)
        everybody = [site for site, there in targets.items() if there is None]
        for worker in await self.workers(everybody):
            targets[worker.site] = [*(targets[worker.site] or ()), worker.address]
        asked = {site: {**how, "workers": there or []} for site, there in targets.items()}
        return self.merged(await self.ask("retire_workers", asked))

    async def _shared_out(self, how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return site -> keywords of ``retire_workers`` where numbers of workers are shared out."""
        rest = {name: value for name, value in how.items() if name not in NUMBERS}
        numbers = {name: int(how[name]) for name in NUMBERS if how.get(name) is not None}
        sizes = dict.fromkeys(self.hub.ports, 0)
        for worker in await self.workers() if numbers else ():
            sizes[worker.site] += 1
        asked: dict[str, dict[str, Any]] = {site: dict(rest) for site in sizes}
        for name, number in numbers.items():
            leaving = take_from_largest(number if name == "n" else max(0, sum(sizes.values()) - number), sizes)
            for site, kwargs in asked.items():
                gone = leaving.get(site, 0)
                kwargs[name] = gone if name == "n" else sizes[site] - gone
        return asked

    # -- schedulers --------------------------------------------------------------------------------------------------

    async def run_function(self, connected: bool = False, **call: Any) -> dict[str, Any]:
        """Run a pickled function at the scheduler of every site; its value, or where there are several sites, by site.

        With ``connected`` sites that are away are left out, and not waited for. Where it fails at a site, the reply is
        its error there. Raises UnknownSiteError where there is no site.
        """
        several = len(self.hub.ports) > 1
        asked = self.everywhere(**call) if connected else dict.fromkeys(self.hub.ports, call)
        replies = await self.ask("run_function", asked)
        if not replies:
            raise UnknownSiteError("no site is connected, and the hub itself runs nothing: wait until one has joined")
        failed = next((reply for reply in replies.values() if reply["status"] != "OK"), None)
        if failed is not None:
            return dict(failed)
        if several:
            return {"status": "OK", "result": {site: reply["result"] for site, reply in replies.items()}}
        (reply,) = replies.values()
        return dict(reply)

    async def fed_versions(self, packages: Collection[str] = ()) -> dict[str, Any]:
        """Return site -> versions of what its scheduler runs on."""
        return await self.ask_all("versions", packages=list(packages))

    async def versions(self, packages: Collection[str] = ()) -> dict[str, Any]:
        """Return the versions of a scheduler: where there are several sites, of the first by name."""
        replies = await self.fed_versions(packages)
        return dict(replies[min(replies)]) if replies else {}

    async def logs(self, n: int | None = None) -> list[tuple[str, str]]:
        """Return (level, line) of what schedulers logged; where there are several, each line begins with its site."""
        replies = await self.ask_all("logs", n=n)
        if self.alone:
            return [(level, line) for reply in replies.values() for level, line in reply]
        return [(level, f"{site}: {line}") for site in sorted(replies) for level, line in replies[site]]

    async def amm_handler(self, method: str) -> bool | None:
        """Start, stop or run the active memory managers of all sites, or say whether all of them run."""
        replies = await self.ask_all("amm_handler", method=method)
        return all(replies.values()) if method == "running" else None

    # -- keys --------------------------------------------------------------------------------------------------------

    async def who_has(self, keys: Collection[Key] | None = None) -> dict[Key, tuple[str, ...]]:
        """Return key -> workers that hold it; of all keys of the caller, where none are named."""
        return by_key(await self.holders(keys))

    async def holders(self, keys: Collection[Key] | None = None) -> Holders:
        """Return the same by groups of keys, which is shorter."""
        if self._sees_all(keys):
            return list(*(await self.ask_all("fed-holders", keys=keys)).values())
        asked = self.hub.owners.readable() if keys is None else list(keys)
        if keys is None and len(asked) == len(self.hub.core.ledger.keys):
            replies = await self.ask_all("fed-holders", keys=None)
        else:
            replies = await self.ask("fed-holders", {site: {"keys": there} for site, there in self._at(asked).items()})
        told = ((site, *group) for site, reply in replies.items() for group in reply)
        return of_all((([self.shown(site, each) for each in workers], there) for site, workers, there in told), asked)

    async def has_what(self, workers: Any = None) -> dict[str, list[Key]]:
        """Return worker -> keys that it holds and that the caller may see."""
        held: dict[str, list[Key]] = await self._by_worker("has_what")(workers)
        if theirs := self.hub.owners.hidden():
            return {worker: [key for key in keys if key not in theirs] for worker, keys in held.items()}
        return held

    def _sees_all(self, keys: Collection[Key] | None) -> bool:
        """Whether the one site's own answer is the hub's: it may also know keys that the hub does not."""
        return self.alone and (keys is not None or not self.hub.owners.hidden())

    def _at(self, keys: Iterable[Key]) -> dict[str, list[Key]]:
        """Return site -> which of ``keys`` it holds."""
        by_site: dict[str, list[Key]] = defaultdict(list)
        for key, sites in self._holders(keys).items():
            for site in sites:
                by_site[site].append(key)
        return by_site

    async def nbytes(self, keys: Collection[Key] | None = None, summary: bool = True) -> dict[Any, int]:
        """Return key -> bytes of what is in memory; or with ``summary`` key prefix -> bytes."""
        if self._sees_all(keys):
            return dict(*(await self.ask_all("nbytes", keys=keys, summary=summary)).values())
        known = self.hub.core.ledger.keys
        totals: dict[Any, int] = defaultdict(int)
        for key in self.hub.owners.readable() if keys is None else keys:
            if (state := known.peek(key)) is not None and state.phase is KeyPhase.HELD:
                totals[key_split(key) if summary else key] += state.nbytes
        return dict(totals)

    async def call_stack(self, keys: Collection[Key] | None = None) -> dict[str, Any]:
        """Return worker -> key -> where in its code it is now; of all tasks, or of those that ``keys`` wait for."""
        if keys is None:
            return self.merged(await self.ask_all("call_stack"))
        running = running_at(self.hub.core.ledger, keys)
        states = await self.ask("get_task_status", {site: {"keys": there} for site, there in running.items()})
        known = {site: [key for key, state in reply.items() if state is not None] for site, reply in states.items()}
        return self.merged(await self.ask("call_stack", {s: {"keys": there} for s, there in known.items() if there}))

    async def rebalance(self, keys: Collection[Key] | None = None, workers: Any = None) -> dict[str, Any]:
        """Even out memory among the workers of each site; nothing crosses from one site to another."""
        targets = await self.targets(workers)
        asked: dict[str, dict[str, Any]] = {site: {"workers": there} for site, there in targets.items()}
        if keys is not None:
            holders = self._holders(keys)
            if absent := [key for key in keys if not holders[key]]:
                return {"status": "partial-fail", "keys": absent}
            for site, kwargs in asked.items():
                kwargs["keys"] = [key for key in keys if site in holders[key]]
        replies = await self.ask("rebalance", asked)
        failed = [key for reply in replies.values() for key in reply.get("keys", ())]
        return {"status": "partial-fail", "keys": failed} if failed else {"status": "OK"}

    def _holders(self, keys: Iterable[Key]) -> dict[Key, tuple[str, ...]]:
        known = self.hub.core.ledger.keys
        return {key: tuple(state.holders) if (state := known.peek(key)) is not None else () for key in keys}

    async def replicate(
        self, keys: Collection[Key], n: int | None = None, workers: Any = None, **how: Any
    ) -> dict[str, Any] | None:
        """Have ``n`` workers, or all of them, hold each key: those of the sites that have it first, then others."""
        sizes = await self._running(await self.targets(workers))
        holders = self._holders(keys)
        if absent := [key for key in keys if not holders[key]]:
            return {"status": "partial-fail", "keys": absent}
        count = sum(map(len, sizes.values())) if n is None else n
        if count < 1 or not any(sizes.values()):
            raise ValueError("Can not use replicate to delete data")
        plan: dict[str, dict[int, list[Key]]] = defaultdict(lambda: defaultdict(list))  # site -> copies there -> keys
        for key in keys:
            order = sorted(sizes, key=lambda site: (site not in holders[key], site))
            for site, share in fill(count, {site: len(sizes[site]) for site in order}).items():
                plan[site][share].append(key)
        await asyncio.gather(*(self._replicate_at(site, plan[site], sizes[site], how) for site in plan))
        return None

    async def _running(self, targets: Targets) -> dict[str, list[str]]:
        replies = await self.ask("ncores_running", {site: {"workers": there} for site, there in targets.items()})
        return {site: list(reply) for site, reply in replies.items()}

    async def _replicate_at(
        self, site: str, plan: Mapping[int, list[Key]], workers: list[str], how: Mapping[str, Any]
    ) -> None:
        await self._bring([key for keys in plan.values() for key in keys], site)
        for share, keys in plan.items():
            await self.ask("replicate", {site: {**how, "keys": keys, "n": share, "workers": workers}})

    async def _bring(self, keys: Collection[Key], site: str) -> None:
        """Have a site hold keys as well; returns when it does, or when a key cannot be had."""
        known = self.hub.core.ledger.keys
        for _ in range(COPY_TRIES):
            lacking = [key for key in keys if (state := known.peek(key)) is not None and site not in state.holders]
            if not lacking:
                return
            self.hub.take(ev.KeysNeeded(site, tuple(lacking)))
            while any(key in known and site in known[key].importing for key in lacking):
                await asyncio.sleep(POLL_S)
        logger.warning("could not bring %d keys to site %s, first %r", len(lacking), site, lacking[0])


def _address(selector: str, workers: Iterable[Worker]) -> str:
    """Return the address of the worker of that name in a federation of one site, else the name as it is."""
    return next((worker.address for worker in workers if selector in (worker.name, worker.address)), selector)
