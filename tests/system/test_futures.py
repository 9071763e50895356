"""Futures over two sites behave as in distributed: every way to make, wait for, cancel, retry, share and gather them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import operator
import pickle
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Event, Variable, as_completed, fire_and_forget, get_worker, wait
from distributed.client import Future, FutureCancelledError, FuturesCancelledError

from daskfed import Client, Federation, at
from tests.system.commands import NO_DASHBOARD

pytestmark = pytest.mark.system

TWO = {"n_workers": 1, "processes": False, "protocol": "tcp://", "threads_per_worker": 2, **NO_DASHBOARD, "resources": {"gpu": 1}}
SITES = {
    "north": {"options": TWO, "resources": {"gpu": 1.0}},
    "south": {"options": {**TWO, "n_workers": 2, "threads_per_worker": 1}, "resources": {"gpu": 1.0}},
}


@pytest.fixture(scope="module")
def federation() -> Any:
    """Two sites with three workers, where copies stay until somebody releases them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START", "false")
        with Federation(sites=SITES) as fed:
            yield fed


@pytest.fixture
def other(federation: Federation) -> Any:
    """Another client of the two sites, which knows already that they have this module: it need not ask them first."""
    with Client(federation, set_as_default=False) as client:
        assert client.submit(inc, 1).result() == 2
        yield client


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds; fail after 15 seconds."""
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def wait_for(name: str, _: Any = None) -> str:
    Event(f"{name}-started").set()
    Event(name).wait(timeout=30)
    return name


def count_calls(name: str, fail_below: int = 0) -> int:
    """Return how often it was called under this name; raises while that is less than ``fail_below``."""
    counter = Variable(name)
    calls = int(counter.get(timeout=5)) + 1
    counter.set(calls)
    if calls < fail_below:
        raise ZeroDivisionError(f"call {calls}")
    return calls


def fresh(client: Client, name: str) -> str:
    Variable(name, client=client).set(0)
    return name


def calls(client: Client, name: str) -> int:
    return int(Variable(name, client=client).get(timeout=5))


def block(client: Client, site: str, threads: int) -> Callable[[], None]:
    """Keep all threads of a site busy; return what ends that."""
    names = [f"blocker {uuid.uuid4().hex}" for _ in range(threads)]
    futures = client.map(wait_for, names, pure=False, site=site)
    for name in names:
        assert Event(f"{name}-started", client=client).wait(timeout=10)

    def release() -> None:
        for name in names:
            Event(name, client=client).set()
        assert client.gather(futures) == names

    return release


def tasks_at(client: Client, site: str) -> set[Any]:
    """Return the keys of the tasks that a site's scheduler has given to workers."""
    hub = client.cluster.hub

    async def ask() -> Any:
        return await hub.ports[site].call("scheduler_rpc", scheduler_op="processing", kwargs={})

    replies = client.sync(ask)
    return {key for keys in replies.values() for key in keys}


