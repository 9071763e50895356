"""Values come from a hub in a process of its own as a stream, whatever their sizes and wherever they are."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import dask
import numpy as np
import psutil
import pytest
from distributed.comm.core import Comm

from daskfed import Client
from daskfed.comm.opaque import connect_opaque, listen_opaque
from daskfed.dask_private import Serialized
from daskfed.data.parcels import CHUNK_BYTES
from daskfed.site.ports import Channels
from tests.system import commands

pytestmark = pytest.mark.system

MB = 10**6


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Return the address of a hub with two sites, all of them processes of their own."""
    with commands.hub_and_sites({"north": None, "south": None}) as address:
        yield address


@pytest.fixture(scope="module")
def client(hub: str) -> Iterator[Client]:
    """A client of it."""
    with Client(hub, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def made(nbytes: int, seed: int) -> Any:
    """Return random bytes in an array."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype="u1")


def test_values_of_all_sizes_come_from_both_sites(client: Client) -> None:
    sizes = [0, 1, 10, MB, 5 * MB, 30 * MB]
    futures = [client.submit(made, size, n, site=site) for n, size in enumerate(sizes) for site in ("north", "south")]
    values = client.gather(futures)
    for value, n in zip(values, [n for n in range(len(sizes)) for _ in range(2)], strict=True):
        np.testing.assert_array_equal(value, made(sizes[n], n))


def test_gathered_arrays_can_be_written_to(client: Client) -> None:
    for size in (10, 30 * MB):
        value = client.submit(made, size, 1, pure=False).result()
        value[0] = 1
        assert value[0] == 1


def test_many_small_values_come_in_order(client: Client) -> None:
    assert client.gather(client.map(str, range(1500))) == [str(n) for n in range(1500)]


def test_no_values_and_the_same_value_twice(client: Client) -> None:
    future = client.submit(abs, -1)
    assert client.gather([]) == [] and client.gather([future, future, [future]]) == [1, 1, [1]]


class Fragile:
    """Cannot be opened in the process that runs the tests."""

    def __reduce__(self) -> Any:
        return (_open_elsewhere, (os.getpid(),))


def _open_elsewhere(pid: int) -> Any:
    if os.getpid() != pid:
        raise ValueError("not in this process")
    return Fragile()


@pytest.mark.parametrize("nbytes", [1, 10 * MB])
def test_a_value_that_cannot_be_opened_raises_and_the_next_one_comes(client: Client, nbytes: int) -> None:
    future = client.submit(lambda: [Fragile(), bytes(nbytes)], pure=False)
    with pytest.raises(ValueError, match="not in this process"):
        client.gather(future)
    assert client.submit(abs, -2).result() == 2


def test_a_gather_that_is_given_up_halfway_spoils_no_other(client: Client, hub: str) -> None:
    large = client.map(made, [20 * MB] * 10, range(10))
    client.gather(client.submit(len, large))

    async def check() -> None:
        async with Client(hub, asynchronous=True, set_as_default=False) as other:
            there = [other.submit(made, 20 * MB, n) for n in range(10)]
            for pause in (0.0, 0.02, 0.1, 0.3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(other.gather(there), pause)
            assert await other.submit(abs, -3) == 3
            assert len(await other.gather(there)) == 10

    asyncio.run(check())


def test_calls_are_answered_while_many_clients_read_slowly(client: Client, hub: str) -> None:
    future = client.submit(made, 64 * MB, 3, pure=False, site="north")
    client.gather(client.submit(len, future))

    async def check() -> None:
        slow = [await connect_opaque(hub) for _ in range(12)]
        try:
            for comm in slow:
                await comm.write({"op": "fed_gather", "keys": [future.key]})
            await asyncio.sleep(2)
            for _ in range(3):
                assert await asyncio.wait_for(asyncio.to_thread(client.who_has, [future]), 15) != {future.key: ()}
            counts = await asyncio.wait_for(asyncio.gather(*map(count_messages, slow)), 60)
            assert min(counts) > 64 * MB / CHUNK_BYTES  # all were served in the end
        finally:
            for comm in slow:
                comm.abort()

    asyncio.run(check())
    assert future.result().nbytes == 64 * MB


async def count_messages(comm: Any) -> int:
    """Read a stream to its end and return how many messages it had."""
    count, ended = 0, False
    while not ended:
        ended, count = bool((await comm.read()).get("end")), count + 1
    return count


def test_what_is_refused_raises_as_ever(client: Client, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    future = client.submit(abs, -5, pure=False)
    assert future.result() == 5
    monkeypatch.setenv("LOGNAME", "alice")
    with Client(hub, set_as_default=False) as alice, pytest.raises(PermissionError, match="not yours"):
        alice.sync(alice.scheduler.gather, keys=[future.key])


def test_values_are_opened_by_the_families_that_the_client_allows(client: Client, hub: str) -> None:
    with Client(hub, set_as_default=False, deserializers=["dask", "msgpack", "error"]) as careful:
        assert careful.submit(made, 10, 1).result().nbytes == 10
        for nbytes in (1, MB):
            future = careful.submit(lambda n: {Fragile: bytes(n)}, nbytes)
            with pytest.raises(TypeError, match="pickle"):
                future.result()


def test_the_hub_holds_little_of_what_is_gathered(hub: str, client: Client) -> None:
    process, over = listener(hub), threading.Event()
    futures = client.map(made, [50 * MB] * 8, range(8))
    assert client.gather(client.map(len, futures)) == [50 * MB] * 8
    before, seen = process.memory_info().rss, [0]

    def watch() -> None:
        while not over.wait(0.005):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    assert sum(value.nbytes for value in client.gather(futures)) == 400 * MB
    over.set()
    watching.join()
    assert max(seen) - before < 100 * MB


def listener(address: str) -> psutil.Process:
    """Return the process that listens at an address."""
    port = int(address.rpartition(":")[2])
    found = {each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr[1] == port}
    return psutil.Process(found.pop())


class Streaming:
    """An agent that streams 200 MB, whatever is asked for."""

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        raise AssertionError(op)

    async def stream_keys(self, keys: list[Any], checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        for n in range(50):
            yield {"part": Serialized({}, [bytes(CHUNK_BYTES)]), "end": n == 49}


def test_a_hub_may_pause_while_it_reads_from_a_site() -> None:
    async def check() -> None:
        counts: asyncio.Queue[int] = asyncio.Queue()

        async def serve(channel: Comm) -> None:
            if not asked:
                asked.append(channel)
                await channel.write({"op": "get_keys", "keys": ["x"]})
                await asyncio.sleep(15)
                counts.put_nowait(await count_messages(channel))
            await ended.wait()

        asked: list[Comm] = []
        ended = asyncio.Event()
        listener = await listen_opaque("tcp://127.0.0.1:0", serve)
        channels = Channels(lambda: connect_opaque(listener.contact_address), Streaming())
        channels.fill()
        assert await asyncio.wait_for(counts.get(), 60) == 50
        await channels.close()
        ended.set()
        listener.stop()

    with dask.config.set({"distributed.comm.timeouts.tcp": "11s"}):  # after which the system would end it
        asyncio.run(check())
