"""What of a client acts on workers, where these belong to several sites: the few things that Dask's does otherwise.

Most calls (``run``, ``register_plugin``, ``who_has`` ...) are Dask's own: the hub answers them. Here is what the client
has to know itself: which workers tasks are bound to, which keys its own assembled results consist of, which packages
sites have, and versions.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import distributed
from distributed import versions
from distributed.core import clean_exception
from distributed.objects import WhoHas
from distributed.protocol.pickle import dumps

from daskfed.client.assembly import Assembly
from daskfed.client.graphs import MaterialisedGraph
from daskfed.client.packages import Packages, packed
from daskfed.client.submission import Submission
from daskfed.data.fetch import by_value
from daskfed.errors import ConfigurationError, TransferError
from daskfed.holders import by_key
from daskfed.messages import WORKER_SCHEME, Constraint, Key
from daskfed.site.packages import UploadedPackage, UploadedToScheduler, look_at_site

logger = logging.getLogger(__name__)

PACKAGES_S = 20.0  # for sites to say which packages they have
ASK_TIMES = 3  # that they are asked for packages while one expression is submitted

Sites = Mapping[str, Mapping[str, Any]]
"""Site name -> what ``client.sites()`` shows."""


class ActingClient(distributed.Client):
    """A client whose workers belong to sites; :class:`daskfed.Client` derives from it."""

    scheduler: Any
    loop: Any
    asynchronous: Any
    sync: Any
    _fetch_sites: Any
    futures_of: Any
    _sites: dict[str, dict[str, Any]]
    _packages: Packages
    _fixed_single: bool
    _assemblies: dict[Key, tuple[Assembly, list[Any]]]

    def _in_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop.asyncio_loop
        except RuntimeError:
            return False

    # -- tasks at workers --------------------------------------------------------------------------------------------

    def _check_workers(self, annotations: Mapping[str, Any]) -> None:
        """Raise UnknownWorkerError where ``workers`` of a submission name none, or one of several sites.

        An asynchronous client cannot ask while it submits: there the hub refuses the tasks, which fail with that error.
        With ``allow_other_workers`` they need not exist.
        """
        workers = None if annotations.get("allow_other_workers") else annotations.get("workers")
        if workers and not self._fixed_single and not self.asynchronous and not self._in_loop():
            sites = annotations.get("sites") or ()
            self.sync(self.scheduler.fed_check_workers, workers=_plain(workers), sites=list(sites))

    def _bound(self, constraint: Constraint) -> Constraint:
        """Return a constraint in which workers that are given by their site are sites."""
        return at_sites(constraint, self._sites) if constraint.workers else constraint

    def _bound_graph(self, graph: MaterialisedGraph) -> MaterialisedGraph:
        """Return a graph whose constraints are bound so."""
        changed = {each: self._bound(each) for each in set(graph.constraints.values()) if each.workers}
        if not changed:
            return graph
        return replace(graph, constraints={key: changed.get(each, each) for key, each in graph.constraints.items()})

    def _workers_here(self, workers: Any) -> Any:
        """Return ``workers`` for the only site there is; its name means all of them."""
        return workers if workers is None or not named_sites(_plain(workers), self._sites) else None

    # -- acting on workers and keys ----------------------------------------------------------------------------------

    async def _restart_workers(self, workers: Any, timeout: Any, raise_for_error: bool) -> dict[Any, str]:
        if isinstance(workers, str | int):
            workers = [workers]
        meant = await self.scheduler.fed_workers(workers=_plain(workers))
        addresses = list(dict.fromkeys(address for found in meant for address in found))
        out: dict[Any, str] = await super()._restart_workers(addresses, timeout, raise_for_error)
        named = {worker: found[0] for worker, found in zip(workers, meant, strict=True) if len(found) == 1}
        rest = set(addresses) - set(named.values())
        return {worker: out[address] for worker, address in named.items()} | {each: out[each] for each in rest}

    async def _replicate(self, futures: Any, n: int | None = None, workers: Any = None, **how: Any) -> None:
        await super()._replicate(self._parts(futures), n=n, workers=workers, **how)

    async def _rebalance(self, futures: Any = None, workers: Any = None) -> None:
        await super()._rebalance(None if futures is None else self._parts(futures), workers)

    def who_has(self, futures: Any = None, **how: Any) -> Any:
        """Return key -> workers that hold it; as ``distributed.Client.who_has``."""
        keys = None if futures is None else list({future.key for future in self.futures_of(futures)})
        return self.sync(self._who_has, keys, **how)

    async def _who_has(self, keys: list[Key] | None, **how: Any) -> WhoHas:
        return WhoHas(by_key(await self.scheduler.fed_holders(keys=keys, **how)))

    def call_stack(self, futures: Any = None, keys: Any = None) -> Any:
        """Return worker -> key -> where in its code it is now; as ``distributed.Client.call_stack``."""
        parts = None if futures is None else self._parts(futures)
        return super().call_stack(parts, [part for key in keys for part in self._part_keys(key)] if keys else None)

    def _parts(self, futures: Any) -> list[Any]:
        """Return the futures that workers hold: for a result that this client assembles, those of its parts."""
        found = self.futures_of(futures)
        return [part for future in found for part in self._assemblies.get(future.key, (None, [future]))[1]]

    def _part_keys(self, key: Key) -> Iterable[Key]:
        return self._assemblies[key][0].inputs if key in self._assemblies else (key,)

    def _handle_restart(self) -> None:
        self._assemblies.clear()
        super()._handle_restart()

    # -- packages ----------------------------------------------------------------------------------------------------

    def _place_by_packages(self, submission: Submission, asked: int) -> None:
        may_ask = asked < ASK_TIMES and not self.asynchronous and not self._in_loop()
        if unknown := self._packages.place(submission, self._sites, may_ask, asked):
            self.loop.add_callback(self._ask_for_packages, unknown)

    async def _ask_for_packages(self, packages: set[str]) -> None:
        """Ask the sites which of these packages they have; those that do not answer are taken to have them."""
        if not self._sites:
            await self._fetch_sites()
        ready = tuple(self._packages.sites)
        call = {"function": dumps(look_at_site), "args": dumps((self._packages.question(packages),))}
        try:
            asked = self.scheduler.run_function(**call, kwargs=dumps({}), wait=True, connected=True)
            reply = await asyncio.wait_for(asked, PACKAGES_S)
        except Exception as exc:  # the hub, or any error of a site: work goes on as if nobody had asked
            logger.info("sites could not be asked for packages: %s", exc)
            reply = {}
        told = reply.get("result", {})
        if not isinstance(told, dict):  # of the only site
            told = dict.fromkeys(self._sites, told)
        self._packages.learn(packages, {site: dict(answer) for site, answer in told.items()}, ready)

    def upload_package(self, module: ModuleType | str) -> Any:
        """Send a package of this machine, or a module that is a file, to all sites; return worker -> what it said.

        ``module`` is it, or its name. All its files are sent, also data files. Sites and workers that join later have
        it too. Sent again, it takes the place of what was sent before; tasks that run already keep that.

        Raises ConfigurationError where there is no such package in files, or where it is larger than 64 MiB.
        """
        return self.sync(self._upload_package, packed(module))

    async def _upload_package(self, package: UploadedPackage) -> dict[str, Any]:
        call = {"name": package.name, "idempotent": False}
        replies: dict[str, Any] = await self.scheduler.register_worker_plugin(plugin=by_value(package), **call)
        for reply in replies.values():
            if reply["status"] == "error":
                _, exc, traceback = clean_exception(reply["exception"], reply["traceback"])
                raise (exc or TransferError(f"{package.package} could not be sent")).with_traceback(traceback)
        await self.scheduler.register_scheduler_plugin(plugin=dumps(UploadedToScheduler(package)), **call)
        self._packages.forget(package.package)
        return replies

    async def _register_worker_plugin(self, *args: Any, **kwargs: Any) -> Any:
        found = await super()._register_worker_plugin(*args, **kwargs)
        self._packages.forget_missing()  # it may have brought some
        return found

    # -- versions ----------------------------------------------------------------------------------------------------

    async def _get_versions(self, check: bool = False, packages: Sequence[str] | None = None) -> dict[str, Any]:
        """Return versions of ``client``, ``scheduler`` and ``workers``; with several sites, of schedulers by site."""
        if self._fixed_single:
            found: dict[str, Any] = await super()._get_versions(check=check, packages=packages)
            return found
        names = list(packages or ())
        mine = versions.get_versions(packages=names)
        schedulers = await self.scheduler.fed_versions(packages=names)
        message = {"op": "versions", "packages": names}
        workers = await self.scheduler.broadcast(msg=message, on_error="ignore")
        if check:
            _report(mismatches(schedulers, workers, mine))
        only = next(iter(schedulers.values())) if len(schedulers) == 1 else schedulers
        return {"scheduler": only, "workers": workers, "client": mine}


def _plain(workers: Any) -> list[Any]:
    """Return what ``workers=`` was given as a list that can be sent."""
    return [workers] if isinstance(workers, str | int | float) else list(workers)


def names_of(sites: Sites) -> set[str]:
    """Return what sites may be called: their names, and their labels as ``name=value``."""
    return set(sites) | {f"{name}={value}" for facts in sites.values() for name, value in facts["labels"].items()}


def named_sites(workers: Iterable[Any], sites: Sites) -> list[str]:
    """Return those of ``workers`` that name a site or a label, without ``fed://``."""
    known = names_of(sites)
    bare = (str(worker).removeprefix(WORKER_SCHEME) for worker in workers)
    return [name for name in bare if name in known]