class TestSubmitting:
    def test_pure_calls_share_a_key_and_impure_ones_do_not(self, client: Client) -> None:
        assert client.submit(inc, 1, pure=True).key == client.submit(inc, 1).key
        assert client.submit(inc, 1, pure=False).key != client.submit(inc, 1, pure=False).key
        xs, ys = client.map(inc, range(3)), client.map(inc, range(3), pure=True)
        assert [x.key for x in xs] == [y.key for y in ys]
        zs = client.map(inc, range(3), pure=False)
        assert not {z.key for z in zs} & {x.key for x in xs}
        assert client.gather([xs, ys, zs]) == [[1, 2, 3]] * 3

    def test_a_key_may_be_given(self, client: Client) -> None:
        future = client.submit(inc, 1, key="given")
        assert future.key == "given" and future.result() == 2
        futures = client.map(inc, [1, 2], key=["a-1", ("b", 2)])
        assert [f.key for f in futures] == ["a-1", ("b", 2)] and client.gather(futures) == [2, 3]
        assert client.map(inc, [5], key="named")[0].key.startswith("named")

    def test_batch_size(self, client: Client) -> None:
        futures = client.map(inc, range(100), batch_size=30)
        assert len(futures) == 100 and client.gather(futures) == list(range(1, 101))
        assert client.gather(client.map(add, range(5), range(5), batch_size=2)) == [0, 2, 4, 6, 8]

    def test_map_takes_keywords_and_futures(self, client: Client) -> None:
        ten = client.submit(inc, 9)
        assert client.gather(client.map(add, range(3), y=ten)) == [10, 11, 12]
        assert client.gather(client.map(add, [ten, 1], [1, ten])) == [11, 11]
        assert client.map(inc, []) == []
        assert client.gather(client.map(len, [[1], [1, 2]])) == [1, 2]

    def test_workers_and_other_workers(self, client: Client) -> None:
        address = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
        site = address.removeprefix("fed://").split("/")[0]
        future = client.submit(inc, 1, pure=False, workers=["nobody"], allow_other_workers=True, site=site)
        assert future.result(timeout=10) == 2
        with pytest.raises(TypeError, match="allow_other_workers"):
            client.submit(inc, 1, allow_other_workers="yes")

    def test_resources(self, client: Client) -> None:
        def overlap(name: str) -> float:
            started = time.time()
            time.sleep(0.15)
            return started

        starts = sorted(client.gather(client.map(overlap, range(3), pure=False, resources={"gpu": 1}, site="north")))
        assert all(later - earlier > 0.14 for earlier, later in zip(starts, starts[1:], strict=False))
        with dask.annotate(resources={"gpu": 1}):
            assert client.submit(inc, 6, pure=False).result() == 7

    def test_retries(self, client: Client) -> None:
        name = fresh(client, "retries")
        assert client.submit(count_calls, name, fail_below=3, retries=2, pure=False).result() == 3
        name = fresh(client, "too few retries")
        with pytest.raises(ZeroDivisionError, match="call 2"):
            client.submit(count_calls, name, fail_below=3, retries=1, pure=False).result()
        name = fresh(client, "annotated")
        with dask.annotate(retries=2):
            assert client.submit(count_calls, name, fail_below=3, pure=False).result() == 3

    def test_annotations_reach_the_task(self, client: Client) -> None:
        def note() -> Any:
            worker = get_worker()
            task = worker.state.tasks[worker.get_current_task()]
            return {**task.annotations}

        with dask.annotate(priority=7, color="blue"):
            found = client.submit(note, pure=False).result()
        assert found["color"] == "blue" and found["priority"] == 7

    def test_bad_arguments(self, client: Client) -> None:
        with pytest.raises(TypeError):
            client.submit(1)
        with pytest.raises(TypeError):
            client.submit()
        with pytest.raises(TypeError):
            client.map(1, [1])


class TestScatter:
    def test_every_kind_of_container(self, client: Client) -> None:
        assert client.gather(client.scatter([1, 2])) == [1, 2]
        assert client.gather(client.scatter((3, 4))) == (3, 4)
        assert client.gather(client.scatter({5})) == {5}
        named = client.scatter({"x": 1, "y": 2})
        assert named["x"].key == "x" and client.gather(named) == {"x": 1, "y": 2}
        assert client.gather(client.scatter(range(3))) == [0, 1, 2]
        assert client.scatter("one value").result() == "one value"

    def test_hash(self, client: Client) -> None:
        assert client.scatter(123).key == client.scatter(123).key
        assert client.scatter(123, hash=False).key != client.scatter(123, hash=False).key

    @pytest.mark.parametrize("direct", [True, False])
    def test_direct(self, client: Client, direct: bool) -> None:
        future = client.scatter(np.arange(10), direct=direct, hash=False)
        assert client.submit(np.sum, future).result() == 45
        assert client.gather(future, direct=direct).sum() == 45

    def test_broadcast_to_every_worker_of_every_site(self, client: Client) -> None:
        future = client.scatter([1, 2, 3], broadcast=True, hash=False)[0]
        assert len(client.who_has([future])[future.key]) == 3
        assert sorted(client.explain(future)["sites"]) == ["north", "south"]
        assert client.submit(inc, future, site="north").result() == client.submit(inc, future, site="south").result()
        two = client.scatter("two", broadcast=2, hash=False)
        assert len(client.who_has([two])[two.key]) == 2
        south = client.scatter("south", broadcast=True, site="south", hash=False)
        assert client.explain(south)["sites"] == ["south"] and len(client.who_has([south])[south.key]) == 2

    def test_broadcast_with_direct(self, client: Client) -> None:
        future = client.scatter("direct", broadcast=True, direct=True, hash=False)
        assert len(client.who_has([future])[future.key]) == 3

    def test_scattered_again_after_a_release(self, client: Client) -> None:
        for _ in range(3):
            future = client.scatter(np.arange(5))
            assert client.submit(np.sum, future, pure=False).result() == 10
            del future


