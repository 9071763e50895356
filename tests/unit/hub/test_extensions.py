"""What coordination holds outlives the hub's process, and what is asked again is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Event, Lock, Queue, Semaphore, Variable

from daskfed.comm.opaque import OpaqueError
from daskfed.hub.coordination import Coordination
from daskfed.hub.extensions import REPLIES
from daskfed.hub.journal import Journal
from daskfed.messages import REQUEST
from tests.unit.hub.small_hub import SmallHub

OPTIONS: dict[str, Any] = {"asynchronous": True, "set_as_default": False}
Act = Callable[[SmallHub, Client], Awaitable[None]]


async def serve(folder: Path, act: Act) -> None:
    """Have a hub with this state serve a client, and end without a word."""
    journal = Journal(folder)
    hub = SmallHub(journal)
    hub.coordination.restore()
    await hub.listen("tcp://127.0.0.1:0")
    try:
        async with Client(hub.address, **OPTIONS) as client:
            await act(hub, client)
            journal.close()  # from here on nothing is written, as after a kill -9
            hub.coordination._view.journal.durable = False
    finally:
        await hub.close()


def lives(folder: Path, *acts: Act) -> None:
    """Do each act with a hub of its own; all have the same state."""

    async def main() -> None:
        for act in acts:
            await serve(folder, act)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_lock_that_is_held_is_held_still(tmp_path: Path) -> None:
    async def hold(hub: SmallHub, client: Client) -> None:
        assert await lock(client).acquire()

    async def contend(hub: SmallHub, client: Client) -> None:
        assert not await lock(client).acquire(timeout=0.2)
        (lease,) = hub.coordination.semaphores.leases["l"]
        await client.scheduler.semaphore_release(name="l", lease_id=lease)
        assert await lock(client).acquire(timeout=5)

    def lock(client: Client) -> Lock:
        return Lock("l", scheduler_rpc=client.scheduler, loop=client.loop)

    lives(tmp_path, hold, contend)


def test_a_lease_whose_holder_is_gone_ends(tmp_path: Path) -> None:
    async def hold(hub: SmallHub, client: Client) -> None:
        await client.scheduler.semaphore_register(name="s", max_leases=1, lease_timeout=0.1)
        assert await client.scheduler.semaphore_acquire(name="s", timeout=1, lease_id="gone")

    async def contend(hub: SmallHub, client: Client) -> None:
        assert hub.coordination.semaphores.leases["s"].keys() == {"gone"}
        await asyncio.sleep(0.2)
        hub.coordination.semaphores._check_lease_timeout()
        assert await client.scheduler.semaphore_acquire(name="s", timeout=1, lease_id="new")

    async def see(hub: SmallHub, client: Client) -> None:
        assert hub.coordination.semaphores.leases["s"].keys() == {"new"}
        await client.scheduler.semaphore_close(name="s")

    async def see_nothing(hub: SmallHub, client: Client) -> None:
        assert not hub.coordination.semaphores.max_leases and not hub.coordination.semaphores.leases["s"]

    with pytest.warns(RuntimeWarning, match="unreleased leases"):
        lives(tmp_path, hold, contend, see, see_nothing)


def test_a_semaphore_counts_on(tmp_path: Path) -> None:
    async def lease(hub: SmallHub, client: Client) -> None:
        semaphore = await Semaphore(max_leases=2, name="s", scheduler_rpc=client.scheduler, loop=client.loop)
        assert await semaphore.acquire()

    async def count(hub: SmallHub, client: Client) -> None:
        semaphore = await Semaphore(max_leases=2, name="s", scheduler_rpc=client.scheduler, loop=client.loop)
        assert await semaphore.get_value() == 1
        assert await semaphore.acquire(timeout=5) and not await semaphore.acquire(timeout=0.1)

    lives(tmp_path, lease, count)


def test_a_multi_lock_is_held_still_and_given_back(tmp_path: Path) -> None:
    async def hold(hub: SmallHub, client: Client) -> None:
        assert await client.scheduler.multi_lock_acquire(locks=["a", "b"], id="one", num_locks=2)
        assert await client.scheduler.multi_lock_acquire(locks=["c"], id="done", num_locks=1)
        await client.scheduler.multi_lock_release(id="done")

    async def contend(hub: SmallHub, client: Client) -> None:
        ask = client.scheduler.multi_lock_acquire
        assert await ask(locks=["a", "b"], id="one", num_locks=2)  # asked again, its reply was lost
        waiting = asyncio.create_task(ask(locks=["b", "c"], id="two", num_locks=2))
        assert not await ask(locks=["a"], id="three", num_locks=1, timeout=0.1)
        assert not waiting.done()
        await client.scheduler.multi_lock_release(id="one")
        await client.scheduler.multi_lock_release(id="one")  # twice is no harm
        assert await waiting

    lives(tmp_path, hold, contend)


def test_variables_events_and_metadata_are_restored(tmp_path: Path) -> None:
    async def write(hub: SmallHub, client: Client) -> None:
        await Variable("v", client=client).set({"a": (1, 2)})
        await Variable("gone", client=client).set(1)
        Variable("gone", client=client).delete()
        await client.scheduler.event_set(name="e")
        await client.scheduler.event_set(name="cleared")
        await client.scheduler.event_clear(name="cleared")
        for path, value in ((["a", "b"], 1), (["a"], 2), (["a", "c"], 3)):
            await client.set_metadata(path, value)
        while "gone" in hub.coordination.variables.variables:
            await asyncio.sleep(0.01)

    async def read(hub: SmallHub, client: Client) -> None:
        assert list((await Variable("v", client=client).get(timeout=1))["a"]) == [1, 2]
        with pytest.raises(asyncio.TimeoutError):
            await Variable("gone", client=client).get(timeout=0.05)
        assert await Event("e", client=client).is_set() and not await Event("cleared", client=client).is_set()
        assert await client.get_metadata(["a"]) == {"c": 3}

    lives(tmp_path, write, read)


def test_futures_in_a_variable_are_wanted_again(tmp_path: Path) -> None:
    keys = []

    async def put(hub: SmallHub, client: Client) -> None:
        future = await client.scatter(5)
        keys.append(future.key)
        await Variable("v", client=client).set(future)
        await Variable("w", client=client).set(future)
        await Variable("w", client=client).set(None)
        while "variable-w" in hub.wanted:
            await asyncio.sleep(0.01)

    async def find(hub: SmallHub, client: Client) -> None:
        assert dict(hub.wanted) == {"variable-v": set(keys)}

    lives(tmp_path, put, find)


def test_a_dataset_is_published_still(tmp_path: Path) -> None:
    async def publish(hub: SmallHub, client: Client) -> None:
        await client.publish_dataset(kept=[1, 2], gone=3)
        await client.unpublish_dataset("gone")
        with pytest.raises(KeyError, match="already exists"):
            await client.publish_dataset(kept=4)

    async def read(hub: SmallHub, client: Client) -> None:
        assert await client.list_datasets() == ("kept",)
        assert await client.get_dataset("kept") == [1, 2]

    lives(tmp_path, publish, read)


def test_the_items_of_a_queue_keep_their_order(tmp_path: Path) -> None:
    async def put(hub: SmallHub, client: Client) -> None:
        queue = await Queue("q", client=client, maxsize=5)
        for n in range(5):
            await queue.put(n)
        assert await queue.get() == 0
        await client.scheduler.queue_create(name="other")
        await client.scheduler.queue_put(name="other", data=1)
        client._send_to_scheduler({"op": "queue_release", "name": "other"})
        while "other" in hub.coordination.queues.queues:
            await asyncio.sleep(0.01)

    async def get(hub: SmallHub, client: Client) -> None:
        assert hub.coordination.queues.queues.keys() == {"q"}
        queue = await Queue("q", client=client)
        await queue.put(5)
        with suppress(asyncio.TimeoutError):
            await queue.put(6, timeout=0.05)
            pytest.fail("it has room for five")
        assert await queue.get(batch=True) == [1, 2, 3, 4, 5] and await queue.qsize() == 0

    async def get_nothing(hub: SmallHub, client: Client) -> None:
        queue = await Queue("q", client=client)
        assert await queue.qsize() == 0
        await queue.put("new")
        assert await queue.get(timeout=1) == "new"

    lives(tmp_path, put, get, get_nothing)


def test_what_is_asked_again_is_done_once(tmp_path: Path) -> None:
    async def first(hub: SmallHub, client: Client) -> None:
        await client.scheduler.queue_create(name="q", client="c", maxsize=0)
        for n in range(4):
            for _ in range(2):
                await client.scheduler.queue_put(name="q", data=n, client="c", **{REQUEST: f"put-{n}"})
        assert await client.scheduler.queue_qsize(name="q") == 4
        for _ in range(2):
            taken = await client.scheduler.queue_get(name="q", **{REQUEST: "get-0"})
            assert taken["value"] == 0

    async def second(hub: SmallHub, client: Client) -> None:
        ask = client.scheduler.queue_get
        assert (await ask(name="q", **{REQUEST: "get-0"}))["value"] == 0
        await client.scheduler.queue_put(name="q", data=3, client="c", **{REQUEST: "put-3"})
        batches = [await ask(name="q", batch=2, **{REQUEST: "get-1"}) for _ in range(2)]
        assert [[record["value"] for record in batch] for batch in batches] == [[1, 2], [1, 2]]
        assert await client.scheduler.queue_qsize(name="q") == 1

    lives(tmp_path, first, second)


def test_a_request_that_is_still_served_is_joined(tmp_path: Path) -> None:
    async def test(hub: SmallHub, client: Client) -> None:
        await client.scheduler.queue_create(name="q", client="c", maxsize=0)
        ask = {REQUEST: "get", "name": "q"}
        waiting = [asyncio.create_task(client.scheduler.queue_get(**ask)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await client.scheduler.queue_put(name="q", data="once", client="c")
        assert [record["value"] for record in await asyncio.gather(*waiting)] == ["once", "once"]
        assert await client.scheduler.queue_qsize(name="q") == 0
        with pytest.raises(Exception, match="not known"):
            await client.scheduler.semaphore_acquire(name="no", lease_id="x", **{REQUEST: "bad"})
        assert not hub.coordination._running

    lives(tmp_path, test)


def test_only_the_latest_replies_are_kept(tmp_path: Path) -> None:
    async def fill(hub: SmallHub, client: Client) -> None:
        coordination: Coordination = hub.coordination
        coordination.queues.create("q")
        for n in range(REPLIES + 50):
            await hub.handlers["queue_put"](name="q", data=n, **{REQUEST: str(n)})

    async def see(hub: SmallHub, client: Client) -> None:
        assert list(hub.coordination.replies.records) == [str(n) for n in range(50, REPLIES + 50)]

    lives(tmp_path, fill, see)


def test_an_error_of_an_op_reaches_its_sender(tmp_path: Path) -> None:
    async def test(hub: SmallHub, client: Client) -> None:
        with pytest.raises((RuntimeError, OpaqueError), match="not known"):
            await hub.coordination.serve_site("north", "semaphore_acquire", {"name": "no", "lease_id": "x"}, "r")

    lives(tmp_path, test)
