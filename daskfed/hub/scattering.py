"""Clients put data at sites: at one, or with ``broadcast`` at every one that may take it. Values stay unopened."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from daskfed.hub import events as ev
from daskfed.hub.dispatch import SiteState, serves
from daskfed.hub.ports import answers
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

SCATTER_POLL_S = 0.05
_numbers = itertools.count()

Share: TypeAlias = tuple[SiteState, list[str] | None, bool | int]
"""A site, which of its workers may hold data (None: any), and how many are to: False for one of them, True for all."""


async def scatter(
    hub: Hub,
    data: Mapping[Key, Any],
    workers: Any,
    client: str,
    broadcast: bool | int = False,
    timeout: float = 30,
    kept: bool = False,
    again: bool = False,
    replicas: int = 1,
) -> list[Key]:
    """Put a client's data at a site; raises TimeoutError if none can take it, UnknownSiteError or UnknownWorkerError
    for a wrong name.

    ``workers`` are named as in :mod:`daskfed.hub.addresses`, None for all. ``broadcast`` puts it on all of these, or on
    that many of them. ``kept``, ``again`` and ``replicas`` as for :class:`~daskfed.hub.events.KeysScattered`.
    """
    deadline = time.monotonic() + (timeout or 0)
    owner = hub.owner_of(client)
    sent: dict[str, Any] = {}
    with _held(hub, data):
        while not sent:  # sites may be gone: then others take the data
            sent = await _send(hub, data, shares(await _takers(hub, workers, deadline, owner), broadcast))
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
    calls = {
        site.name: hub.ports[site.name].call("scatter_keys", data=dict(data), broadcast=copies, workers=there)
        for site, there, copies in to
    }
    return await answers(calls)


def shares(takers: Collection[tuple[SiteState, list[str] | None]], broadcast: bool | int) -> list[Share]:
    """Return which sites, and which of their workers, are to hold data, best first, and on how many of these each."""
    ordered = sorted(takers, key=lambda taker: (taker[0].backlog_s / taker[0].threads, taker[0].name))
    if broadcast is True:
        return [(*taker, True) for taker in ordered]
    left, found = int(broadcast), list[Share]()
    for site, there in ordered:
        copies = min(left, _workers(site) if there is None else len(there))
        if copies > 0:
            found.append((site, there, copies if copies > 1 else False))
            left -= copies
    return found or [(*ordered[0], False)]


def _workers(site: SiteState) -> int:
    return site.status.workers if site.status else 0


async def _takers(hub: Hub, workers: Any, deadline: float, owner: str) -> list[tuple[SiteState, list[str] | None]]:
    """Return the sites that may take data, each with which of its workers (None: any), waiting until there is one."""
    while True:
        sites = [site for site in hub.core.sites.values() if _can_take(hub, site) and serves(site.hello, owner)]
        targets = await hub.fanout.targets(workers) if sites else {}
        if takers := [(site, targets[site.name]) for site in sites if site.name in targets]:
            return takers
        if time.monotonic() > deadline:
            raise TimeoutError("no site has a worker that could take the data")
        await asyncio.sleep(SCATTER_POLL_S)


def _can_take(hub: Hub, site: SiteState) -> bool:
    port = hub.ports.get(site.name)
    return bool(site.threads) and not site.draining and port is not None and port.connected