class TestGather:
    def test_nested(self, client: Client) -> None:
        x, y = client.submit(inc, 1), client.submit(inc, 2)
        assert client.gather({"x": x, "more": [y, (x, {"y": y})]}) == {"x": 2, "more": [3, (2, {"y": 3})]}

    def test_errors(self, client: Client) -> None:
        good, bad = client.submit(inc, 1), client.submit(operator.truediv, 1, 0)
        assert client.gather([good, bad, good], errors="skip") == [2, 2]
        with pytest.raises(ZeroDivisionError):
            client.gather([good, bad])
        with pytest.raises(ValueError, match="errors="):
            client.gather([good, bad], errors="ignore")

    def test_lost_and_cancelled_are_skipped(self, client: Client) -> None:
        good, gone = client.submit(inc, 1), client.submit(inc, 2, pure=False)
        gone.cancel()
        assert client.gather([good, gone], errors="skip") == [2]
        with pytest.raises((FutureCancelledError, FuturesCancelledError)):
            client.gather([good, gone])

    def test_another_clients_future_is_refused(self, client: Client, other: Client) -> None:
        with pytest.raises(ValueError, match="another client"):
            other.gather([client.submit(inc, 1)])


class TestCancel:
    def test_pending(self, client: Client) -> None:
        x = client.submit(wait_for, "pending", pure=False)
        y = client.submit(inc, x, pure=False)
        y.cancel()
        with pytest.raises(FutureCancelledError):
            y.result()
        Event("pending", client=client).set()
        assert x.result() == "pending"

    def test_what_depends_on_it_is_cancelled_too(self, client: Client) -> None:
        x = client.submit(wait_for, "with dependents", pure=False)
        y = client.submit(len, x, pure=False)
        z = client.submit(inc, y, pure=False, site="south")
        client.cancel(x, reason="no need", msg="told so")
        for future in (x, y, z):
            with pytest.raises(FutureCancelledError, match="no need.*\\s+told so"):
                future.result(timeout=10)
        Event("with dependents", client=client).set()

    @pytest.mark.as_tasks
    @pytest.mark.parametrize("site", ["north", "south"])
    def test_running_is_cancelled_at_its_site(self, client: Client, site: str) -> None:
        name = f"long at {site}"
        future = client.submit(wait_for, name, site=site, pure=False)
        assert Event(f"{name}-started", client=client).wait(timeout=10)
        assert future.key in tasks_at(client, site)
        future.cancel()
        assert future.cancelled()
        until(lambda: future.key not in tasks_at(client, site), "its scheduler counts it still")
        Event(name, client=client).set()

    @pytest.mark.as_tasks
    def test_one_call_of_a_map_is_cancelled_and_the_others_go_on(self, client: Client) -> None:
        names = [f"mapped {i}" for i in range(32)]  # two calls in a block
        running = client.map(wait_for, names, site="south", pure=False)
        assert Event("mapped 0-started", client=client).wait(timeout=10)
        assert Event("mapped 1-started", client=client).wait(timeout=10)
        running[0].cancel()
        until(lambda: running[0].key not in tasks_at(client, "south"), "its scheduler counts it still")
        assert running[1].key in tasks_at(client, "south") and running[1].status == "pending"
        for name in names:
            Event(name, client=client).set()
        assert client.gather(running[1:]) == names[1:]

    def test_calls_of_a_map_that_are_released_are_not_run(self, client: Client) -> None:
        names = [fresh(client, f"released {i}") for i in range(40)]
        release = block(client, "north", 2)
        futures = client.map(count_calls, names, pure=False, site="north")
        del futures[1:]
        time.sleep(0.2)
        release()
        assert futures[0].result(timeout=10) == 1
        assert client.submit(inc, 1, pure=False, site="north").result(timeout=10) == 2
        assert [calls(client, name) for name in names[1:]] == [0] * 39

    def test_pending_calls_of_a_map_never_run(self, client: Client) -> None:
        release = block(client, "north", 2)
        name = fresh(client, "never")
        futures = client.map(count_calls, [name] * 40, pure=False, site="north")
        client.cancel(futures[1:])
        until(lambda: client.explain(futures[-1])["phase"] == "unknown", "the hub was not told")
        time.sleep(0.3)
        release()
        assert futures[0].result(timeout=10) == 1
        assert client.submit(inc, 1, pure=False, site="north").result(timeout=10) == 2
        assert calls(client, name) == 1

    def test_only_the_dependents_of_a_cancelled_call_are_cancelled(self, client: Client) -> None:
        xs = client.map(wait_for, ["three calls"] * 3, range(3), pure=False)
        ys = client.map(len, xs, pure=False)
        assert Event("three calls-started", client=client).wait(timeout=10)
        xs[1].cancel(reason="one of three")
        with pytest.raises(FutureCancelledError, match="one of three"):
            ys[1].result(timeout=10)
        Event("three calls", client=client).set()
        assert [ys[0].result(timeout=10), ys[2].result(timeout=10)] == [11, 11]

    def test_reason_and_message_reach_the_other_client(self, client: Client, other: Client) -> None:
        mine = client.submit(wait_for, "shared reason", key="shared reason")
        theirs = other.submit(wait_for, "shared reason", key="shared reason")
        assert Event("shared reason-started", client=client).wait(timeout=10)
        client.cancel(mine, force=True, reason="stop it", msg="for a good cause")
        with pytest.raises(FutureCancelledError) as caught:
            theirs.result(timeout=10)
        assert (caught.value.reason, caught.value.msg) == ("stop it", "for a good cause")
        Event("shared reason", client=client).set()

    def test_without_force_the_other_client_keeps_its_own(self, client: Client, other: Client) -> None:
        mine = client.submit(wait_for, "shared", key="shared")
        theirs = other.submit(wait_for, "shared", key="shared")
        assert Event("shared-started", client=client).wait(timeout=10)
        after = other.submit(len, theirs, pure=False)
        mine.cancel()
        assert mine.cancelled()
        Event("shared", client=client).set()
        assert theirs.result(timeout=10) == "shared" and after.result(timeout=10) == 6

    def test_what_another_client_made_of_it_lives_on(self, client: Client, other: Client) -> None:
        mine = client.submit(wait_for, "made of", key="made of")
        theirs = other.submit(len, Future("made of", other), pure=False)
        assert Event("made of-started", client=client).wait(timeout=10)
        mine.cancel()
        Event("made of", client=client).set()
        assert theirs.result(timeout=10) == 7

    def test_a_cancelled_call_can_be_submitted_again(self, client: Client) -> None:
        future = client.submit(inc, 1234)
        assert future.result() == 1235
        future.cancel()
        again = client.submit(inc, 1234)
        assert again.result(timeout=10) == 1235
        running = client.submit(wait_for, "again")
        assert Event("again-started", client=client).wait(timeout=10)
        running.cancel()
        Event("again", client=client).set()
        assert client.submit(wait_for, "again").result(timeout=10) == "again"

    def test_a_collection(self, client: Client) -> None:
        x = da.ones(8, chunks=2).map_blocks(lambda b: wait_for("collection") and b, dtype=float, meta=np.ones(0)).persist()
        client.cancel(x)
        Event("collection", client=client).set()
        assert all(client.futures[key].status == "cancelled" for key in client.futures if key in x.__dask_keys__())
        until(lambda: client.explain(x.__dask_keys__()[0])["phase"] == "unknown", "it is held still")


