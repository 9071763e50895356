"""What Dask expects of a comm: ``zmq://``, with keys and without, does what ``tcp://`` does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, Scheduler, Worker
from distributed.comm import connect, listen
from distributed.comm.core import Comm, CommClosedError, Listener
from distributed.protocol import to_serialize

from daskfed.keys import Authorized, KeyFolder, Role

SOON_S = 20.0
SCHEMES = ["tcp", "zmq", "zmq with keys"]


class Ends:
    """How to listen and to dial."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme = scheme.split()[0]
        self.keys = KeyFolder(folder / "keys")
        if scheme.endswith("keys"):
            self.keys.new("hub")
            self.keys.authorize(Authorized(self.keys.new("id").public, frozenset({Role.CLIENT}), "ann"))
        self.args: dict[str, Any] = {"keys": self.keys} if self.scheme == "zmq" else {}

    @contextlib.asynccontextmanager
    async def listening(self, handler: Callable[[Comm], Awaitable[Any]]) -> AsyncIterator[Listener]:
        """Listen, and have who dials trust the key of this end."""
        async with listen(f"{self.scheme}://127.0.0.1:0", handler, **self.args) as listener:
            if (hub := self.keys.own("hub")) is not None:
                self.keys.trust(listener.contact_address, hub.public)
            yield listener

    async def dial(self, address: str, timeout: float = SOON_S) -> Comm:
        """Return a comm."""
        return await connect(address, timeout=timeout, **self.args)


@pytest.fixture(params=SCHEMES)
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Ends:
    return Ends(request.param, tmp_path)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(3 * SOON_S):
            await work

    asyncio.run(limited())


async def echo(comm: Comm) -> None:
    with contextlib.suppress(CommClosedError):
        while True:
            await comm.write(await comm.read())


@contextlib.asynccontextmanager
async def pair(ends: Ends) -> AsyncIterator[tuple[Comm, Comm]]:
    """Yield both ends of a comm: of who dialled, of who listened."""
    accepted: asyncio.Queue[Comm] = asyncio.Queue()
    over = asyncio.Event()

    async def keep(comm: Comm) -> None:
        accepted.put_nowait(comm)
        await over.wait()

    async with ends.listening(keep) as listener:
        dialled = await ends.dial(listener.contact_address)
        other = await accepted.get()
        yield dialled, other
        over.set()
        dialled.abort()
        other.abort()


def test_what_is_written_is_read_in_order(ends: Ends) -> None:
    async def work() -> None:
        async with pair(ends) as (one, other):
            for number in range(500):
                await one.write({"n": number})
            await other.write("meanwhile")
            assert [(await other.read())["n"] for _ in range(500)] == list(range(500))
            assert await one.read() == "meanwhile"

    run(work())


@pytest.mark.parametrize("nbytes", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 30 * 2**20 + 7])
def test_frames_of_any_size(ends: Ends, nbytes: int) -> None:
    array = np.arange(nbytes, dtype="u1")

    async def work() -> None:
        async with ends.listening(echo) as listener:
            comm = await ends.dial(listener.contact_address)
            await comm.write({"x": to_serialize(array), "y": [to_serialize(b"small"), to_serialize(array[::2])]})
            back = await comm.read()
            assert (back["x"] == array).all() and (back["y"][1] == array[::2]).all() and back["y"][0] == b"small"
            await comm.close()

    run(work())


def test_many_frames(ends: Ends) -> None:
    values = [b"%d" % n * (n % 50) for n in range(5000)]

    async def work() -> None:
        async with ends.listening(echo) as listener:
            comm = await ends.dial(listener.contact_address)
            await comm.write([to_serialize(value) for value in values])
            assert list(await comm.read()) == values
            await comm.close()

    run(work())


def test_both_ends_write_large_messages_at_once(ends: Ends) -> None:
    array = np.ones(20 * 2**20, dtype="u1")

    async def work() -> None:
        async with pair(ends) as (one, other):
            await asyncio.gather(one.write(to_serialize(array)), other.write(to_serialize(array)))
            assert len(await one.read()) == len(await other.read()) == len(array)

    run(work())


