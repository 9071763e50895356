"""What workers there are is asked of the sites once for all who ask, and anew when workers come or go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from daskfed.hub import lookups
from daskfed.hub.lookups import Roster


class Sites:
    """Answers as two sites' schedulers do, when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.workers = {"north": ["a"], "south": ["b"]}
        self.answers = asyncio.Event()
        self.answers.set()

    async def ask_all(self, op: str, n_workers: int) -> dict[str, Any]:
        """Return what each site says."""
        self.asked += 1
        found = {site: {"workers": {name: {"nthreads": 1} for name in names}} for site, names in self.workers.items()}
        await self.answers.wait()
        return found

    def shown(self, site: str, address: str) -> str:
        """Return an address."""
        return f"{site}/{address}"


def run(test: Callable[[Sites, Roster], Awaitable[None]]) -> None:
    """Run a test on an event loop."""

    async def main() -> None:
        sites = Sites()
        await test(sites, Roster(sites))  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 30))


def test_who_asks_together_or_soon_gets_one_answer() -> None:
    async def test(sites: Sites, roster: Roster) -> None:
        first, second = await asyncio.gather(roster.workers(), roster.workers())
        assert first == second == await roster.workers()
        assert first == {"north/a": {"nthreads": 1, "site": "north"}, "south/b": {"nthreads": 1, "site": "south"}}
        assert sites.asked == 1

    run(test)


def test_nothing_old_is_told_once_workers_came_or_went() -> None:
    async def test(sites: Sites, roster: Roster) -> None:
        await roster.workers()
        sites.answers.clear()
        roster.forget()
        before = asyncio.create_task(roster.workers())
        await asyncio.sleep(0)
        sites.workers["north"].append("c")
        roster.forget()  # while the sites are being asked
        after = asyncio.create_task(roster.workers())
        await asyncio.sleep(0)
        sites.answers.set()
        await before
        assert set(await after) == {"north/a", "north/c", "south/b"} == set(await roster.workers())
        assert sites.asked == 3

    run(test)


def test_an_answer_that_is_not_fresh_is_told_while_it_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "FRESH_S", 0.0)

    async def test(sites: Sites, roster: Roster) -> None:
        await roster.workers()
        sites.workers["south"].clear()
        await asyncio.sleep(0.001)
        assert "south/b" in await roster.workers()
        await asyncio.sleep(0.01)
        assert "south/b" not in await roster.workers()

    run(test)