class TestRetry:
    def test_one_call(self, client: Client) -> None:
        future = client.submit(count_calls, fresh(client, "one"), fail_below=2, pure=False)
        with pytest.raises(ZeroDivisionError, match="call 1"):
            future.result()
        future.retry()
        assert future.result(timeout=10) == 2

    def test_it_may_fail_again(self, client: Client) -> None:
        future = client.submit(count_calls, fresh(client, "again and again"), fail_below=9, pure=False)
        for n in (1, 2, 3):
            with pytest.raises(ZeroDivisionError, match=f"call {n}"):
                future.result(timeout=10)
            client.retry(future)

    def test_dependents_are_retried_with_it(self, client: Client) -> None:
        x = client.submit(count_calls, fresh(client, "root"), fail_below=2, pure=False, site="north")
        y = client.submit(inc, x, pure=False, site="south")
        z = client.submit(inc, y, pure=False, site="north")
        assert z.exception(timeout=10) is not None and y.status == "error"
        x.retry()
        assert z.result(timeout=10) == 4 and x.result() == 2

    def test_what_it_failed_from_is_retried_first(self, client: Client) -> None:
        x = client.submit(count_calls, fresh(client, "first"), fail_below=2, pure=False, site="north")
        y = client.submit(inc, x, pure=False, site="south")
        del x
        assert y.exception(timeout=10) is not None
        y.retry()
        assert y.result(timeout=10) == 3

    def test_a_whole_graph(self, client: Client) -> None:
        name = fresh(client, "graph")
        with at("north"):
            root = dask.delayed(count_calls)(name, fail_below=2)
        with at("south"):
            middle = dask.delayed(inc)(root)
        future = client.compute(dask.delayed(add)(middle, dask.delayed(inc)(root)))
        assert isinstance(future.exception(timeout=10), ZeroDivisionError)
        future.retry()
        assert future.result(timeout=10) == 6

    def test_some_calls_of_a_map(self, client: Client) -> None:
        names = [fresh(client, f"map {i}") for i in range(4)]
        futures = client.map(count_calls, names, [0, 2, 0, 2], pure=False)
        wait(futures)
        assert [f.status for f in futures] == ["finished", "error", "finished", "error"]
        client.retry(futures)
        assert client.gather(futures) == [1, 2, 1, 2]

    def test_another_client_hears_of_it(self, client: Client, other: Client) -> None:
        name = fresh(client, "two clients")
        mine = client.submit(count_calls, name, fail_below=2, key="two clients")
        theirs = other.submit(count_calls, name, fail_below=2, key="two clients")
        assert mine.exception(timeout=10) is not None and theirs.exception(timeout=10) is not None
        mine.retry()
        assert mine.result(timeout=10) == 2
        until(lambda: theirs.status == "finished", "the other client was not told")
        assert theirs.result() == 2

    def test_what_did_not_fail_is_left_alone(self, client: Client) -> None:
        name = fresh(client, "fine")
        future = client.submit(count_calls, name, pure=False)
        assert future.result() == 1
        client.retry(future)
        assert future.result(timeout=10) == 1 and calls(client, name) == 1