def at_sites(constraint: Constraint, sites: Sites) -> Constraint:
    """Return a constraint whose workers, where they name sites, are its sites instead.

    Raises ConfigurationError where both are named: a task runs either anywhere at some sites, or at some workers.
    """
    named = named_sites(constraint.workers, sites)
    if not named:
        return constraint
    if len(named) < len(constraint.workers):
        raise ConfigurationError(f"workers={list(constraint.workers)} names sites and workers: name one or the other")
    where = constraint.sites if constraint.allow_other_workers else tuple(dict.fromkeys(named))
    return replace(constraint, sites=where, workers=(), allow_other_workers=False)


# -- versions at several sites ---------------------------------------------------------------------------------------


def mismatches(schedulers: Mapping[str, Any], workers: Mapping[str, Any], client: Any) -> list[tuple[str, str, str]]:
    """Return (site, warning, error) of each site where versions differ; ``workers`` by their ``fed://`` addresses."""
    found = []
    for site, scheduler in sorted(schedulers.items()):
        there = {address: said for address, said in workers.items() if _site_of(address, schedulers) == site}
        said = versions.error_message(scheduler, there, client)
        if said["warning"] or said["error"]:
            found.append((site, str(said["warning"]), str(said["error"])))
    return found


def _site_of(address: str, sites: Collection[str]) -> str:
    if not address.startswith(WORKER_SCHEME):
        return next(iter(sites))  # there is only one
    return address.removeprefix(WORKER_SCHEME).split("/")[0]


def _report(found: Iterable[tuple[str, str, str]]) -> None:
    errors = []
    for site, warning, error in found:
        if warning:
            warnings.warn(f"At site {site!r}: {warning}", stacklevel=2)
        if error:
            errors.append(f"At site {site!r}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
