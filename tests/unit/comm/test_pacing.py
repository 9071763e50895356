"""A stream of values is written no faster than it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from distributed.comm.core import Comm, CommClosedError
from distributed.protocol.serialize import Serialized

from daskfed.comm.opaque import connect_opaque, listen_opaque
from daskfed.comm.pacing import Paced

MB = 2**20
MANY = 60  # messages


class Sender:
    """Writes many megabytes to whoever connects, and remembers how it went."""

    def __init__(self) -> None:
        self.asked = 0  # messages that were asked for
        self.closed = False
        self.writing: asyncio.Task[None]

    async def messages(self) -> AsyncGenerator[Any]:
        try:
            for _ in range(MANY):
                self.asked += 1
                yield {"part": Serialized({}, [bytes(4 * MB)])}
        finally:
            self.closed = True

    async def serve(self, comm: Comm) -> None:
        self.writing = asyncio.create_task(Paced(comm).write_all(self.messages()))
        await asyncio.wait([self.writing])


async def settled(sender: Sender) -> int:
    """Return how many messages were asked for once no more are."""
    before = -1
    while before < sender.asked:
        before = sender.asked
        await asyncio.sleep(0.2)
    return sender.asked


async def connected() -> tuple[Sender, Comm, Any]:
    sender = Sender()
    listener = await listen_opaque("tcp://127.0.0.1:0", sender.serve)
    return sender, await connect_opaque(listener.contact_address), listener


def test_messages_are_asked_for_as_the_reader_takes_them() -> None:
    async def check() -> None:
        sender, comm, listener = await connected()
        waiting = await settled(sender)
        assert waiting < 20  # two, and what the system's buffers take
        for _ in range(10):
            await comm.read()
        assert waiting < await settled(sender) < 40
        for _ in range(MANY - 10):
            await comm.read()
        await sender.writing
        comm.abort()
        listener.stop()

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_reader_that_goes_away_is_a_closed_comm_and_ends_the_messages() -> None:
    async def check() -> None:
        sender, comm, listener = await connected()
        await settled(sender)
        comm.abort()
        with pytest.raises(CommClosedError, match="broke"):
            await sender.writing
        assert sender.closed
        listener.stop()

    asyncio.run(asyncio.wait_for(check(), 60))


def test_who_is_cancelled_while_it_waits_leaves_no_error_behind() -> None:
    async def check() -> None:
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
        sender, comm, listener = await connected()
        await settled(sender)
        sender.writing.cancel()
        await asyncio.wait([sender.writing])
        assert sender.closed and sender.writing.cancelled()
        comm.abort()
        await asyncio.sleep(0.1)
        listener.stop()
        assert not problems

    asyncio.run(asyncio.wait_for(check(), 60))