class TestWaiting:
    def test_as_completed(self, client: Client) -> None:
        futures = client.map(inc, range(5))
        assert {f.result() for f in as_completed(futures)} == {1, 2, 3, 4, 5}
        results = as_completed(futures, with_results=True)
        assert {result for _, result in results} == {1, 2, 3, 4, 5}
        batches = list(as_completed(futures, with_results=True).batches())
        assert sorted(result for batch in batches for _, result in batch) == [1, 2, 3, 4, 5]
        assert not as_completed([], loop=client.loop).count()

    def test_as_completed_takes_more(self, client: Client) -> None:
        seq = as_completed(client.map(inc, [1]))
        found = []
        for future in seq:
            found.append(future.result())
            if len(found) < 3:
                seq.add(client.submit(inc, future))
        assert found == [2, 3, 4]

    def test_as_completed_with_errors_and_cancellations(self, client: Client) -> None:
        bad = client.submit(operator.truediv, 1, 0)
        with pytest.raises(ZeroDivisionError):
            list(as_completed([bad], with_results=True))
        (pair,) = as_completed([bad], with_results=True, raise_errors=False)
        assert pair[0] is bad and pair[1][0] is ZeroDivisionError
        x = client.submit(wait_for, "completed", pure=False)
        x.cancel()
        assert [f.status for f in as_completed([x])] == ["cancelled"]
        Event("completed", client=client).set()

    def test_as_completed_timeout(self, client: Client) -> None:
        x = client.submit(wait_for, "too long", pure=False)
        with pytest.raises(TimeoutError):
            next(iter(as_completed([x], timeout=0.1)))
        Event("too long", client=client).set()

    def test_wait(self, client: Client) -> None:
        slow, fast = client.submit(wait_for, "slow", pure=False), client.submit(inc, 1)
        done, not_done = wait([slow, fast], return_when="FIRST_COMPLETED")
        assert done == {fast} and not_done == {slow}
        with pytest.raises(TimeoutError):
            wait([slow, fast], timeout=0.1)
        Event("slow", client=client).set()
        done, not_done = wait([slow, fast])
        assert done == {slow, fast} and not not_done

    def test_callbacks(self, client: Client) -> None:
        heard = threading.Event()
        future = client.submit(inc, 1)
        future.add_done_callback(lambda f: f.result() == 2 and heard.set())
        assert heard.wait(10)

    def test_result_timeout(self, client: Client) -> None:
        future = client.submit(wait_for, "result", pure=False)
        with pytest.raises(TimeoutError):
            future.result(timeout=0.05)
        with pytest.raises(TimeoutError):
            future.exception(timeout=0.05)
        Event("result", client=client).set()
        assert future.result() == "result" and future.exception() is None and future.traceback() is None
        assert future.type is str and future.done()

    def test_fire_and_forget(self, client: Client) -> None:
        name = fresh(client, "forgotten")
        future = client.submit(count_calls, name, pure=False)
        key = future.key
        fire_and_forget(future)
        del future
        until(lambda: calls(client, name) == 1, "it never ran")
        until(lambda: "fed" and client.explain(key)["phase"] == "unknown", "it is kept though nobody wants it")

    def test_fire_and_forget_of_a_failure_and_of_a_collection(self, client: Client) -> None:
        fire_and_forget(client.submit(operator.truediv, 1, 0, pure=False))
        name = fresh(client, "collection")
        fire_and_forget(client.compute(dask.delayed(count_calls)(name)))
        until(lambda: calls(client, name) == 1, "it never ran")


