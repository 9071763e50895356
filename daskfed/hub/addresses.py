"""Which workers a user means: the names that ``workers=`` takes, and those that workers are shown by. Pure.

The address of a worker is its own only within its site: private networks repeat each other. Across sites it is shown as
``fed://site/host:port``; where there is and will be one site only, plain, as in stock Dask. A worker may be named by::

    fed://north/10.0.0.3:41234    its address across sites
    north, fed://north, disk=fast a site or a label: every worker there
    tcp://10.0.0.3:41234          its plain address, with or without ``tcp://``, where one site has such a worker
    alice, 0                      its name, where one site has such a worker
    10.0.0.3                      its host: all workers of that host, where one site has such a host
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from daskfed.errors import UnknownSiteError, UnknownWorkerError
from daskfed.hub.dispatch import matches
from daskfed.messages import WORKER_SCHEME, SiteHello

MOST_LISTED = 8  # workers that an error names

Targets: TypeAlias = dict[str, list[str] | None]
"""Site -> addresses of workers there, as the site's own scheduler knows them; None for all of them."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of a site, as far as names go."""

    site: str
    address: str  # as the site's own scheduler knows it
    name: str
    host: str

    @property
    def shown(self) -> str:
        """Its address across sites."""
        return address_at(self.site, self.address)


def address_at(site: str, address: str) -> str:
    """Return a worker's address as it is shown across sites: ``fed://site/host:port``."""
    return f"{WORKER_SCHEME}{site}/{_bare(address)}"


def workers_of(site: str, identity: Mapping[str, Any]) -> list[Worker]:
    """Return the workers in what the scheduler of a site says of itself."""
    known = identity["workers"].items()
    return [Worker(site, address, str(info["name"]), str(info["host"])) for address, info in known]


def listed(workers: Any) -> list[str]:
    """Return what ``workers=`` was given as a list: one, or several, each as text; ``(host, port)`` as an address."""
    given = [workers] if isinstance(workers, str | int | float) else list(workers)
    return [f"{each[0]}:{each[1]}" if isinstance(each, tuple | list) else str(each) for each in given]


def sites_named(selector: str, hellos: Iterable[SiteHello]) -> list[str]:
    """Return the sites whose name or label ``selector`` is, also behind ``fed://``."""
    return [hello.site for hello in hellos if matches(hello, selector.removeprefix(WORKER_SCHEME))]


def resolve(selectors: Collection[str], workers: Collection[Worker], hellos: Collection[SiteHello]) -> Targets:
    """Return the workers that ``selectors`` name, by site.

    Raises UnknownWorkerError, naming the candidates, where there is no such worker, or several sites have one, and
    UnknownSiteError.
    """
    targets: Targets = {}
    for selector in selectors:
        if sites := sites_named(selector, hellos):
            targets.update(dict.fromkeys(sites))
            continue
        if selector.startswith(WORKER_SCHEME) and "/" not in (name := selector.removeprefix(WORKER_SCHEME)):
            there_are = ", ".join(sorted(hello.site for hello in hellos)) or "none so far"
            raise UnknownSiteError(f"no site matches {name!r}; sites are {there_are}")
        for worker in found(selector, workers):
            there = targets.setdefault(worker.site, [])
            if there is not None and worker.address not in there:
                there.append(worker.address)
    return targets


def found(selector: str, workers: Collection[Worker]) -> list[Worker]:
    """Return the workers of one site that ``selector`` names; raises UnknownWorkerError."""
    for what, meaning in _MEANINGS:
        named = [worker for worker in workers if meaning(worker, selector)]
        if len({worker.site for worker in named}) > 1:
            problem = f"{what} {selector!r} is at several sites: name one of {_candidates(named)}"
            raise UnknownWorkerError(problem)
        if named:
            return named
    raise UnknownWorkerError(f"no worker {selector!r}; there are {_candidates(workers)}, or name a site")


_MEANINGS: tuple[tuple[str, Callable[[Worker, str], bool]], ...] = (
    ("a worker", lambda worker, selector: worker.shown == selector),
    ("a worker", lambda worker, selector: worker.address == selector),
    ("a worker", lambda worker, selector: _bare(worker.address) == selector),
    ("a worker named", lambda worker, selector: worker.name == selector),
    ("a host", lambda worker, selector: worker.host == selector),
)


def _bare(address: str) -> str:
    return address.split("://", 1)[-1]


def _candidates(workers: Collection[Worker]) -> str:
    shown = sorted(worker.shown for worker in workers)
    more = f" and {len(shown) - MOST_LISTED} more" if len(shown) > MOST_LISTED else ""
    return (", ".join(shown[:MOST_LISTED]) or "none so far") + more


# -- numbers of workers, shared out over sites -----------------------------------------------------------------------


def fill(count: int, room: Mapping[str, int]) -> dict[str, int]:
    """Return how many of ``count`` things each site gets that fills the sites up in order, site -> at least 1."""
    shares = {}
    for site, most in room.items():
        if (share := min(count, most)) > 0:
            shares[site] = share
        count -= share
    return shares


def take_from_largest(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return how many of ``count`` workers each site gives up, when the one that has most left gives the next."""
    left = dict(sorted(sizes.items()))
    for _ in range(min(count, sum(left.values()))):
        left[max(left, key=lambda site: left[site])] -= 1
    return {site: sizes[site] - rest for site, rest in left.items() if rest < sizes[site]}
