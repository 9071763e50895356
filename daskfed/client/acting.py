"""What of a client acts on workers, where these belong to several sites: the few things that Dask's does otherwise.

Most calls (``run``, ``register_plugin``, ``who_has`` ...) are Dask's own: the hub answers them. Here is what the client
has to know itself: which workers tasks are bound to, which keys its own assembled results consist of, and versions.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import distributed
from distributed import versions

from daskfed.client.assembly import Assembly
from daskfed.client.graphs import MaterialisedGraph
from daskfed.errors import ConfigurationError
from daskfed.messages import WORKER_SCHEME, Constraint, Key

Sites = Mapping[str, Mapping[str, Any]]
"""Site name -> what ``client.sites()`` shows."""


class ActingClient(distributed.Client):
    """A client whose workers belong to sites; :class:`daskfed.Client` derives from it."""

    scheduler: Any
    loop: Any
    asynchronous: Any
    sync: Any
    futures_of: Any
    _sites: dict[str, dict[str, Any]]
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