class TestExecutor:
    def test_submit_and_map(self, client: Client) -> None:
        with client.get_executor() as executor:
            future = executor.submit(inc, 1)
            assert isinstance(future, concurrent.futures.Future) and future.result() == 2
            assert list(executor.map(add, range(4), range(4))) == [0, 2, 4, 6]
            futures = [executor.submit(inc, i) for i in range(5)]
            assert {f.result() for f in concurrent.futures.as_completed(futures)} == {1, 2, 3, 4, 5}
            with pytest.raises(ZeroDivisionError):
                executor.submit(operator.truediv, 1, 0).result()
            with pytest.raises(ZeroDivisionError):
                list(executor.map(operator.truediv, [1], [0]))
            done, _ = concurrent.futures.wait(futures)
            assert len(done) == 5
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(inc, 1)

    def test_cancel(self, client: Client) -> None:
        with client.get_executor(pure=False) as executor:
            name = fresh(client, "executor")
            release = [block(client, "north", 2), block(client, "south", 2)]
            last = executor.submit(count_calls, name)
            assert last.cancel() and last.cancelled()
            time.sleep(0.5)  # until its site has heard of it
            for let in release:
                let()
            assert executor.submit(inc, 1).result() == 2
            assert calls(client, name) == 0

    def test_map_timeout(self, client: Client) -> None:
        with client.get_executor(pure=False) as executor:
            results = executor.map(wait_for, ["map timeout"] * 2, range(2), timeout=0.2)
            with pytest.raises(concurrent.futures.TimeoutError):
                list(results)
            Event("map timeout", client=client).set()

    def test_shutdown(self, client: Client) -> None:
        executor = client.get_executor(pure=False)
        future = executor.submit(wait_for, "shutdown")
        executor.shutdown(wait=False)
        until(future.cancelled, "shutdown(wait=False) cancels")
        Event("shutdown", client=client).set()
        executor = client.get_executor(pure=False)
        future = executor.submit(time.sleep, 0.2)
        executor.shutdown()
        assert future.done()

    def test_options(self, client: Client) -> None:
        name = fresh(client, "executor options")
        with client.get_executor(pure=False, retries=1) as executor:
            assert executor.submit(count_calls, name, fail_below=2).result() == 2
        with pytest.raises(TypeError, match="unsupported arguments"):
            client.get_executor(priority=1)


