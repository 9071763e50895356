"""Ending for certain: tasks, and what a signal is to end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
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


def stop_on_signals() -> asyncio.Event:
    """Return what SIGINT or SIGTERM sets on the running loop; a second one ends the process at once."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop, number)
    return stop


def _on_signal(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        os._exit(128 + number)
    stop.set()


async def until(stop: asyncio.Event, work: Awaitable[Any]) -> bool:
    """Return whether ``work`` ended before it was to stop; raises what it raises. Else it is cancelled."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    ended = working.done()
    await end_tasks(working, stopping)
    if not working.cancelled():
        working.result()
    return ended
