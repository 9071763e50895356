"""Tasks at two sites share Locks, Queues, Variables, Events and datasets through agents and a hub."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import dask
import distributed
import pytest
from distributed import Client, Event, Future, LocalCluster, Lock, MultiLock, Queue, Semaphore, Variable, get_client

from daskfed.comm.opaque import OpaquePool, OpaqueServer
from daskfed.site.forwarding import ForwardCoordination, agent_handlers
from tests.system.commands import NO_DASHBOARD
from tests.unit.hub.small_hub import OWNER, SmallHub

pytestmark = pytest.mark.system

SITES = {"north": {"processes": False}, "south": {"processes": True}}


class SmallAgent(OpaqueServer):
    """An agent that forwards coordination, holds what its tasks put and fetches what they take."""

    def __init__(self, site: str, hub: SmallHub, here: Client, homes: dict[Any, Client]) -> None:
        self.token = f"token of {site}"
        super().__init__(agent_handlers(self, self.token))
        self.site = site
        self.hub = hub
        self.here = here  # a client of the site's own scheduler
        self.homes = homes  # where each announced key is
        self.announced: list[Any] = []
        self.held: list[Future] = []

    async def call_hub(self, op: str, **kwargs: Any) -> Any:
        return await self.rpc.call(self.hub.address, "from-site", site=self.site, hub_op=op, kwargs=kwargs)

    async def announce_keys(self, keys: Mapping[Any, int | None]) -> None:
        for key, nbytes in keys.items():
            self.announced.append(key)
            self.held.append(Future(key, self.here, state=None if nbytes is None else "memory"))
            self.homes[key] = self.here
            self.hub.add_key(key, "memory")

    async def bring_keys(self, keys: Collection[Any]) -> None:
        for key in keys:
            if (home := self.homes[key]) is not self.here:
                home._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})  # and so hear how it stands
                value = await Future(key, home)
                self.held.append(list((await self.here.scatter({key: value})).values())[0])

    async def register(self) -> None:
        """Make the site's scheduler forward to this agent."""
        plugin = ForwardCoordination(self.address, self.token, self.here.id)
        await self.here.scheduler.register_scheduler_plugin(
            plugin=pickle.dumps(plugin), name=plugin.name, idempotent=False
        )