class TestSharing:
    def test_another_client_takes_a_future_by_its_key(self, client: Client, other: Client) -> None:
        mine = client.submit(inc, 10)
        theirs = Future(mine.key, other)
        other._inform_scheduler_of_futures()
        assert theirs.result(timeout=10) == 11
        del mine
        assert other.submit(inc, theirs).result(timeout=10) == 12

    def test_a_pickled_future(self, client: Client, other: Client) -> None:
        mine = client.submit(inc, 20)
        theirs = pickle.loads(pickle.dumps(mine))
        theirs.bind_client(other)
        other._inform_scheduler_of_futures()
        assert theirs.result(timeout=10) == 21
        unbound = pickle.loads(pickle.dumps(mine))
        assert other.submit(inc, unbound).result(timeout=10) == 22

    def test_a_future_in_a_variable(self, client: Client, other: Client) -> None:
        Variable("future", client=client).set(client.submit(inc, 30))
        assert Variable("future", client=other).get(timeout=5).result(timeout=10) == 31

    def test_what_a_closed_client_had_is_gone(self, client: Client, federation: Federation) -> None:
        gone = Client(federation, set_as_default=False)
        x, y = gone.submit(inc, 40, pure=False), gone.submit(inc, 50, pure=False)
        assert gone.gather([x, y]) == [41, 51]
        kept = Future(y.key, client)
        client._inform_scheduler_of_futures()
        assert kept.result(timeout=10) == 51
        gone.close()
        assert x.cancelled()
        with pytest.raises(FutureCancelledError):
            x.result()
        assert client.submit(inc, kept, pure=False).result(timeout=10) == 52
        until(lambda: client.explain(x.key)["phase"] == "unknown", "what only the dead client wanted is held")
        lost = client.submit(inc, pickle.loads(pickle.dumps(x)), pure=False)
        with pytest.raises(FutureCancelledError, match="lost dependencies"):
            lost.result(timeout=10)

    def test_a_submit_to_a_closed_client_fails(self, federation: Federation) -> None:
        gone = Client(federation, set_as_default=False)
        gone.close()
        with pytest.raises(Exception, match="[Cc]losed"):
            gone.submit(inc, 1)


