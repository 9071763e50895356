"""What is asked of several sites, of ports that are not: who is asked, and who is waited for."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from daskfed.hub.fanout import Fanout
from daskfed.hub.server import Hub


class Port:
    """A site that answers with its name, or is away and does not answer."""

    def __init__(self, name: str, connected: bool) -> None:
        self.name = name
        self.connected = connected

    async def call(self, op: str, **kwargs: Any) -> Any:
        if not self.connected:
            await asyncio.Event().wait()
        return {"status": "OK", "result": self.name}


class Sites:
    """A hub, so far as it is asked for its sites."""

    fixed = False

    def __init__(self, **connected: bool) -> None:
        self.ports = {name: Port(name, there) for name, there in connected.items()}


def run(hub: Sites, **how: bool) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        return await asyncio.wait_for(Fanout(cast(Hub, hub)).run_function(function=b"", **how), 0.5)

    return asyncio.run(ask())


def test_a_function_runs_at_all_sites() -> None:
    assert run(Sites(north=True, south=True))["result"] == {"north": "north", "south": "south"}


def test_one_that_is_away_is_waited_for() -> None:
    with pytest.raises(TimeoutError):
        run(Sites(north=True, south=False))


def test_or_left_out() -> None:
    assert run(Sites(north=True, south=False), connected=True)["result"] == {"north": "north"}
