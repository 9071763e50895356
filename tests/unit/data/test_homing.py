"""A worker takes small imports over without a thread, unless something speaks against it."""

from __future__ import annotations

import asyncio
import operator
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import dask
import pytest
from distributed import Client, Scheduler, Status, Worker
from distributed.actor import Actor
from distributed.protocol.serialize import serialize

from daskfed.dask_private import Serialized, Task, TaskRef
from daskfed.data.fetch import ON_THE_WAY_S, by_value, give_back, open_import
from daskfed.data.homing import INLINE, ActorElsewhere, Homing
from daskfed.data.parcels import Parcel


@dataclass
class Place:
    """A worker with the plugin, its scheduler and a client."""

    scheduler: Scheduler
    worker: Worker
    client: Any

    def bring(self, key: str, value: Any, checksum: int | None = None) -> Any:
        """Submit a small import, as an agent does, and return its future."""
        parcel = Parcel.of(value)
        frames = [bytes(frame) for frame in parcel.frames]
        found = parcel.checksum if checksum is None else checksum
        with dask.annotate(**{INLINE: True}):
            return self.client.submit(open_import, parcel.header, frames, found, key=key)

    def give(self, task: Any, *annotations: str, **who_has: list[str]) -> None:
        """Have the worker told to run a task, of which its scheduler knows nothing."""
        self.worker.stream_handlers["compute-task"](
            key=task.key, run_spec=task, annotations=dict.fromkeys(annotations, True), who_has=who_has,
            nbytes=dict.fromkeys(who_has, 8), run_id=1, priority=(0,), resource_restrictions={}, actor=False,
            span_id=None, stimulus_id="test",
        )  # fmt: skip

    def was_executed(self, key: str) -> bool:
        """Say whether a thread of the worker had the task."""
        return any("executing" in entry for entry in self.worker.state.story(key))


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    async with Scheduler(port=0, dashboard_address=":0", host="127.0.0.1") as scheduler:
        async with Worker(scheduler.address, host="127.0.0.1", nthreads=1) as worker:
            async with Client(scheduler.address, asynchronous=True) as client:
                await client.register_plugin(Homing())
                yield Place(scheduler, worker, client)


def in_a_place(check: Callable[[Place], Awaitable[None]]) -> None:
    async def run() -> None:
        async with place() as found:
            await asyncio.wait_for(check(found), 30)

    asyncio.run(run())


def serialized(value: Any) -> Any:
    """Return a value as it leaves its worker."""
    return Serialized(*serialize(value))


def test_a_small_import_lands_without_a_thread_and_counts_as_any_result() -> None:
    async def check(place: Place) -> None:
        future = place.bring("x", serialized([1, 2]))
        assert await place.client.submit(sum, future, key="y") == 3
        assert await future == [1, 2]
        assert not place.was_executed("x")
        assert place.was_executed("y")
        assert place.scheduler.tasks["x"].nbytes > 0
        future.release()
        while "x" in place.worker.data or "x" in place.scheduler.tasks:
            await asyncio.sleep(0.01)

    in_a_place(check)


def test_a_task_that_is_no_small_import_goes_to_a_thread() -> None:
    async def check(place: Place) -> None:
        assert await place.client.submit(sum, [1, 2], key="x") == 3
        assert place.was_executed("x")

    in_a_place(check)


def test_one_that_does_not_open_fails_as_a_task_does() -> None:
    async def check(place: Place) -> None:
        future = place.bring("x", serialized([1, 2]), checksum=17)
        with pytest.raises(Exception, match="damaged"):
            await future
        assert place.was_executed("x")

    in_a_place(check)


def test_what_refers_to_other_things_is_brought_home_in_a_thread() -> None:
    async def check(place: Place) -> None:
        inner = place.client.submit(sum, [1, 2], key="inner")
        await inner
        future = place.bring("x", serialized({"all": [inner]}))
        assert await place.client.submit(lambda found: found["all"][0].result(), future, key="y") == 3
        assert place.was_executed("x")

    in_a_place(check)


def test_an_actor_of_another_site_is_called_there() -> None:
    async def check(place: Place) -> None:
        counter = await place.client.submit(Counter, actor=True, key="counter")
        future = place.bring("x", serialized(counter))
        kind = await place.client.submit(lambda actor: type(actor).__name__, future, key="y")
        assert isinstance(counter, Actor)
        assert kind == ActorElsewhere.__name__

    in_a_place(check)