class Federation:
    """A hub, and by site an agent and a client whose tasks run there."""

    def __init__(self, hub: SmallHub) -> None:
        self.hub = hub
        self.agents: dict[str, SmallAgent] = {}
        self.homes: dict[Any, Client] = {}

    async def at(self, site: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run a task at a site and return its result."""
        return await self.agents[site].here.submit(function, *args, pure=False)


@asynccontextmanager
async def federation() -> AsyncIterator[Federation]:
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(SmallHub())
        await hub.listen("tcp://127.0.0.1:0")
        fed = Federation(hub)
        for site, options in SITES.items():
            cluster = LocalCluster(
                n_workers=1, threads_per_worker=4, asynchronous=True, **NO_DASHBOARD, **options
            )
            await stack.enter_async_context(cluster)
            here = await stack.enter_async_context(Client(cluster, asynchronous=True, set_as_default=False))
            agent = await stack.enter_async_context(SmallAgent(site, hub, here, fed.homes))
            await agent.listen("tcp://127.0.0.1:0")
            await agent.register()
            fed.agents[site] = agent
        yield fed


def run(test: Callable[[Federation], Awaitable[None]]) -> None:
    async def main() -> None:
        async with federation() as fed:
            await test(fed)

    asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class Thing:
    """Something that msgpack cannot write."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return make_thing, (self.value,)

    def __eq__(self, other: object) -> bool:
        return type(other).__name__ == "Thing" and other.value == self.value  # type: ignore[attr-defined]


def make_thing(value: int) -> Thing:
    return Thing(value)


def add_under_lock(times: int) -> None:
    for _ in range(times):
        with Lock("counting"):
            total = Variable("total")
            total.set(total.get(timeout=10) + 1)


def wait_for_event(name: str) -> bool:
    return bool(Event(name).wait(timeout=20))


def test_locks_variables_and_events_are_shared() -> None:
    async def test(fed: Federation) -> None:
        await fed.at("north", lambda: Variable("total").set(0))
        await asyncio.gather(*(fed.at(site, add_under_lock, 5) for site in SITES for _ in range(2)))
        assert await fed.at("south", lambda: Variable("total").get()) == 20

        waiting = asyncio.create_task(fed.at("north", wait_for_event, "go"))
        assert not await fed.at("south", lambda: Event("go").is_set())
        await fed.at("south", lambda: Event("go").set())
        assert await waiting

        async with Client(fed.hub.address, asynchronous=True, set_as_default=False) as client:
            assert await Variable("total", client=client).get() == 20
            await Variable("from outside", client=client).set(Thing(4))
        assert await fed.at("north", lambda: Variable("from outside").get(timeout=5).value) == 4
        assert await fed.at("south", lambda: Variable("from outside").get(timeout=5).value) == 4
        await fed.at("south", lambda: Variable("total").delete())
        await until(lambda: "total" not in fed.hub.coordination.variables.variables)

    run(test)


def put_things(name: str) -> None:
    queue = Queue(name)
    for value in (1, Thing(2), [Thing(3)], {"a": b"4"}):
        queue.put(value)


def get_things(name: str) -> list[Any]:
    queue = Queue(name)
    return [queue.get(timeout=10) for _ in range(4)]


def hold_both(names: list[str]) -> bool:
    lock = MultiLock(names)
    assert lock.acquire(timeout=10)
    other = MultiLock(names[:1])
    try:
        return bool(other.acquire(timeout=0.05))
    finally:
        lock.release()


def take_leases(number: int) -> list[bool]:
    return [Semaphore(3, "three").acquire(timeout=0.05) for _ in range(number)]


def test_queues_semaphores_and_multi_locks_are_shared() -> None:
    async def test(fed: Federation) -> None:
        for there, here in (("north", "south"), ("south", "north")):
            await fed.at(there, put_things, f"to {here}")
            things = await fed.at(here, get_things, f"to {here}")
            assert [things[0], things[1], things[2][0], things[3]["a"]] == [1, Thing(2), Thing(3), b"4"]
        assert await fed.at("north", take_leases, 2) == [True, True]
        assert await fed.at("south", take_leases, 2) == [True, False]
        assert not await fed.at("north", hold_both, ["a", "b"])
        assert not await fed.at("south", hold_both, ["b", "c"])

    run(test)


def put_future(name: str) -> str:
    future = get_client().submit(make_thing, 7, pure=False)
    Variable(name).set(future)
    return str(future.key)


def take_future(name: str) -> tuple[str, int]:
    future = Variable(name).get(timeout=10)
    return str(future.key), future.result(timeout=10).value


def put_future_in_queue(name: str) -> None:
    Queue(name).put(get_client().submit(make_thing, 8, pure=False))


def take_future_from_queue(name: str) -> int:
    return int(Queue(name).get(timeout=10).result(timeout=10).value)


def publish(name: str) -> None:
    client = get_client()
    client.publish_dataset([client.submit(make_thing, 9, pure=False)], name=name)


def read_dataset(name: str) -> int:
    return int(get_client().get_dataset(name)[0].result(timeout=10).value)


def test_a_future_that_a_task_made_can_be_taken_elsewhere() -> None:
    async def test(fed: Federation) -> None:
        for there, here in (("north", "south"), ("south", "north")):
            key = await fed.at(there, put_future, f"v {there}")
            assert fed.agents[there].announced == [key]
            assert await fed.at(here, take_future, f"v {there}") == (key, 7)
            await until(lambda key=key: key not in taken_by_tasks(fed))  # type: ignore[misc]
            assert fed.hub.wanted[f"variable-v {there}"] == {key}
            await fed.at(there, put_future_in_queue, f"q {there}")
            assert await fed.at(here, take_future_from_queue, f"q {there}") == 8
            await fed.at(there, publish, f"d {there}")
            assert await fed.at(here, read_dataset, f"d {there}") == 9
            assert fed.agents[here].announced == [] or here == "north"

    run(test)


def taken_by_tasks(fed: Federation) -> set[Any]:
    """The keys that the hub holds for tasks at a site."""
    return {key for client, keys in fed.hub.wanted.items() if client.startswith(tuple(SITES)) for key in keys}


def take_and_keep(name: str) -> None:
    distributed.get_worker().kept = Variable(name).get(timeout=10)


def clients_that_want(key: Any, dask_scheduler: Any) -> set[str]:
    return {client.client_key for client in dask_scheduler.tasks[key].who_wants}


def test_what_a_task_keeps_is_held_until_its_client_is_gone() -> None:
    async def test(fed: Federation) -> None:
        key = await fed.at("north", put_future, "v")
        await fed.at("south", take_and_keep, "v")
        await until(lambda: key in taken_by_tasks(fed))
        north = fed.agents["north"].here
        clients = await north.run_on_scheduler(clients_that_want, key)
        assert clients == {north.id}  # the task that put it lets go of it at the site
        await fed.agents["south"].here.restart()
        await until(lambda: key not in taken_by_tasks(fed))

    run(test)


def fail_to_get(name: str) -> str:
    try:
        Variable(name).get(timeout=0.05)
    except TimeoutError as exc:
        return type(exc).__name__
    return "no error"


def say(text: str) -> None:
    distributed.print(text)
    distributed.get_worker().log_event(["mine", "worker-own"], {"text": text})


def test_errors_come_back_and_events_go_up() -> None:
    async def test(fed: Federation) -> None:
        for site in SITES:
            await fed.agents[site].register()  # again: events are not to come twice
            assert await fed.at(site, fail_to_get, "nothing") == "TimeoutError"
            with pytest.raises(RuntimeError, match="Semaphore or Lock `gone` not known"):
                await fed.at(site, use_unknown_lock)
            await fed.at(site, say, f"hello from {site}")
        broker = fed.hub.coordination.topics.brokers[OWNER]
        await until(lambda: len(broker.get_events("mine")) == len(broker.get_events("print")) == 2)
        assert [event[1]["text"] for event in broker.get_events("mine")] == [f"hello from {site}" for site in SITES]
        assert broker.get_events("worker-own") == ()
        assert len(await fed.agents["north"].here.get_events("worker-own")) == 1

    run(test)


def use_unknown_lock() -> None:
    client = get_client()
    client.sync(client.scheduler.semaphore_acquire, name="gone", timeout=1, lease_id="x")


def test_only_the_agent_that_registered_last_is_asked_and_only_by_its_site() -> None:
    async def test(fed: Federation) -> None:
        agent = fed.agents["south"]
        async with SmallAgent("south", fed.hub, agent.here, fed.homes) as later:
            later.token = "another"
            later.handlers.update(agent_handlers(later, later.token))
            await later.listen("tcp://127.0.0.1:0")
            await later.register()
            await agent.close()
            await fed.at("south", lambda: Variable("v").set(5))
            assert fed.hub.coordination.variables.variables["v"]["value"] == 5
            async with OpaquePool() as pool:
                with pytest.raises(Exception, match="the token is not this agent's"):
                    await pool.call(later.address, "forward-to-hub", token="wrong", hub_op="variable_get", kwargs={})
        with pytest.raises(OSError):  # no agent, no coordination: better than one that only this site sees
            await fed.at("south", lambda: Variable("v").set(6))

    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
        run(test)
