"""What workers there are and who has which key: asked of the sites, as much as is needed and no more."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.gateway import Gateway

FRESH_S = 0.25  # an older answer is asked for again, in the background
STALE_S = 2.5  # an older answer is not given any more; clients ask every 2 s


class Roster:
    """The workers of all sites, as their schedulers tell of them.

    Each client asks for them every two seconds. Who asks soon after somebody else gets the same answer; when workers
    come or go, which sites say at once, nothing that was told before counts.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._known: dict[str, Any] = {}
        self._asked_at = -STALE_S
        self._changes = 0
        self._asking: asyncio.Task[dict[str, Any]] | None = None
        self._running: set[asyncio.Task[dict[str, Any]]] = set()

    def forget(self) -> None:
        """Workers or sites came or went."""
        self._changes += 1
        self._asked_at = -STALE_S
        self._asking = None

    async def workers(self) -> dict[str, Any]:
        """Return address as shown -> what the scheduler of the worker's site says of it, and ``site``."""
        age_s = time.monotonic() - self._asked_at
        if age_s > FRESH_S and self._asking is None:
            self._asking = asyncio.create_task(self._ask(self._changes))
            self._running.add(self._asking)
            self._asking.add_done_callback(self._ended)
        if age_s > STALE_S and self._asking is not None:
            return dict(await asyncio.shield(self._asking))
        return dict(self._known)

    def _ended(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # it was raised where somebody waited

    async def _ask(self, changes: int) -> dict[str, Any]:
        asked_at = time.monotonic()
        try:
            replies = await self.gateway.ask_all("identity", n_workers=-1)
        finally:
            if changes == self._changes:
                self._asking = None
        found = {
            self.gateway.shown(site, address): {**info, "site": site}
            for site, reply in replies.items()
            for address, info in reply["workers"].items()
        }
        if changes == self._changes:
            self._known, self._asked_at = found, asked_at
        return found


async def who_has(gateway: Gateway, keys: Collection[Key] | None) -> dict[Key, list[str]]:
    """Return key -> workers that hold it; of all keys of the caller, where none are named."""
    hub = gateway.hub
    known = hub.core.ledger.keys
    asked = hub.owners.readable() if keys is None else list(keys)
    if keys is None and len(asked) == len(known):
        replies = await gateway.ask_all("who_has", keys=None)
    else:
        replies = await gateway.ask_each("who_has", "keys", _where(gateway, asked))
    found: dict[Key, list[str]] = {key: [] for key in asked}
    for site, reply in replies.items():
        shown = {worker: gateway.shown(site, worker) for workers in reply.values() for worker in workers}
        for key, workers in reply.items():
            if key in found:
                found[key] += [shown[worker] for worker in workers]
    return found


def _where(gateway: Gateway, keys: Collection[Key]) -> dict[str, list[Key]]:
    """Return site -> which of ``keys`` it may hold; of what the hub does not know, any may."""
    known, everywhere = gateway.hub.core.ledger.keys, list(gateway.hub.ports)
    found: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        state = known.get(key)
        for site in everywhere if state is None else state.holders:
            found[site].append(key)
    return found


async def has_what(gateway: Gateway) -> dict[str, list[Key]]:
    """Return worker -> keys that it holds and that the caller may see."""
    replies = await gateway.ask_all("has_what")
    theirs = gateway.hub.owners.hidden()
    return {
        gateway.shown(site, worker): [key for key in keys if key not in theirs] if theirs else keys
        for site, reply in replies.items()
        for worker, keys in reply.items()
    }
