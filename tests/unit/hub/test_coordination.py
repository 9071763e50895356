"""Stock clients use coordination at a hub as at a scheduler; the hub keeps their values unopened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from distributed import Client, Event, Future, Lock, MultiLock, Queue, Semaphore, Variable
from distributed.core import Status
from distributed.protocol.serialize import Pickled, Serialized, ToPickle

from tests.unit.hub.small_hub import OWNER, SmallHub

Test = Callable[..., Awaitable[None]]


class Opened:
    """Notices being unpickled; equal to any other with its value."""

    count = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return open_it, (self.value,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opened) and other.value == self.value


def open_it(value: int) -> Opened:
    Opened.count += 1
    return Opened(value)


@asynccontextmanager
async def federation(address: str) -> AsyncIterator[tuple[SmallHub, Client, Client]]:
    async with SmallHub() as hub:
        await hub.listen(address)
        options = {"asynchronous": True, "set_as_default": False}
        async with Client(hub.address, **options) as one, Client(hub.address, **options) as two:
            yield hub, one, two


@pytest.fixture(params=["tcp://127.0.0.1:0", "inproc://"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(address: str, test: Test) -> None:
    async def main() -> None:
        async with federation(address) as (hub, one, two):
            await test(hub, one, two)

    asyncio.run(asyncio.wait_for(main(), 30))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_variable_is_seen_by_all_clients(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        waiting = asyncio.create_task(Variable("v", client=two).get(timeout=5))
        await Variable("v", client=one).set({"a": (1, 2)})
        assert list((await waiting)["a"]) == [1, 2]
        Variable("v", client=one).delete()
        await until(lambda: not hub.coordination.variables.variables)
        with pytest.raises(asyncio.TimeoutError):
            await Variable("v", client=two).get(timeout=0.01)

    run(address, test)


def test_a_future_in_a_variable_is_kept_until_the_variable_lets_go(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        future = await one.scatter(Opened(5))
        key = future.key
        variable = Variable("v", client=one)
        await variable.set(future)
        assert hub.wanted["variable-v"] == {key}
        taken = await Variable("v", client=two).get()
        assert taken.key == key and await taken == Opened(5)
        await until(lambda: hub.wanted[two.id] == {key})
        await variable.set(1)
        await until(lambda: "variable-v" not in hub.wanted)
        assert hub.wanted[two.id] == {key}

    run(address, test)


def test_a_failed_future_in_a_variable_raises_where_it_is_taken() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        error = await one.scatter(b"no pickle of an error, which nobody but its reader can tell")
        hub.add_key("bad", "erred", exception=hub.data[error.key], traceback=None)
        await Variable("v", client=one).set(Future("bad", one))
        taken = await Variable("v", client=two).get()
        assert taken.status == "error"
        with pytest.raises(Exception, match="nobody but its reader"):
            await taken

    run("tcp://127.0.0.1:0", test)


def test_a_taker_that_goes_away_does_not_block_the_variable() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        future = await one.scatter(1)
        variable = Variable("v", client=one)
        await variable.set(future)
        record = await two.scheduler.variable_get(name="v", client=two.id)  # and never confirms
        assert record["state"] == "memory"
        variable.delete()
        await one.scheduler.echo(data=1)
        lock = Lock("l", scheduler_rpc=one.scheduler, loop=one.loop)  # the stream of its deleter is not blocked
        assert await lock.acquire(timeout=5)
        assert "variable-v" in hub.wanted
        await two.close()
        await until(lambda: "variable-v" not in hub.wanted)

    run("tcp://127.0.0.1:0", test)


def test_a_confirmation_that_nobody_waits_for_is_taken_as_a_wish() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        future = await one.scatter(1)
        await Variable("v", client=one).set(future)
        confirmation = {"op": "variable-future-received-confirm", "name": "v", "key": future.key, "token": "forgotten"}
        two._send_to_scheduler(confirmation)
        await until(lambda: hub.wanted[two.id] == {future.key})
        assert two.id in hub.clients  # its stream lives

    run("tcp://127.0.0.1:0", test)


def test_a_queue_passes_values_and_futures_in_order(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        mine, theirs = await Queue("q", client=one), await Queue("q", client=two)
        future = await one.scatter(7)
        for value in (1, future, "x"):
            await mine.put(value)
        assert hub.wanted["queue-q"] == {future.key}
        assert await theirs.qsize() == 3 and await theirs.get() == 1
        assert await (await theirs.get()) == 7
        await until(lambda: "queue-q" not in hub.wanted)
        assert await mine.get(batch=True) == ["x"]
        await mine.put(future)
        for queue in (mine, theirs) * 2:  # awaiting a Queue counts it twice, in stock too
            queue.close()
        await until(lambda: not hub.coordination.queues.queues)
        assert "queue-q" not in hub.wanted

    run(address, test)


def test_locks_and_semaphores_exclude_across_clients(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        mine, theirs = (Lock("l", scheduler_rpc=c.scheduler, loop=c.loop) for c in (one, two))
        assert await mine.acquire()
        assert not await theirs.acquire(timeout=0.01)
        waiting = asyncio.create_task(asyncio.wait_for(theirs.acquire(), 5))
        await mine.release()
        assert await waiting
        semaphores = [Semaphore(2, "s", scheduler_rpc=c.scheduler, loop=c.loop) for c in (one, two, one)]
        for semaphore in semaphores:
            await semaphore
        assert [await s.acquire(timeout=0.01) for s in semaphores] == [True, True, False]
        assert await semaphores[0].get_value() == 2

    run(address, test)


def test_multi_locks_and_events(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        mine, theirs = MultiLock(["a", "b"], client=one), MultiLock(["b", "c"], client=two)
        assert await mine.acquire()
        assert not await theirs.acquire(timeout=0.01)
        await mine.release()
        assert await theirs.acquire(timeout=5)
        waiting = asyncio.create_task(Event("e", client=one).wait(timeout=5))
        assert not await Event("e", client=two).is_set()
        await Event("e", client=two).set()
        assert await waiting

    run(address, test)


def test_published_datasets_come_back_with_their_keys_held(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        future = await one.scatter(Opened(1))
        await one.publish_dataset({"part": [future]}, name="d")
        assert await two.list_datasets() == ["d"] or await two.list_datasets() == ("d",)
        assert hub.wanted["published-d"] == {future.key}
        with pytest.raises(KeyError, match="already exists"):
            await two.publish_dataset(1, name="d")
        copy = (await two.get_dataset("d"))["part"][0]
        assert copy.key == future.key
        await two.unpublish_dataset("d")
        assert not await one.list_datasets() and "published-d" not in hub.wanted

    run(address, test)


def test_topics_reach_their_subscribers(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        seen: list[Any] = []
        two.subscribe_topic("t", seen.append)
        await until(lambda: two.id in hub.coordination.topics.brokers[OWNER]._topics["t"].subscribers)
        await one.log_event(["t", "u"], {"x": 1})
        await one.log_event("t", ToPickle(Opened(3)))
        hub.coordination.log_event("t", "from the hub")
        await until(lambda: len(seen) == 3)
        assert [event[1] for event in seen] == [{"x": 1}, Opened(3), "from the hub"]
        assert [event[1] for event in await one.get_events("t")] == [event[1] for event in seen]
        assert [event[1] for event in await one.get_events("u")] == [{"x": 1}]
        assert set(await one.get_events()) >= {"t", "u"}
        two.unsubscribe_topic("t")
        await until(lambda: not hub.coordination.topics.brokers[OWNER]._topics["t"].subscribers)
        two.subscribe_topic("t", seen.append)
        await until(lambda: bool(hub.coordination.topics.brokers[OWNER]._topics["t"].subscribers))
        await two.close()
        await until(lambda: not hub.coordination.topics.brokers[OWNER]._topics["t"].subscribers)

    run(address, test)


def test_metadata_is_a_tree(address: str) -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        await one.set_metadata(["a", "b"], 1)
        await one.set_metadata(["a", "c"], Opened(2))
        await one.set_metadata("plain", 5)
        assert await two.get_metadata("a") == {"b": 1, "c": Opened(2)}
        await one.set_metadata(["plain", "deeper"], 6)
        assert await two.get_metadata(["plain", "deeper"]) == 6
        assert await two.get_metadata(["a", "b", "c"], default="nothing") == "nothing"
        assert await two.get_metadata("z", default=None) is None
        with pytest.raises(KeyError, match="z"):
            await two.get_metadata(["a", "z"])

    run(address, test)


def test_the_hub_keeps_values_unopened() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        Opened.count = 0
        await Variable("v", client=one).set(Opened(1))
        queue = await Queue("q", client=one)
        await queue.put([Opened(2)])
        await one.set_metadata(["a"], {"b": Opened(3)})
        await one.log_event("t", {"x": (ToPickle(Opened(4)),)})
        await one.publish_dataset(Opened(5), name="d")
        assert Opened.count == 0
        state = hub.coordination
        assert isinstance(state.variables.variables["v"]["value"], Pickled)
        assert isinstance(state.datasets.datasets["d"]["data"], Serialized)
        assert await Variable("v", client=two).get() == Opened(1)
        assert (await queue.get())[0] == Opened(2)
        assert await two.get_metadata(["a", "b"]) == Opened(3)
        assert (await two.get_events("t"))[0][1]["x"][0] == Opened(4)
        assert await two.get_dataset("d") == Opened(5)
        assert Opened.count == 5

    run("tcp://127.0.0.1:0", test)


def test_what_tasks_at_a_site_take_is_held_until_they_or_their_site_are_gone() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        future = await one.scatter(1)
        await Variable("v", client=one).set(future)
        serve = hub.coordination.serve_site
        for task in ("t1", "t2", "t3"):
            record = await serve("north", "variable_get", {"name": "v", "client": task, "timeout": 5})
            if task != "t3":
                confirm = {"name": "v", "key": future.key, "token": record["token"], "client": task}
                assert await serve("north", "variable-future-received-confirm", confirm) is None
        assert hub.wanted["north/t1"] == hub.wanted["north/t2"] == {future.key}
        await serve("north", "client-releases-keys", {"keys": [future.key], "client": "t1"})
        assert "north/t1" not in hub.wanted and "north/t2" in hub.wanted
        await serve("north", "variable_delete", {"name": "v", "client": "t1"})
        hub.coordination.site_gone("north")  # and with it t3, which never confirmed
        assert "north/t2" not in hub.wanted
        await until(lambda: "variable-v" not in hub.wanted)

    run("tcp://127.0.0.1:0", test)


def test_a_site_may_forward_coordination_only() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        for op in ("register-client", "gather", "cancel-keys"):
            with pytest.raises(ValueError, match="no coordination op"):
                await hub.coordination.serve_site("north", op, {"keys": []})

    run("tcp://127.0.0.1:0", test)


def test_a_malformed_request_ends_nothing_else() -> None:
    async def test(hub: SmallHub, one: Client, two: Client) -> None:
        with pytest.raises(TypeError):
            await two.scheduler.variable_set(name=Opened(1), data=1)  # a name that cannot be hashed unopened
        with pytest.raises(TypeError):
            await two.scheduler.get_metadata(path="x")
        await Variable("v", client=two).set(1)
        assert await Variable("v", client=one).get() == 1
        assert hub.status == Status.running

    run("tcp://127.0.0.1:0", test)