def test_many_comms_at_once(ends: Ends) -> None:
    async def talk(address: str, number: int) -> None:
        comm = await ends.dial(address)
        for n in range(20):
            await comm.write((number, n, b"x" * (number * 997)))
            assert tuple((await comm.read())[:2]) == (number, n)
        await comm.close()

    async def work() -> None:
        async with ends.listening(echo) as listener:
            await asyncio.gather(*(talk(listener.contact_address, number) for number in range(100)))

    run(work())


def test_what_was_written_before_it_closed_can_be_read(ends: Ends) -> None:
    async def work() -> None:
        async with pair(ends) as (one, other):
            await one.write("first")
            await one.write(to_serialize(b"x" * 2**20))
            await one.close()
            assert one.closed()
            assert await other.read() == "first"
            assert len(await other.read()) == 2**20
            with pytest.raises(CommClosedError):
                await other.read()

    run(work())


def test_what_had_arrived_when_the_peer_ended_can_be_read_late(ends: Ends) -> None:
    async def say(comm: Comm) -> None:
        for number in range(1000):
            await comm.write(number)
        await comm.close()

    async def work() -> None:
        async with ends.listening(say) as listener:
            comm = await ends.dial(listener.contact_address)
            await asyncio.sleep(0.2)
            time.sleep(0.5)  # this end does not come to it
            assert [await comm.read() for _ in range(1000)] == list(range(1000))
            comm.abort()

    run(work())


def test_who_writes_while_the_comm_is_closed_is_not_left_waiting(ends: Ends) -> None:
    async def work() -> None:
        async with pair(ends) as (one, other):
            for _ in range(40):  # more than fits without a reader
                writing = asyncio.create_task(one.write(to_serialize(b"x" * 2**20)))
                await asyncio.sleep(0)
                if not writing.done():
                    break
            closing = asyncio.ensure_future(one.close())
            await asyncio.sleep(0.1)
            one.abort()
            other.abort()
            await asyncio.wait({writing, closing}, timeout=SOON_S)
            assert writing.done() and closing.done()
            writing.exception()
            closing.exception()

    run(work())


def test_a_comm_that_nobody_holds_any_more_goes_away(ends: Ends) -> None:
    async def work() -> None:
        over = asyncio.Event()

        async def wait(comm: Comm) -> None:
            with contextlib.suppress(CommClosedError):
                await comm.read()
            over.set()

        async with ends.listening(wait) as listener:
            comm: Comm | None = await ends.dial(listener.contact_address)
            assert comm is not None
            comm = None
            gc.collect()
            await asyncio.wait_for(over.wait(), SOON_S)

    run(work())


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("which", ["dialled", "accepted"])
def test_closing_while_the_other_end_reads(ends: Ends, which: str, end: str) -> None:
    async def work() -> None:
        async with pair(ends) as both:
            one, other = both if which == "dialled" else both[::-1]
            reading = asyncio.create_task(other.read())
            await asyncio.sleep(0.05)
            await one.close() if end == "close" else one.abort()
            with pytest.raises(CommClosedError):
                await asyncio.wait_for(reading, SOON_S)
            with pytest.raises(CommClosedError):
                await one.write("too late")
            while not other.closed():
                await asyncio.sleep(0.01)
            with pytest.raises(CommClosedError):
                await other.write("too late")

    run(work())


def test_closing_while_the_own_end_reads(ends: Ends) -> None:
    async def work() -> None:
        async with pair(ends) as (one, _):
            reading = asyncio.create_task(one.read())
            await asyncio.sleep(0.05)
            one.abort()
            with pytest.raises(CommClosedError):
                await asyncio.wait_for(reading, SOON_S)

    run(work())


def test_a_handshake_that_says_nonsense_is_refused(ends: Ends) -> None:
    served = []

    async def serve(comm: Comm) -> None:
        served.append(comm)

    async def work() -> None:
        async with ends.listening(serve) as listener:
            with pytest.raises((CommClosedError, TypeError)):
                await connect(listener.contact_address, handshake_overrides={"pickle-protocol": "seven"}, **ends.args)
                raise CommClosedError("it was the other end that found it out")
            await asyncio.sleep(0.1)
            assert not served
            comm = await ends.dial(listener.contact_address)
            comm.abort()

    run(work())


