"""Channels that a site parks at the hub, and who waits for them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from distributed.comm.core import Comm, CommClosedError

from daskfed.comm.opaque import connect_opaque, listen_opaque
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


async def pair() -> tuple[Any, Any]:
    """Return the hub's and the site's end of a connection."""
    accepted: asyncio.Future[Comm] = asyncio.get_running_loop().create_future()
    ended = asyncio.Event()

    async def keep(comm: Comm) -> None:
        accepted.set_result(comm)
        await ended.wait()

    listener = await listen_opaque("tcp://127.0.0.1:0", keep)
    comm = await connect_opaque(listener.contact_address)
    try:
        return await accepted, comm
    finally:
        ended.set()
        listener.stop()


@pytest.mark.parametrize("messages", [1, 2])
def test_a_channel_is_used_again_after_a_stream_that_was_read_to_its_end(messages: int) -> None:
    async def story() -> None:
        north = port()
        channel, site = await pair()
        await north.park(channel)
        for n in range(2):
            await site.write({"n": n, "end": n == 1})
        async with aclosing(north.stream_keys(["x"], "token")) as stream:
            for _ in range(messages):
                await anext(stream)
        assert channel.closed() == (messages == 1)
        if messages == 2:
            assert await north.take() is channel
            channel.abort()
        site.abort()

    asyncio.run(asyncio.wait_for(story(), 5))
