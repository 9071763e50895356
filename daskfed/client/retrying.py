"""Retrying failed futures, in step with what the hub says of them on the client's stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

import distributed
from distributed.client import futures_of

from daskfed.messages import Key

HEARD_WITHIN_S = 5.0
POLL_S = 0.002


class Retrying(distributed.Client):
    """The part of a client that retries.

    The hub answers that keys are retried, and says so on the stream too, before it says how they stand next. Only the
    latter order is sure: so futures are pending again from then on, and :meth:`_retry` waits for that.
    """

    futures: Any
    scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._heard_retried: list[set[Key]] = []  # by each call that waits to hear of its keys
        super().__init__(*args, **kwargs)

    def _handle_retried_key(self, key: Key | None = None) -> None:
        super()._handle_retried_key(key=key)
        for heard in self._heard_retried:
            heard.add(key)  # type: ignore[arg-type]

    async def _retry(self, futures: Any) -> None:
        keys = list({future.key for future in futures_of(futures)})
        heard: set[Key] = set()
        self._heard_retried.append(heard)
        try:
            retried = await self.scheduler.retry(keys=keys, client=self.id)
            await self._until(heard, {key for key in retried if key in self.futures})
        finally:
            self._heard_retried.remove(heard)

    async def _until(self, heard: Collection[Key], told: set[Key]) -> None:
        deadline = time.monotonic() + HEARD_WITHIN_S
        while not told.issubset(heard) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
