"""Clients put data at sites: at one, or with ``broadcast`` at every one that may take it. Values stay unopened."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from daskfed.errors import UnknownSiteError
from daskfed.hub import events as ev
from daskfed.hub.dispatch import SiteState, matches
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

SCATTER_POLL_S = 0.05
_numbers = itertools.count()

Share: TypeAlias = tuple[SiteState, bool | int]
"""A site, and on how many of its workers the data is to be: False for one of them, True for all."""


async def scatter(
    hub: Hub,
    data: Mapping[Key, Any],
    selectors: Collection[str],
    client: str,
    broadcast: bool | int = False,
    timeout: float = 30,
    kept: bool = False,
    again: bool = False,
    replicas: int = 1,
) -> list[Key]:
    """Put a client's data at a site; raises TimeoutError if none can take it, UnknownSiteError for a wrong name.

    ``selectors`` are sites or labels. ``broadcast`` puts it on all workers of all sites that they allow, or on that
    many workers. ``kept``, ``again`` and ``replicas`` as for :class:`~daskfed.hub.events.KeysScattered`.
    """
    deadline = time.monotonic() + (timeout or 0)
    sent: dict[str, Any] = {}
    with _held(hub, data):
        while not sent:  # sites may be gone: then others take the data
            sent = await _send(hub, data, shares(await _takers(hub, selectors, deadline), broadcast))
        for site, reply in sent.items():
            sizes = tuple((key, reply["nbytes"].get(key, 0)) for key in data)
            hub.take(ev.KeysScattered(client, site, sizes, kept, again, max(replicas, len(sent))))
    return list(data)


@contextmanager
def _held(hub: Hub, keys: Iterable[Key]) -> Iterator[None]:
    """See to it that no site is told to release keys while they are being scattered anew."""
    known = tuple(key for key in keys if key in hub.core.ledger.keys)
    holder = f"scatter-{next(_numbers)}"
    hub.take(ev.KeysDesired(holder, known))
    try:
        yield
    finally:
        hub.take(ev.KeysReleased(holder, known))


async def _send(hub: Hub, data: Mapping[Key, Any], to: Collection[Share]) -> dict[str, Any]:
    """Send data to sites and return the replies of those that took it; raises what one that is there raised."""
    calls = [hub.ports[site.name].call("scatter_keys", data=dict(data), broadcast=copies) for site, copies in to]
    replies = await asyncio.gather(*calls, return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, OSError):
            raise reply
    took = zip(to, replies, strict=True)
    return {site.name: reply for (site, _), reply in took if not isinstance(reply, BaseException)}


def shares(sites: Collection[SiteState], broadcast: bool | int) -> list[Share]:
    """Return which sites are to hold data, best first, and on how many workers each."""
    ordered = sorted(sites, key=lambda site: (site.backlog_s / site.threads, site.name))
    if broadcast is True:
        return [(site, True) for site in ordered]
    left, found = int(broadcast), list[Share]()
    for site in ordered:
        copies = min(left, site.status.workers if site.status else 0)
        if copies > 0:
            found.append((site, copies if copies > 1 else False))
            left -= copies
    return found or [(ordered[0], False)]


async def _takers(hub: Hub, selectors: Collection[str], deadline: float) -> list[SiteState]:
    """Return the sites that may take data, waiting until there is one."""
    while True:
        sites = [site for site in hub.core.sites.values() if _can_take(hub, site)]
        fitting = [s for s in sites if not selectors or any(matches(s.hello, x) for x in selectors)]
        if fitting:
            return fitting
        if sites and selectors:
            raise UnknownSiteError(f"no site matches {list(selectors)}; sites are {sorted(hub.core.sites)}")
        if time.monotonic() > deadline:
            raise TimeoutError("no site has a worker that could take the data")
        await asyncio.sleep(SCATTER_POLL_S)


def _can_take(hub: Hub, site: SiteState) -> bool:
    port = hub.ports.get(site.name)
    return bool(site.threads) and not site.draining and port is not None and port.connected
