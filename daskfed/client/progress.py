"""Progress bars over a federation.

``distributed.progress`` sends the scheduler a pickled function, which a hub does not open. :func:`install` makes its
bars ask a daskfed client's hub for counts of tasks instead; bars of other clients work as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from dask.utils import parse_timedelta

from daskfed.dask_private import MultiProgressBar, ProgressBar

FINAL = ("finished", "error")


def install(is_federated: Callable[[Any], bool]) -> None:
    """Let the bars of clients for which ``is_federated(client)`` is true ask the hub. May be called again."""
    for cls in (ProgressBar, MultiProgressBar):
        if not hasattr(cls.listen, "stock"):
            cls.listen = _listening(cls.listen, is_federated)


def _listening(stock: Callable[[Any], Awaitable[None]], is_federated: Callable[[Any], bool]) -> Any:
    async def listen(bar: Any) -> None:
        client = bar.client() if bar.client else None
        await (_follow(bar, client) if client is not None and is_federated(client) else stock(bar))

    listen.stock = stock  # type: ignore[attr-defined]
    return listen


async def _follow(bar: Any, client: Any) -> None:
    """Draw a bar until its futures are done."""
    interval_s = parse_timedelta(bar.interval, default="s")
    seen: dict[str, int] = {}
    while True:
        response = await _response(bar, client, seen)
        bar._last_response, bar.status = response, response["status"]
        bar._draw_bar(**response)
        if response["status"] in FINAL:
            bar._draw_stop(**response)
            return
        await asyncio.sleep(interval_s)


async def _response(bar: Any, client: Any, seen: dict[str, int]) -> dict[str, Any]:
    states = [client.futures[key] for key in bar.keys if key in client.futures]
    asked = asyncio.run_coroutine_threadsafe(client.fetch_progress(bar.keys), client.loop.asyncio_loop)
    counts = await asyncio.wrap_future(asked)  # the bar may run on an event loop of its own
    response: dict[str, Any] = completed(counts, seen)
    failed = next((state for state in states if state.status == "error"), None)
    finished = failed is None and all(state.done() for state in states)
    if finished:  # perhaps only since the hub was asked
        response["remaining"] = dict.fromkeys(response["remaining"], 0)
    if not isinstance(bar, MultiProgressBar):
        response = {name: sum(each.values()) for name, each in response.items()}
    if failed is not None:
        return response | {"status": "error", "key": failed.key, "exception": failed.exception, "traceback": None}
    return response | {"status": "finished" if finished else "running"}


def completed(counts: dict[str, dict[str, int]], seen: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return counts with the tasks that the hub has forgotten since, which are done: else bars would go backwards.

    ``seen`` has the most tasks of each prefix so far, and is brought up to date.
    """
    for prefix, count in counts["all"].items():
        seen[prefix] = max(count, seen.get(prefix, 0))
    return {"all": dict(seen), "remaining": {prefix: counts["remaining"].get(prefix, 0) for prefix in seen}}