class TestCollections:
    def test_what_failed_is_computed_when_it_is_asked_for_again(self, client: Client) -> None:
        for n in range(10):
            with pytest.raises(ZeroDivisionError):
                client.get({"x": (operator.truediv, n, 0), "y": (inc, "x")}, "y")
            assert client.get({"x": (operator.add, n, 1), "y": (inc, "x")}, "y") == n + 2
            with pytest.raises(ZeroDivisionError):
                client.get({"one": (operator.truediv, n, 0)}, "one")
            assert client.get({"one": (operator.add, n, 1)}, "one") == n + 1

    def test_futures_of_persist_and_compute(self, client: Client) -> None:
        (x,) = dask.persist(da.arange(10, chunks=2))
        assert int(x.sum().compute()) == 45
        future = client.compute(x.sum())
        assert isinstance(future, Future) and int(future.result()) == 45
        assert int(client.compute(x.sum(), sync=True)) == 45
        several = client.compute([x.sum(), dask.delayed(inc)(1)], sync=False)
        assert [int(value) for value in client.gather(several)] == [45, 2]
        assert client.submit(operator.add, several[1], 1).result() == 3
        persisted = client.persist(dask.delayed(inc)(5))
        assert client.compute(persisted).result() == 6

    def test_get(self, client: Client) -> None:
        assert client.get({"x": (inc, 1), "y": (add, "x", 10)}, ["x", ["y", "x"]]) == [2, [12, 2]]
        assert client.get({"x": (inc, 1)}, "x") == 2
        future = client.get({"f-x": (inc, 1)}, "f-x", sync=False)
        assert future.result() == 2
        base = client.submit(inc, 4)
        assert client.get({"z": (inc, base)}, "z") == 6
        with pytest.raises(ZeroDivisionError):
            client.get({"bad": (operator.truediv, 1, 0)}, "bad")

    def test_retries_and_priority_of_collections(self, client: Client) -> None:
        lazy = dask.delayed(count_calls)(fresh(client, "delayed retries"), fail_below=2)
        assert client.compute(lazy, retries=1, priority=3).result() == 2


class TestAsync:
    """The same by an asynchronous client."""

    def run(self, federation: Federation, work: Callable[[Client], Any]) -> None:
        async def main() -> None:
            async with Client(federation.scheduler_address, asynchronous=True) as client:
                await work(client)

        asyncio.run(asyncio.wait_for(main(), 60))

    def test_making_and_waiting(self, federation: Federation) -> None:
        async def work(client: Client) -> None:
            x = client.submit(inc, 1)
            assert await x == 2 and await x.result() == 2
            futures = client.map(inc, range(4))
            assert await client.gather(futures) == [1, 2, 3, 4]
            assert sorted([await f async for f in as_completed(futures)]) == [1, 2, 3, 4]
            assert sorted([r async for _, r in as_completed(futures, with_results=True)]) == [1, 2, 3, 4]
            done, _ = await wait(futures)
            assert len(done) == 4
            with pytest.raises(ZeroDivisionError):
                await client.submit(operator.truediv, 1, 0)
            scattered = await client.scatter({"async-a": 1}, broadcast=True)
            assert await client.gather(scattered) == {"async-a": 1}
            assert await client.get({"async-x": (inc, 1)}, "async-x", sync=False) == 2
            assert await client.compute(dask.delayed(inc)(2)) == 3

        self.run(federation, work)

    def test_cancel_and_retry(self, federation: Federation) -> None:
        async def work(client: Client) -> None:
            future = client.submit(wait_for, "async", pure=False)
            assert await Event("async-started", client=client).wait(timeout=10)
            await client.cancel(future, reason="async reason")
            with pytest.raises(FutureCancelledError, match="async reason"):
                await future
            await Event("async", client=client).set()
            await Variable("async retry", client=client).set(0)
            future = client.submit(count_calls, "async retry", fail_below=2, pure=False)
            with pytest.raises(ZeroDivisionError):
                await future
            await future.retry()
            assert await future == 2
            fire_and_forget(client.submit(count_calls, "async retry", pure=False))
            async with asyncio.timeout(10):
                while await Variable("async retry", client=client).get() != 3:
                    await asyncio.sleep(0.05)

        self.run(federation, work)
