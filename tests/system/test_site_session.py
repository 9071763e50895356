"""A session with a real scheduler and worker in this process: what Dask remembers of keys must not fool the site."""

from __future__ import annotations

import asyncio
import operator
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import dask
import pytest
from distributed import Client, Scheduler, Worker, wait
from distributed.protocol.serialize import serialize

from daskfed.comm.opaque import OpaqueServer
from daskfed.dask_private import LLGExpr, Serialized, Task, TaskRef
from daskfed.data.parcels import Parcel, pack
from daskfed.data.transfer import Door
from daskfed.errors import TransferError
from daskfed.messages import (
    Attempt,
    BlockKind,
    BlockLost,
    BlockSpec,
    CancelBlock,
    CopyKeys,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    Learned,
    Message,
    ReleaseKeys,
    RunBlock,
    SiteStatus,
)
from daskfed.site import stuck
from daskfed.site.reporting import SiteReporter
from daskfed.site.session import Session

pytestmark = pytest.mark.system


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the scheduler look for stuck tasks often."""
    monkeypatch.setattr(stuck, "LOOK_S", 0.1)


class Elsewhere:
    """The hub and all other sites: remembers what it is told, and has the values in ``values``."""

    epoch = 1
    federation = "secret"

    def __init__(self) -> None:
        self.told: deque[tuple[Message, Any]] = deque()
        self.values: dict[Key, Any] = {}

    def send(self, message: Message, payload: Any = None) -> None:
        self.told.append((message, payload))

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        raise AssertionError(op)

    async def door_of(self, site: str) -> Door:
        return Door("")

    async def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        for key in keys:
            if key in self.values:
                for message in pack({key: Parcel.of(Serialized(*serialize(self.values[key])))}):
                    yield message
        yield {"end": True, "error": "nobody has it"}


class Site:
    """A session, its scheduler, and the world around it."""

    def __init__(self, session: Session, scheduler: Scheduler, world: Elsewhere) -> None:
        self.session = session
        self.scheduler = scheduler
        self.world = world
        self.blocks = 0

    def send(self, message: Message) -> None:
        self.session.take_message(message)

    def run(self, graph: dict[Key, Any], *imports: Import, outputs: tuple[Key, ...] = ()) -> RunBlock:
        """Run a graph of (function, *args), where TaskRefs are inputs."""
        self.blocks += 1
        tasks = {key: Task(key, function, *args) for key, (function, *args) in graph.items()}
        inputs = {arg.key: None for _, *args in graph.values() for arg in args if isinstance(arg, TaskRef)}
        needed = tuple(key for key in inputs if key not in graph)
        spec = BlockSpec(f"b{self.blocks}", "c", "u", BlockKind.GRAPH, needed, outputs or tuple(graph), len(graph), ())
        expr = LLGExpr(tasks, _determ_token=secrets.token_hex(8))
        message = RunBlock(spec, Attempt(1, self.blocks), imports, 1.0)
        payload = {"expr": Serialized(*serialize(expr)), "priorities": None}
        self.session.take_message(message, {"block": payload})
        return message

    async def told(self, fits: Callable[[Message], bool]) -> Any:
        async with asyncio.timeout(20):
            while True:
                self.session.core.check()
                for entry in self.world.told:
                    if fits(entry[0]):
                        self.world.told.remove(entry)
                        return entry[0]
                await asyncio.sleep(0.002)

    async def told_of(self, kind: type[Message]) -> Any:
        return await self.told(lambda message: isinstance(message, kind))

    async def made(self, key: Key) -> KeysMade:
        def fits(message: Message) -> bool:
            return isinstance(message, KeysMade) and key in [made.key for made in message.keys]

        found: KeysMade = await self.told(fits)
        return found

    async def failed(self, key: Key) -> KeysFailed:
        found: KeysFailed = await self.told(lambda message: isinstance(message, KeysFailed) and key in message.keys)
        return found

    async def value(self, key: Key) -> Any:
        """Return a value of this process, which stays as it is on the way."""
        return (await self.session.gather_values([key]))[key].data

    async def release(self, *keys: Key) -> None:
        """Release keys and wait until the scheduler has heard of it."""
        self.send(ReleaseKeys(keys))
        await self.session.wire.quiet(keys)


@asynccontextmanager
async def running() -> AsyncIterator[Site]:
    world = Elsewhere()
    door = OpaqueServer({})
    await door.listen("inproc://")
    await door.start()
    scheduler = Scheduler(protocol="inproc://", dashboard=False, dashboard_address=":0")
    async with scheduler, Worker(scheduler.address, nthreads=1):
        session = Session(scheduler.address, door.address, "token", on_stop=print, on_scheduler_lost=lambda: None)
        door.handlers["get-import"] = _import_handler(session)
        await session.start()
        await session.join(world, world)
        yield Site(session, scheduler, world)
        await session.close()
    await door.close()


@asynccontextmanager
async def reported(site: Site) -> AsyncIterator[tuple[Client, SiteReporter]]:
    """A stock client of the site's scheduler, with what the agent's client has there."""
    async with Client(site.scheduler.address, asynchronous=True) as client:
        reporter = SiteReporter(client.id)
        site.scheduler.add_plugin(reporter)
        await reporter.start(site.scheduler)
        yield client, reporter


def _import_handler(session: Session) -> Callable[..., Any]:
    async def get_import(key: Key, token: str) -> dict[str, Any]:
        assert token == "token"
        return session.import_for_worker(key)

    return get_import


def check(story: Callable[[Site], Any]) -> None:
    async def within() -> None:
        async with running() as site:
            await story(site)

    asyncio.run(asyncio.wait_for(within(), 60))


X, Y = TaskRef("x"), TaskRef("y")


def slow_add(x: int, y: int) -> int:
    time.sleep(0.2)
    return x + y


def fail() -> None:
    raise ZeroDivisionError


runs: list[None] = []


def fail_to_arrive(after_s: float) -> None:
    """What a fetch task does whose agent no longer has the value."""
    time.sleep(after_s)
    raise TransferError("dropped")


def succeed_once() -> int:
    runs.append(None)
    return 1 // (len(runs) == 1)


def test_a_key_that_was_made_here_before_and_is_imported_now_is_not_computed_again() -> None:
    async def story(site: Site) -> None:
        site.run({"x": (operator.add, 1, 2), "y": (operator.mul, X, 10)})
        await site.made("y")
        await site.release("x")
        assert "x" in site.scheduler.tasks  # Dask remembers it, as y was made from it
        site.world.values["x"] = 1000
        site.run({"z": (operator.add, X, 1)}, Import("x", "north", 28))
        await site.made("z")
        assert await site.value("z") == 1001
        assert (await site.told_of(KeyImported)).source == "north"

    check(story)


def test_an_import_does_not_wait_for_what_its_key_was_made_from_here_before() -> None:
    async def story(site: Site) -> None:
        graph = {"w": (operator.add, 1, 2), "x": (operator.neg, TaskRef("w")), "y": (operator.mul, X, 10)}
        site.run(graph, outputs=("x", "y"))
        await site.made("y")
        await site.release("x")
        site.world.values["x"] = 1000
        site.run({"z": (operator.add, X, 1)}, Import("x", "north", 28))
        await site.made("z")
        assert await site.value("z") == 1001

    check(story)


def test_an_import_does_not_wait_for_what_only_a_worker_remembers() -> None:
    async def story(site: Site) -> None:
        site.run(
            {"w": (operator.add, 1, 2), "x": (operator.neg, TaskRef("w")), "y": (slow_add, X, 10)}, outputs=("x", "y")
        )
        await site.made("x")
        await site.release("x", "y")  # the worker goes on with y, and knows x until it ends
        site.world.values["x"] = -3
        site.run({"z": (operator.add, X, 1)}, Import("x", "north", 28))
        await site.made("z")
        assert await site.value("z") == -2

    check(story)


def test_a_key_that_was_imported_before_and_is_made_here_now_is_computed() -> None:
    async def story(site: Site) -> None:
        site.world.values["x"] = 1000
        site.run({"y": (operator.add, X, 1)}, Import("x", "north", 28))
        await site.made("y")
        await site.release("x")
        del site.world.values["x"]
        site.run({"x": (operator.add, 1, 2), "z": (operator.add, X, 1)}, outputs=("z",))
        await site.made("z")
        assert await site.value("z") == 4

    check(story)


def test_a_key_that_failed_here_before_and_exists_elsewhere_now_is_brought_in() -> None:
    async def story(site: Site) -> None:
        site.run({"x": (fail,), "y": (operator.add, X, 1)})
        for key in "xy":
            await site.failed(key)
        await site.release("x")
        assert site.scheduler.tasks["x"].state == "erred"  # Dask remembers it for the sake of y
        site.world.values["x"] = 1000
        site.run({"z": (operator.add, X, 1)}, Import("x", "north", 28))
        await site.made("z")
        assert await site.value("z") == 1001

    check(story)


def test_a_task_of_a_failed_input_fails_also_where_a_dependent_of_it_comes_first() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, _):
            failed = client.submit(fail)
            await wait(failed)
            first = dask.delayed(abs)(failed)
            with dask.annotate(priority=10):
                second = dask.delayed(abs)(first)
            futures = client.compute([first, second], optimize_graph=False)
            await wait(futures, timeout=10)
            assert [future.status for future in futures] == ["error", "error"]

    check(story)


def test_a_graph_that_names_a_known_key_with_other_dependencies_is_taken_in() -> None:
    """What only the other way to make that key needs is forgotten before anybody looks for failures."""

    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter):
            known = client.submit(operator.add, 1, 2, key="z")
            await wait(known)
            site.scheduler.new_task("a", None, "released")
            reporter.update_graph(site.scheduler, client=client.id, keys=["z"], tasks=["z", "a"])
            assert "a" not in site.scheduler.tasks and await known == 3

    check(story)


def test_a_task_of_no_use_is_forgotten() -> None:
    """As Dask leaves it, with all that it was made from, where what needs it is forgotten while it is put back."""

    async def story(site: Site) -> None:
        async with reported(site) as (client, _):
            future = client.submit(operator.add, 1, 2, key="z")
            await wait(future)
            task = site.scheduler.tasks["z"]
            for each in list(task.who_wants):
                each.wants_what.discard(task)
            task.who_wants.clear()
            site.scheduler.transitions({"z": "released"}, "test")
            assert task.state == "released"
            while "z" in site.scheduler.tasks:
                await asyncio.sleep(0.01)

    check(story)


def test_a_task_that_failed_from_an_input_which_is_mended_now_runs_again() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter):
            graph = {"x": (fail,), "i": (abs, "x"), "w": (abs, "i")}
            (w,) = client.get(graph, ["w"], sync=False)
            await wait(w)
            assert site.scheduler.tasks["i"].state == "erred"
            reporter.expect_imports(["x"], client.id)
            reporter.renew(client.id)
            (i,) = client.get({"x": (abs, -5), "i": (abs, "x")}, ["i"], sync=False)
            assert await i.result(timeout=10) == 5 and w.status == "error"

    check(story)


def test_an_import_that_was_let_go_of_while_a_task_waited_for_it_may_fail_and_is_made_here_next() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter):
            known = site.scheduler.tasks
            reporter.expect_imports(["x"], client.id)
            (x,) = client.get({"x": (fail_to_arrive, 0.5)}, ["x"], sync=False)
            graph = {"x": (operator.add, 1, 2), "y": (operator.add, X, 1), "z": (operator.neg, X)}
            y, z = client.get(graph, ["y", "z"], sync=False)
            while "x" not in known or len(known["x"].waiters) < 2:
                await asyncio.sleep(0.01)
            x.release()
            while known["x"].who_wants:
                await asyncio.sleep(0.01)
            reporter.end_imports(["x"], client.id)
            await wait([y, z])
            assert reporter.failed_imports == {"x"}  # so it is told as what it is, and not as a fault of y
            y.release()
            while "y" in known:
                await asyncio.sleep(0.01)
            reporter.renew(client.id)
            assert "x" not in known and known["z"].state == "erred"
            (y,) = client.get(graph, ["y"], sync=False)
            assert await y.result(timeout=10) == 4 and z.status == "error"

    check(story)


def test_many_imports_go_to_workers_at_once_and_to_all_alike() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter), Worker(site.scheduler.address, nthreads=1):
            local = client.map(abs, range(20), key=[("x", -n) for n in range(1, 21)])
            await wait(local)
            names = [("x", n) for n in range(20)]
            reporter.expect_imports(names, client.id)
            imports = client.get({name: (slow_abs, -7) for name in names}, names, sync=False)
            while names[-1] not in site.scheduler.tasks:
                await asyncio.sleep(0.01)
            tasks = [site.scheduler.tasks[name] for name in names]
            assert {task.state for task in tasks} <= {"processing", "memory"}  # none is queued
            await wait(imports)
            places = Counter(worker.address for task in tasks for worker in task.who_has)
            assert len(places) == 2 and min(places.values()) >= 5
            assert not any(task.worker_restrictions for task in tasks)

    check(story)


def test_an_import_whose_worker_ends_goes_to_the_next_one() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter):
            await client.retire_workers(list(site.scheduler.workers))
            async with Worker(site.scheduler.address, nthreads=1) as doomed:
                reporter.expect_imports(["x"], client.id)
                (x,) = client.get({"x": (slow_add, 3, 4)}, ["x"], sync=False)
                while "x" not in site.scheduler.tasks or site.scheduler.tasks["x"].state != "processing":
                    await asyncio.sleep(0.001)
                await site.scheduler.remove_worker(doomed.address, stimulus_id="test")
                assert site.scheduler.tasks["x"].state in ("no-worker", "queued")
            async with Worker(site.scheduler.address, nthreads=1):
                assert await x.result(timeout=10) == 7

    check(story)


def slow_abs(n: int) -> int:
    time.sleep(0.05)
    return abs(n)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_value_that_is_lost_while_what_it_came_from_has_failed_is_told_as_lost(steps: int) -> None:
    """Dask would neither make it again nor fail it, however many steps away that was."""

    async def story(site: Site) -> None:
        runs.clear()
        graph = {"x": (succeed_once,), "y": (operator.add, X, 1), "z": (operator.add, Y, 1)}
        last = list(graph)[steps]
        site.run(dict(list(graph.items())[: steps + 1]), outputs=("x", last))
        await site.made(last)
        await site.release("x")
        site.run({"x": (succeed_once,)})
        await site.failed("x")
        (worker,) = site.scheduler.workers
        await site.scheduler.remove_worker(worker, stimulus_id="test")
        assert (await site.told_of(KeysLost)).keys == (last,)

    check(story)


def test_a_value_that_exists_can_be_used_though_what_it_came_from_has_failed_since() -> None:
    """Dask would take it for failed as soon as a graph needs it."""

    async def story(site: Site) -> None:
        runs.clear()
        site.run({"x": (succeed_once,), "y": (operator.add, X, 1)}, outputs=("x", "y"))
        await site.made("y")
        await site.release("x")
        site.run({"x": (succeed_once,)})
        await site.failed("x")
        site.run({"z": (operator.add, Y, 1)})
        await site.made("z")
        assert await site.value("z") == await site.value("y") + 1
        (worker,) = site.scheduler.workers
        await site.scheduler.remove_worker(worker, stimulus_id="test")
        assert {key for _ in range(2) for key in (await site.told_of(KeysLost)).keys} == {"y", "z"}

    check(story)


def test_a_key_that_no_worker_has_though_it_is_held_is_given_up_by_whoever_asks_for_it() -> None:
    async def story(site: Site) -> None:
        site.run({"x": (operator.add, 1, 2)})
        await site.made("x")
        site.scheduler.remove_all_replicas(site.scheduler.tasks["x"])  # and nobody notices
        assert await site.session.gather_values(["x", "nobody knows this"]) == {}
        assert (await site.told_of(KeysLost)).keys == ("x",) and site.session.core.keys == {}

    check(story)


def test_a_large_import_is_fetched_from_the_agent_whose_memory_is_then_free() -> None:
    async def story(site: Site) -> None:
        site.world.values["x"] = "x" * 10**6
        site.run({"n": (len, X)}, Import("x", "north", 10**6))
        await site.made("n")
        assert await site.value("n") == 10**6
        assert site.session.parcels == {}

    check(story)


def test_an_import_that_the_agent_no_longer_has_is_no_fault_of_the_tasks() -> None:
    async def story(site: Site) -> None:
        site.session.import_for_worker = lambda key: {"status": "error", "reason": "dropped"}  # type: ignore[method-assign]
        site.world.values["x"] = "x" * 10**6
        site.run({"n": (len, X)}, Import("x", "north", 10**6))
        lost = await site.told_of(BlockLost)
        assert "'x'" in lost.reason and "could not be brought in" in lost.reason
        assert (await site.told_of(ImportFailed)).key == "x"
        assert site.session.parcels == {} and site.session.core.keys == {}

    check(story)


def test_an_import_that_has_landed_is_never_fetched_again() -> None:
    async def story(site: Site) -> None:
        site.world.values["x"] = 1000
        site.send(CopyKeys((Import("x", "north", 28),)))
        await site.told_of(KeyImported)
        task = site.scheduler.tasks["x"]
        assert task.state == "memory" and task.run_spec is None
        (worker,) = site.scheduler.workers
        await site.scheduler.remove_worker(worker, stimulus_id="test")
        assert (await site.told_of(KeysLost)).keys == ("x",)

    check(story)


def test_a_block_that_uses_a_key_which_is_gone_is_given_back() -> None:
    async def story(site: Site) -> None:
        site.world.values["x"] = 1000
        site.send(CopyKeys((Import("x", "north", 28),)))
        await site.told_of(KeyImported)
        site.scheduler.client_releases_keys(["x"], client=site.session.client)  # behind the agent's back
        block = site.run({"y": (operator.add, X, 1)})
        lost = await site.told_of(BlockLost)
        assert (lost.block, lost.attempt) == (block.block.id, block.attempt)

    check(story)


def test_a_key_that_is_released_and_made_again_and_again_is_reported_once_each_time() -> None:
    async def story(site: Site) -> None:
        for i in range(50):
            block = site.run({"x": (operator.add, 1, i)})
            if i % 3 == 0:
                await site.made("x")
                site.send(ReleaseKeys(("x",)))
            else:
                await asyncio.sleep(0.001 * (i % 4))  # while it runs, or just when it is made
                site.send(CancelBlock(block.block.id, block.attempt))
        last = site.run({"x": (operator.add, 1, 1000)})
        made = await site.told(lambda message: isinstance(message, KeysMade) and message.attempt == last.attempt)
        assert made.block == last.block.id and await site.value("x") == 1001
        site.world.told = deque(entry for entry in site.world.told if not isinstance(entry[0], SiteStatus | Learned))
        assert not [message for message, _ in site.world.told if isinstance(message, BlockLost | KeysLost | KeysFailed)]

    check(story)


def test_a_report_that_is_overtaken_by_a_release_is_not_taken_for_that_of_the_next_attempt() -> None:
    async def story(site: Site) -> None:
        first = site.run({"x": (operator.add, 1, 2)})
        while "x" not in site.scheduler.tasks or site.scheduler.tasks["x"].state != "memory":
            await asyncio.sleep(0)
        assert not site.session.core.holds("x")  # the report is still on its way
        site.send(CancelBlock(first.block.id, first.attempt))
        second = site.run({"x": (slow_add, 1, 1000)})
        made = await site.made("x")
        assert made.attempt == second.attempt and site.scheduler.tasks["x"].state == "memory"
        assert await site.value("x") == 1001

    check(story)


def test_a_load_report_never_forgets_a_block() -> None:
    async def story(site: Site) -> None:
        for i in range(5):
            site.run({(f"t{i}", j): (operator.add, i, j) for j in range(20)})
        for i in range(5):
            await site.made((f"t{i}", 19))
        async with asyncio.timeout(10):
            while site.session.core.runway.tasks() or site.session.core.runway._unseen:
                await asyncio.sleep(0.01)
        assert site.session.core.runway.submitted == 5 and not site.session.core.runway.pending

    check(story)


def test_what_is_learnt_leaves_imports_out() -> None:
    async def story(site: Site) -> None:
        site.world.values["import-1"] = 1
        site.run({("own", 1): (operator.add, TaskRef("import-1"), 2)}, Import("import-1", "north", 28))
        learned = await site.told_of(Learned)
        ((prefix, count, seconds),) = learned.durations
        assert (prefix, count) == ("own", 1) and 0 <= seconds < 10
        assert learned.sizes == (("own", 1, 28),)

    check(story)


def test_the_scheduler_forgets_everything_with_the_session() -> None:
    async def story(site: Site) -> None:
        site.run({"x": (operator.add, 1, 2)})
        await site.made("x")
        await site.session.close()
        async with asyncio.timeout(10):
            while site.scheduler.tasks or any("daskfed-reporter" in name for name in site.scheduler.plugins):
                await asyncio.sleep(0.01)

    check(story)


def test_an_import_is_one_also_where_what_had_its_name_ends_while_the_scheduler_takes_it_in() -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, reporter):
            former = client.submit(slow_add, 1, 2, key="x")
            while "x" not in site.scheduler.tasks:
                await asyncio.sleep(0.001)
            reporter.expect_imports(["x"], client.id)
            former.release()
            while "x" in site.scheduler.tasks:
                await asyncio.sleep(0.001)
            (x,) = client.get({"x": (abs, -5)}, ["x"], sync=False)
            assert await x.result(timeout=10) == 5
            assert site.scheduler.tasks["x"].run_spec is None  # data: it is not fetched again
            assert not reporter.importing

    check(story)


def worker_of(site: Site) -> Worker:
    (address,) = site.scheduler.workers
    return next(worker for worker in Worker._instances if worker.address == address)


def test_a_task_that_a_worker_was_told_to_run_and_does_not_know_is_given_out_again(looks: None) -> None:
    async def story(site: Site) -> None:
        handlers = worker_of(site).stream_handlers
        proper, lost = handlers["compute-task"], []
        handlers["compute-task"] = lambda **message: lost.append(message)
        site.run({"x": (operator.add, 1, 2)})
        while not lost:
            await asyncio.sleep(0.001)
        handlers["compute-task"] = proper
        await site.made("x")
        assert await site.value("x") == 3

    check(story)


def test_a_result_that_only_the_scheduler_believes_in_is_made_again(looks: None) -> None:
    """Its dependents wait at the worker, which asks for it again and again, and is told that it has it."""

    async def story(site: Site) -> None:
        site.run({"x": (operator.add, 1, 2)})
        await site.made("x")
        worker = worker_of(site)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(worker, "batched_send", lambda message: None)
            worker.stream_handlers["free-keys"](keys=["x"], stimulus_id="test")
        site.run({"y": (operator.mul, X, 10)})
        await site.made("y")
        assert await site.value("y") == 30 and await site.value("x") == 3

    check(story)


def test_a_task_that_waits_for_inputs_of_another_which_had_its_name_is_given_out_again(looks: None) -> None:
    async def story(site: Site) -> None:
        async with reported(site) as (client, _):
            graph = {"w": (operator.add, 1, 2), "x": (operator.neg, "w"), "y": (slow_add, "x", 10)}
            x, y = client.get(graph, ["x", "y"], sync=False)
            await wait(x)
            x.release()
            y.release()  # the worker goes on with it, and knows x and what that was made from
            while "x" in site.scheduler.tasks:
                await asyncio.sleep(0.001)
            again = client.submit(operator.add, 3, 4, key="x")
            assert await again.result(timeout=10) == 7

    check(story)


def test_tasks_that_run_or_wait_their_turn_for_long_are_left_alone(looks: None) -> None:
    async def story(site: Site) -> None:
        runs.clear()
        site.run({"w": (sleep_and_note, 1.5)}, outputs=("w",))
        for i in range(3):
            site.run({f"x{i}": (sleep_and_note, 0)})  # blocks of their own: of one, all may be told in one message
        for key in ("w", "x0", "x1", "x2"):
            await site.made(key)
        assert len(runs) == 4

    check(story)


def sleep_and_note(seconds: float) -> None:
    time.sleep(seconds)
    runs.append(None)
