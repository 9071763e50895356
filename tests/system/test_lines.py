"""Lines of ``zmq://`` over a network that fails: comms go on where they were, and small messages are not kept waiting."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed.comm import connect, listen
from distributed.comm.core import Comm, CommClosedError
from distributed.protocol import to_serialize

from daskfed.comm import lines
from daskfed.keys import Authorized, KeyFolder, Role
from daskfed.testing.relays import Relay, relay

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


async def echo(comm: Comm) -> None:
    with contextlib.suppress(CommClosedError):
        while True:
            await comm.write(await comm.read())


@contextlib.asynccontextmanager
async def far(
    folder: Path, serve: Callable[[Comm], Awaitable[None]] = echo, role: Role = Role.CLIENT, **how: float
) -> AsyncIterator[tuple[Relay, str, KeyFolder]]:
    """Listen behind a relay; yields it, its address and keys for it."""
    keys = KeyFolder(folder)
    hub = keys.new("hub")
    keys.authorize(Authorized(keys.new("id").public, frozenset({role}), "ann"))
    async with listen("zmq://127.0.0.1:0", serve, keys=keys) as listener:
        with relay(int(listener.contact_address.rpartition(":")[2]), **how) as line:
            address = f"zmq://127.0.0.1:{line.port}"
            keys.trust(address, hub.public)
            yield line, address, keys


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_comms_go_on_where_they_were_when_the_line_was_cut(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(tmp_path) as (line, address, keys):
            small, large = [await connect(address, keys=keys) for _ in range(2)]
            over = asyncio.Event()
            array = np.arange(2 * 10**6)

            async def talk(comm: Comm, message: Any) -> int:
                done = 0
                while not over.is_set():
                    await comm.write({"n": done, "x": message})
                    assert (await comm.read())["n"] == done
                    done += 1
                return done

            talking = asyncio.gather(talk(small, b"x"), talk(large, to_serialize(array)))
            for _ in range(4):
                await asyncio.sleep(0.5)
                line.cut()
                await asyncio.sleep(0.5)
                line.mend()
            await asyncio.sleep(1)
            over.set()
            trips, bulk = await talking
            assert trips > 20 and bulk >= 1
            small.abort()
            large.abort()

    run(work())


def test_comms_end_when_the_line_stays_cut(tmp_path: Path) -> None:
    async def work() -> None:
        async with far(tmp_path) as (line, address, keys):
            comm = await connect(address, keys=keys)
            line.cut()
            start = time.monotonic()
            with pytest.raises(CommClosedError, match="could not be made again"):
                await comm.read()
            assert time.monotonic() - start < 15
            line.mend()
            again = await connect(address, keys=keys)
            await again.write("here")
            assert await again.read() == "here"
            again.abort()

    with dask.config.set({"daskfed.comm.resume": "2s"}):
        run(work())


def test_who_writes_to_a_line_without_keys_that_was_cut_meanwhile_is_told() -> None:
    async def work() -> None:
        async with listen("zmq://127.0.0.1:0", echo) as listener:
            with relay(int(listener.contact_address.rpartition(":")[2])) as line:
                comm = await connect(f"zmq://127.0.0.1:{line.port}")
                line.cut()
                await asyncio.sleep(0)
                time.sleep(0.5)  # this end does not come to it
                with pytest.raises(CommClosedError):
                    for _ in range(100):
                        await comm.write("there?")

    run(work())


@pytest.mark.parametrize("role", [Role.JOIN, Role.CLIENT])
def test_who_used_up_a_token_hears_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role) -> None:
    """The hub takes its key out before it answers, and a slow disk may then keep the answer waiting."""
    monkeypatch.setattr(lines, "ANSWER_S", 4.0)

    async def use_up(comm: Comm) -> None:
        assert await comm.read() == "join"
        KeyFolder(tmp_path).revoke("ann")
        await asyncio.sleep(2)
        with contextlib.suppress(CommClosedError):
            await comm.write("you are site north")

    async def work() -> None:
        async with far(tmp_path, use_up, role) as (_, address, keys):
            comm = await connect(address, keys=keys)
            await comm.write("join")
            if role == Role.JOIN:
                assert await comm.read() == "you are site north"
            async with asyncio.timeout(30):
                with pytest.raises(CommClosedError):
                    await comm.read()

    run(work())


def test_small_messages_do_not_wait_for_large_ones_on_a_narrow_line(tmp_path: Path) -> None:
    """100 Mbit/s and a round trip of 40 ms, with much to send on it."""

    async def work() -> None:
        async with far(tmp_path, delay_s=0.02, rate=12.5e6) as (_, address, keys):
            small, large = [await connect(address, timeout=20, keys=keys) for _ in range(2)]
            writing = asyncio.create_task(large.write(to_serialize(np.ones(6 * 10**7, dtype="u1"))))
            await asyncio.sleep(1.0)
            times = []
            while not writing.done():
                start = time.monotonic()
                await small.write("small")
                assert await small.read() == "small"
                times.append(time.monotonic() - start)
                await asyncio.sleep(0.01)
            await writing
            times.sort()
            assert len(times) > 10 and times[len(times) // 2] < 0.5, times  # seconds; all of it would take 5
            small.abort()
            large.abort()

    run(work())