class Counter:
    """Something to be an actor."""


def test_a_paused_worker_takes_nothing_over() -> None:
    async def check(place: Place) -> None:
        place.worker.status = Status.paused
        landed = Parcel.of(serialized([1, 2]))
        place.give(Task("x", open_import, landed.header, list(landed.frames), landed.checksum), INLINE)
        assert place.worker.state.tasks["x"].state == "ready"

    in_a_place(check)


def test_a_value_that_is_there_stays() -> None:
    async def check(place: Place) -> None:
        place.worker.update_data({"x": [3, 4]}, stimulus_id="before")
        future = place.bring("x", serialized([1, 2]))
        assert await future == [3, 4]  # as in Dask: a worker does not make again what it has

    in_a_place(check)


def test_what_a_key_was_made_from_before_is_not_sought_where_it_is_to_be_made() -> None:
    """The worker remembers it for the sake of a dependent; now the key comes from elsewhere."""

    async def check(place: Place) -> None:
        graph = {"w": (operator.neg, 1), "x": (operator.neg, "w"), "y": (operator.neg, "x")}
        kept = place.client.get(graph, "y", sync=False)
        assert await kept == -1
        known = place.worker.state.tasks
        while known["x"].state != "released" or known["w"].state != "released":
            await asyncio.sleep(0.01)
        assert known["x"].dependencies == {known["w"]}
        place.give(Task("w", operator.neg, TaskRef("v")), v=["tcp://127.0.0.1:9"])
        assert known["w"].state == "waiting"
        place.give(Task("x", operator.neg, 1))
        assert known["w"].state == "waiting"
        assert known["x"].state == "executing"

    in_a_place(check)


def test_a_key_that_was_given_out_twice_before_the_worker_heard_of_it_settles() -> None:
    """Each answer that is out of date has the scheduler give the key out once more, and there are always two."""

    async def check(place: Place) -> None:
        handlers = place.worker.stream_handlers
        proper = {op: handlers[op] for op in ("compute-task", "free-keys")}
        late: list[tuple[str, Any]] = []
        for op in proper:
            handlers[op] = lambda op=op, **message: late.append((op, message))
        future = place.bring("x", serialized([1, 2]))
        while not late:
            await asyncio.sleep(0.001)
        place.scheduler._reschedule("x", stimulus_id="test")
        while len(late) < 3:
            await asyncio.sleep(0.001)
        handlers.update(proper)
        for op, message in late:
            proper[op](**message)
        assert await asyncio.wait_for(future, 10) == [1, 2]

    in_a_place(check)


def test_a_task_that_a_worker_holds_for_lost_is_given_back() -> None:
    async def check(place: Place) -> None:
        gate = place.client.submit(time.sleep, 0.5, key="gate")
        future = place.client.submit(operator.neg, 1, key="x")
        while "x" not in place.worker.state.tasks:
            await asyncio.sleep(0.001)
        place.worker.state._transitions({place.worker.state.tasks["x"]: "missing"}, stimulus_id="test")
        give_back(["x"], place.worker)
        await asyncio.sleep(ON_THE_WAY_S)
        assert place.worker.state.tasks["x"].state == "missing"  # its scheduler might have heard of it meanwhile
        give_back(["x"], place.worker)
        assert await future == -1
        await gate

    in_a_place(check)


def test_it_opens_where_daskfed_is_not_installed() -> None:
    code = (
        "import pickle, sys; sys.modules['daskfed'] = None; from distributed import WorkerPlugin; "
        "plugin = pickle.loads(sys.stdin.buffer.read()); assert isinstance(plugin, WorkerPlugin); "
        "worker = type('Fake', (), {})(); worker.stream_handlers = {'compute-task': dict}; worker.state = worker; "
        "task = type('Task', (), {'state': 'released', 'dependencies': []}); worker.tasks = {1: task}; "
        "worker.stream_handlers['free-keys'] = dict; plugin.setup(worker); "
        "worker.stream_handlers['compute-task'](key=1, nbytes={})"
    )
    subprocess.run([sys.executable, "-c", code], input=by_value(Homing()), check=True, timeout=60)
