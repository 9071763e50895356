"""Channels that a site parks at the hub, and who waits for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed.comm.core import CommClosedError

from daskfed.hub.ports import RemoteSite
from daskfed.messages import PROTOCOL_VERSION, SiteHello

HELLO = SiteHello("north", "1", PROTOCOL_VERSION, (), (), (), "", "", ())


class Channel:
    """A connection that does nothing."""

    def __init__(self, closed: bool = False) -> None:
        self._closed = closed

    def closed(self) -> bool:
        return self._closed


def port() -> RemoteSite:
    stream: Any = None
    return RemoteSite(HELLO, stream)


def test_a_call_takes_the_first_channel_that_is_open() -> None:
    async def story() -> None:
        north = port()
        waiting = asyncio.create_task(north.take())
        await asyncio.sleep(0)
        channel: Any = Channel()
        await north.park(Channel(closed=True))  # type: ignore[arg-type]
        await north.park(channel)
        assert await waiting is channel

    asyncio.run(asyncio.wait_for(story(), 5))


def test_nobody_waits_for_a_channel_of_a_site_that_is_gone() -> None:
    async def story() -> None:
        north = port()
        waiting = [asyncio.create_task(north.take()) for _ in range(2)]
        await asyncio.sleep(0)
        north.give_up()
        for task in (*waiting, asyncio.create_task(north.take())):
            with pytest.raises(CommClosedError, match="north"):
                await task

    asyncio.run(asyncio.wait_for(story(), 5))
