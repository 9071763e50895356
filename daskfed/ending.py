"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 1.0  # a cancellation that somebody swallowed is repeated after this


async def end_tasks(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel ``tasks`` and wait until they have ended; what they raise is dropped.

    To await a cancelled task inside ``suppress(CancelledError)`` would also swallow the cancellation of the caller,
    which then never ends. And ``asyncio.wait_for`` may swallow one (Python 3.11), so it is sent until it is heeded.
    """
    pending = {task for task in tasks if task is not None}
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # else asyncio would log that nobody asked for it
