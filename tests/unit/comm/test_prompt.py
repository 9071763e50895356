"""Streams that send at once: in order, together what comes together, and to the last message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed.batched import BatchedSend
from distributed.comm.core import CommClosedError

from daskfed.comm.opaque import connect_opaque, listen_opaque
from daskfed.comm.prompt import PromptSend, promptly

LONG_S = 30.0


class Read:
    """What came over a comm, message by message, until it closed."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.ended = asyncio.Event()

    async def serve(self, comm: Any) -> None:
        try:
            while True:
                self.messages.append(list(await comm.read()))
        except CommClosedError:
            self.ended.set()

    @property
    def items(self) -> list[Any]:
        return [item for message in self.messages for item in message]


@pytest.fixture(params=["tcp://127.0.0.1:0", "inproc://"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def over(scheme: str, scenario: Any) -> None:
    async def run() -> None:
        read = Read()
        listener = await listen_opaque(scheme, read.serve)
        try:
            comm = await connect_opaque(listener.contact_address)
            await asyncio.wait_for(scenario(comm, read), LONG_S)
        finally:
            listener.stop()

    asyncio.run(run())


def test_what_is_sent_together_leaves_together_and_single_messages_at_once(scheme: str) -> None:
    async def scenario(comm: Any, read: Read) -> None:
        stream = PromptSend()
        stream.start(comm)
        stream.send(1, 2)
        stream.send(3)
        while len(read.items) < 3:
            await asyncio.sleep(0)
        for n in range(4, 8):
            stream.send(n)
            while len(read.items) < n:
                await asyncio.sleep(0)
        assert read.messages == [[1, 2, 3], [4], [5], [6], [7]]
        await stream.close()

    over(scheme, scenario)


def test_what_was_sent_before_it_closed_arrives(scheme: str) -> None:
    async def scenario(comm: Any, read: Read) -> None:
        stream = PromptSend()
        stream.start(comm)
        for n in range(1000):
            stream.send(n)
            if n % 7 == 0:
                await asyncio.sleep(0)
        await stream.close()
        await read.ended.wait()
        assert read.items == list(range(1000))
        with pytest.raises(CommClosedError):
            stream.send("too late")

    over(scheme, scenario)


def test_a_peer_that_goes_away_ends_the_stream(scheme: str) -> None:
    async def scenario(comm: Any, read: Read) -> None:
        stream = PromptSend()
        stream.start(comm)
        comm.abort()
        with pytest.raises(CommClosedError):
            while True:
                stream.send("anything")
                await asyncio.sleep(0)
        await stream.close()

    over(scheme, scenario)


def test_it_takes_the_place_of_another_stream(scheme: str) -> None:
    async def scenario(comm: Any, read: Read) -> None:
        before = BatchedSend(interval="10s")
        before.start(comm)
        before.send("first")  # it has not left yet
        stream = promptly(before)
        stream.send("second")
        while len(read.items) < 2:
            await asyncio.sleep(0.001)
        assert read.items == ["first", "second"]
        await before.stopped.wait()
        await stream.close()
        await read.ended.wait()

    over(scheme, scenario)


def test_what_cannot_be_written_ends_the_stream(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            raise TypeError("it cannot be pickled")

    async def scenario(comm: Any, read: Read) -> None:
        stream = PromptSend()
        stream.start(comm)
        stream.send(Odd())
        await stream.stopped.wait()
        assert comm.closed() and "could not be written" in caplog.text

    if scheme.startswith("tcp"):  # within a process anything can be
        over(scheme, scenario)