def test_nobody_listens(ends: Ends) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"{ends.scheme}://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="imed out|nobody answers"):
            run(_dial(ends, address))


async def _dial(ends: Ends, address: str) -> None:
    await ends.dial(address, timeout=1)


def test_a_peer_that_takes_the_connection_and_says_nothing(ends: Ends) -> None:
    """Stock tcp:// waits for ever for the handshake; whoever dials has a limit of its own, and no harm comes of it."""
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises((OSError, TimeoutError)):
        run(asyncio.wait_for(_dial(ends, f"{ends.scheme}://127.0.0.1:{mute.getsockname()[1]}"), 3))


def test_a_connect_that_is_cancelled_harms_no_other(ends: Ends) -> None:
    async def work() -> None:
        async with ends.listening(echo) as listener:
            for delay_s in (0, 0, 0.001, 0.002, 0.005, 0.01):
                dialling = asyncio.create_task(ends.dial(listener.contact_address))
                await asyncio.sleep(delay_s)
                dialling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    (await dialling).abort()
            comm = await ends.dial(listener.contact_address)
            await comm.write("still there")
            assert await comm.read() == "still there"
            await comm.close()

    run(work())


def test_an_address_that_is_taken(ends: Ends) -> None:
    async def work() -> None:
        async with ends.listening(echo) as listener:
            with pytest.raises(OSError):
                await listen(listener.listen_address, echo, **ends.args).start()

    run(work())


def test_a_listener_that_stops_leaves_its_comms_alone(ends: Ends) -> None:
    async def work() -> None:
        async with ends.listening(echo) as listener:
            address = listener.contact_address
            comm = await ends.dial(address)
            await comm.write("here")  # who listens may not have read the handshake yet: that one it would cut off
            assert await comm.read() == "here"
        await asyncio.sleep(0.1)
        await comm.write("still there")
        assert await comm.read() == "still there"
        with pytest.raises(OSError):
            await ends.dial(address, timeout=1)
        await comm.write("and now")
        assert await comm.read() == "and now"
        comm.abort()

    run(work())


PEER = """
import asyncio, sys
from distributed.comm import connect, listen
from daskfed.keys import KeyFolder

async def main(address, folder):
    keys = {"keys": KeyFolder(folder)} if folder else {}
    comm = await connect(address, timeout=20, **keys)
    await comm.write("here")
    await comm.read()

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_peer_that_is_killed_is_noticed(ends: Ends) -> None:
    ended = []

    async def work() -> None:
        heard = asyncio.Event()

        async def serve(comm: Comm) -> None:
            assert await comm.read() == "here"
            heard.set()
            with pytest.raises(CommClosedError):
                await comm.read()
            ended.append(comm)

        async with ends.listening(serve) as listener:
            folder = str(ends.keys.path) if ends.args else ""
            peer = subprocess.Popen([sys.executable, "-c", PEER, listener.contact_address, folder])
            try:
                await asyncio.wait_for(heard.wait(), SOON_S)
            finally:
                peer.kill()
                peer.wait()
            while not ended:
                await asyncio.sleep(0.05)

    with dask.config.set({"daskfed.comm.resume": "1s"}):
        run(work())


@pytest.mark.parametrize("ends", ["tcp", "zmq"], indirect=True)
def test_dask_runs_over_it(ends: Ends) -> None:
    """Scheduler, worker and client, which know nothing of it and have no keys."""

    async def work() -> None:
        async with (
            Scheduler(protocol=f"{ends.scheme}://", port=0, host="127.0.0.1", dashboard_address=":0") as scheduler,
            Worker(scheduler.address, protocol=f"{ends.scheme}://", host="127.0.0.1", nthreads=1),
            Worker(scheduler.address, protocol=f"{ends.scheme}://", host="127.0.0.1", nthreads=1),
            Client(scheduler.address, asynchronous=True) as client,
        ):
            assert scheduler.address.startswith(ends.scheme)
            arrays = [await client.submit(np.full, 10**6, n, pure=False) for n in range(8)]
            assert len(arrays) == 8
            futures = [client.submit(np.full, 10**6, n) for n in range(8)]
            total = client.submit(lambda parts: sum(part.sum() for part in parts), futures)
            assert await total == 28 * 10**6

    run(work())
