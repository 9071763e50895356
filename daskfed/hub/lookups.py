"""What workers there are: asked of the sites, as often as is needed and no more."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskfed.hub.fanout import Fanout

FRESH_S = 0.25  # an older answer is asked for again, in the background
STALE_S = 2.5  # an older answer is not given any more; clients ask every 2 s


class Roster:
    """The workers of all sites, as their schedulers tell of them.

    Each client asks for them every two seconds. Who asks soon after somebody else gets the same answer; when workers
    come or go, which sites say at once, nothing that was told before counts.
    """

    def __init__(self, fanout: Fanout) -> None:
        self.fanout = fanout
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
            replies = await self.fanout.ask_all("identity", n_workers=-1)
        finally:
            if changes == self._changes:
                self._asking = None
        found = {
            self.fanout.shown(site, address): {**info, "site": site}
            for site, reply in replies.items()
            for address, info in reply["workers"].items()
        }
        if changes == self._changes:
            self._known, self._asked_at = found, asked_at
        return found
