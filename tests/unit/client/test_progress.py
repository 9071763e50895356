"""What a progress bar shows when the hub forgets blocks that are done."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from daskfed.client.progress import _response, completed
from daskfed.dask_private import MultiProgressBar, ProgressBar


def test_forgotten_tasks_are_done() -> None:
    seen: dict[str, int] = {}
    first = {"all": {"read": 4, "add": 2}, "remaining": {"read": 1, "add": 2}}
    assert completed(first, seen) == first
    later = {"all": {"add": 2}, "remaining": {"add": 1}}
    assert completed(later, seen) == {"all": {"read": 4, "add": 2}, "remaining": {"read": 0, "add": 1}}


def test_tasks_that_come_later_count() -> None:
    seen = {"read": 4}
    assert completed({"all": {"read": 6}, "remaining": {"read": 5}}, seen)["all"] == {"read": 6}


@pytest.mark.parametrize("kind", [ProgressBar, MultiProgressBar])
def test_a_bar_whose_last_task_ends_while_it_asks_is_full(kind: type[Any]) -> None:
    response = asyncio.run(ask_as_the_last_ends(kind))
    assert response["status"] == "finished"
    assert response["remaining"] in (0, {"x": 0})
    assert response["all"] in (2, {"x": 2})


async def ask_as_the_last_ends(kind: type[Any]) -> dict[str, Any]:
    last = SimpleNamespace(status="pending", done=lambda: last.status != "pending")

    async def fetch_progress(keys: Any) -> dict[str, dict[str, int]]:
        counts = {"all": {"x": 2}, "remaining": {"x": 1}}
        last.status = "finished"
        return counts

    loop = SimpleNamespace(asyncio_loop=asyncio.get_running_loop())
    client = SimpleNamespace(futures={"x-1": last}, fetch_progress=fetch_progress, loop=loop)
    bar = kind.__new__(kind)
    bar.keys = {"x-1"}
    return await _response(bar, client, {})
