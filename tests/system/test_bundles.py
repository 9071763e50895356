"""Tiny tasks that run several as one, over two real sites: the results, and the errors, are as ever."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import distributed
import pytest
from dask.delayed import Delayed
from distributed import LocalCluster, wait

from daskfed import Client, Federation
from daskfed.client.bundling import SHORT_S
from daskfed.client.graphs import BlockExpr
from daskfed.dask_private import GraphNode, Task, TaskRef
from daskfed.messages import Key
from daskfed.site.bundles import Together
from daskfed.site.reporting import SiteReporter
from tests.system.commands import NO_DASHBOARD
from tests.system.waiting import until

pytestmark = pytest.mark.system

ONE = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
CHAIN = 10  # tasks that are one bundle, since nobody needs those inside


def inc(x: int) -> int:
    """Add one."""
    return x + 1


def guilty(x: int) -> int:
    """Fail."""
    raise ZeroDivisionError(f"on purpose with {x}")


# -- a scheduler by itself, which verifies all that it does ------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> Iterator[distributed.Client]:
    """A stock cluster with our plugin; its scheduler checks its books at every transition."""
    plugin = SiteReporter("nobody")
    strict = {"dashboard": False, "validate": True, "plugins": [plugin], "allowed_failures": 1}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "scheduler_kwargs": strict}
    with LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture
def alone(checked: distributed.Client) -> Iterator[distributed.Client]:
    """Its client, the current one."""
    with checked.as_current():
        yield checked


def chained(name: str, *functions: Callable[..., Any]) -> dict[Key, GraphNode]:
    """Return tasks that call one function after another, the first with 0."""
    tasks: dict[Key, GraphNode] = {}
    need: Any = 0
    for number, function in enumerate(functions):
        key = f"{name}-{number}"
        tasks[key] = Task(key, function, need)
        need = TaskRef(key)
    return tasks


def sent(client: distributed.Client, tasks: dict[Key, GraphNode], *bundles: Any, **notes: Any) -> Any:
    """Submit tasks of which some are bundles, or names of tasks that make one; return the future of the last one."""
    named = [(name, value, list(tasks)) for name, value in notes.items()]
    together = [each if isinstance(each, Together) else Together(each[-1], each) for each in bundles]
    expr, last = BlockExpr.compact(tasks, named, together), list(tasks)[-1]
    return client._graph_to_futures(expr, [last], span_metadata={})[last]


def known(client: distributed.Client, name: str) -> dict[Key, str]:
    """Return the tasks whose keys begin with a name that the scheduler knows."""

    def find(dask_scheduler: Any) -> dict[Key, str]:
        return {key: task.state for key, task in dask_scheduler.tasks.items() if key.startswith(name)}

    return dict(client.run_on_scheduler(find))


def test_a_scheduler_has_one_task_for_a_bundle(alone: distributed.Client) -> None:
    tasks = chained("plain", *[inc] * CHAIN)
    future = sent(alone, tasks, tuple(tasks))
    assert future.result() == CHAIN
    assert known(alone, "plain") == {f"plain-{CHAIN - 1}": "memory"}


def test_a_bundle_that_fails_is_taken_apart(alone: distributed.Client) -> None:
    """The task is blamed that failed, with its traceback; what depends on it fails with it, and nothing else."""
    tasks = chained("bad", inc, inc, guilty, inc)
    after = {**tasks, "after": Task("after", inc, TaskRef("bad-3"))}
    future = sent(alone, after, tuple(tasks))
    with pytest.raises(ZeroDivisionError, match="on purpose with 2"):
        future.result(timeout=30)
    assert traceback.extract_tb(future.traceback())[-1].name == "guilty"
    assert alone.sync(alone.scheduler.get_error_cause, keys=["after"]) == "bad-2"


def test_a_bundle_of_what_has_inputs_elsewhere(alone: distributed.Client) -> None:
    """It lets go of inputs that its last task does not need, and those are let go of by the scheduler in the end."""
    first = chained("apart-first", inc, inc)
    bundle: dict[Key, GraphNode] = {
        "apart-a": Task("apart-a", inc, TaskRef("apart-first-1")),
        "apart-b": Task("apart-b", guilty, TaskRef("apart-a")),
        "apart-end": Task("apart-end", max, TaskRef("apart-b"), TaskRef("apart-first-0")),
    }
    future = sent(alone, {**first, **bundle}, tuple(bundle))
    with pytest.raises(ZeroDivisionError, match="on purpose with 3"):
        future.result(timeout=30)
    future.release()
    until(lambda: not known(alone, "apart"))


def flaky(x: int, path: Path, times: int) -> int:
    """Fail the first few times."""
    with path.open("a") as file:
        file.write("x")
    if len(path.read_text()) <= times:
        raise OSError("not yet")
    return x + 1


def test_retries_are_those_that_the_user_gave(alone: distributed.Client, tmp_path: Path) -> None:
    """Taking a bundle apart costs none: two retries are two more runs of the task that fails."""
    for times, retries in ((3, 2), (4, 2), (1, 0), (2, 0)):
        path = tmp_path / f"{times}-{retries}"
        tasks = chained(f"flaky-{times}-{retries}", inc, lambda x: flaky(x, path, times), inc)  # noqa: B023
        future = sent(alone, tasks, tuple(tasks), **({"retries": retries} if retries else {}))
        wait(future)
        assert (future.status == "finished") is (times <= retries + 1)


def beside(name: str, *functions: Callable[..., Any]) -> tuple[dict[Key, GraphNode], Together]:
    """Return tasks of which the middle ones are a bundle with several results: one before, one after each, and the end.

    Those after are ``name-after-0`` and so on; ``name-end`` needs the first two of them.
    """
    tasks: dict[Key, GraphNode] = {f"{name}-before": Task(f"{name}-before", inc, 0)}
    places = range(len(functions))
    each = [f"{name}-{n}" for n in places]
    tasks |= {
        key: Task(key, function, TaskRef(f"{name}-before")) for key, function in zip(each, functions, strict=True)
    }
    tasks |= {f"{name}-after-{n}": Task(f"{name}-after-{n}", inc, TaskRef(each[n])) for n in places}
    end = f"{name}-end"
    tasks[end] = Task(end, max, TaskRef(f"{name}-after-0"), TaskRef(f"{name}-after-1"))
    return tasks, Together(f"{name}-together", tuple(each), tuple(each))


def several(client: distributed.Client, tasks: dict[Key, GraphNode], together: Together, *wanted: Key) -> Any:
    """Submit tasks with a bundle, and return the futures of some of them."""
    expr = BlockExpr.compact(tasks, [], [together])
    found = client._graph_to_futures(expr, list(wanted), span_metadata={})
    return [found[key] for key in wanted]


def test_a_bundle_with_several_results(alone: distributed.Client) -> None:
    tasks, together = beside("some", inc, inc, inc)
    futures = several(alone, tasks, together, "some-end", "some-after-2")
    assert alone.gather(futures) == [3, 3]
    assert "some-together" in known(alone, "some") and "some-0" not in known(alone, "some")
    del futures
    until(lambda: not known(alone, "some"))


def test_one_of_several_results_fails(alone: distributed.Client) -> None:
    """Only what depends on it fails, and it is to blame."""
    tasks, together = beside("one", inc, inc, guilty, inc)
    end, failed, fine = futures = several(alone, tasks, together, "one-end", "one-after-2", "one-after-3")
    wait(futures)
    assert (end.result(), fine.result()) == (3, 3)
    with pytest.raises(ZeroDivisionError, match="on purpose with 1"):
        failed.result()
    assert traceback.extract_tb(failed.traceback())[-1].name == "guilty"
    assert alone.sync(alone.scheduler.get_error_cause, keys=["one-after-2"]) == "one-2"
    assert "one-together" not in known(alone, "one")
    for future in futures:
        future.release()
    until(lambda: not known(alone, "one"))


def test_a_worker_dies_of_one_of_several_results(alone: distributed.Client, tmp_path: Path) -> None:
    path = tmp_path / "died"
    tasks, together = beside("mortals", inc, lambda x: dying(x, path), inc)
    futures = several(alone, tasks, together, "mortals-end", "mortals-after-2")
    assert alone.gather(futures) == [3, 3]


def test_a_bundle_that_needs_another_one_fails(alone: distributed.Client) -> None:
    """Its tasks find what they need where it is."""
    tasks, together = beside("two", inc, inc)
    tasks["two-end"] = Task("two-end", guilty, TaskRef("two-after-1"))
    tasks["two-last"] = Task("two-last", max, TaskRef("two-end"), TaskRef("two-after-0"))
    future = sent(alone, tasks, together, ("two-after-0", "two-after-1", "two-end", "two-last"))
    with pytest.raises(ZeroDivisionError, match="on purpose with 3"):
        future.result(timeout=30)
    assert alone.sync(alone.scheduler.get_error_cause, keys=["two-last"]) == "two-end"
    future.release()
    until(lambda: not known(alone, "two"))


def dying(x: int, path: Path) -> int:
    """End the worker, but only once."""
    if not path.exists():
        path.touch()
        os._exit(1)
    return x + 1


def test_a_worker_dies_of_a_bundle(alone: distributed.Client, tmp_path: Path) -> None:
    """Its tasks are run one by one, so that the guilty one is found if it goes on."""
    path = tmp_path / "died"
    tasks = chained("dying", inc, inc, lambda x: dying(x, path), inc)
    future = sent(alone, tasks, tuple(tasks))
    assert future.result(timeout=60) == 4
    assert len(known(alone, "dying")) == len(tasks)


def leaving(x: int) -> int:
    """Leave the thread pool, for good."""
    distributed.secede()
    return x + 1


def submitting(x: int) -> int:
    """Have another task run while this one waits."""
    with distributed.worker_client() as client:
        return int(client.submit(inc, x, pure=False).result())


def asking(x: int) -> int:
    """Use the worker's client."""
    return int(distributed.get_client().submit(inc, x, pure=False).result())


def test_tasks_that_use_their_worker(alone: distributed.Client) -> None:
    """Whatever they do with it, the next ones run."""
    tasks = chained("use", inc, submitting, inc, submitting, inc)
    assert sent(alone, tasks, tuple(tasks)).result(timeout=30) == 5
    tasks = chained("leave", inc, leaving, inc)
    assert sent(alone, tasks, tuple(tasks)).result(timeout=30) == 3
    tasks = chained("ask", inc, lambda x: distributed.secede() or asking(x), inc)
    assert sent(alone, tasks, tuple(tasks)).result(timeout=30) == 3
    assert alone.gather(alone.map(inc, range(10))) == list(range(1, 11))


def pausing(x: int) -> int:
    """Take longer than anybody thought."""
    time.sleep(2.5)
    return x + 1


def test_tasks_that_take_longer_than_they_did(alone: distributed.Client) -> None:
    tasks: dict[Key, GraphNode] = {f"pause-{n}": Task(f"pause-{n}", pausing, n) for n in range(6)}
    tasks["pause-end"] = Task("pause-end", max, *map(TaskRef, list(tasks)))
    future = sent(alone, tasks, tuple(tasks))
    assert future.result(timeout=60) == 6
    assert set(known(alone, "pause")) == set(tasks)


def test_a_key_that_the_scheduler_knows(alone: distributed.Client) -> None:
    """When a bundle is taken apart, what is there already is not made again."""
    there = alone.submit(inc, 41, key="there")
    wait(there)
    tasks: dict[Key, GraphNode] = {
        "there": Task("there", guilty, 1),
        "more": Task("more", lambda x: 1 // (x - 42), TaskRef("there")),
        "done": Task("done", inc, TaskRef("more")),
    }
    future = sent(alone, tasks, tuple(tasks))
    with pytest.raises(ZeroDivisionError, match="integer division"):
        future.result(timeout=30)
    assert alone.sync(alone.scheduler.get_error_cause, keys=["done"]) == "more"


def deadly(x: int) -> int:
    """End the worker."""
    os._exit(1)


def test_a_task_of_a_bundle_kills_every_worker(alone: distributed.Client) -> None:
    tasks = chained("deadly", inc, deadly, inc)
    future = sent(alone, tasks, tuple(tasks))
    with pytest.raises(distributed.KilledWorker, match="deadly-1"):
        future.result(timeout=100)


# -- a federation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """Two sites of one worker each."""
    with Federation(sites={"north": {"options": ONE}, "south": {"options": ONE}}) as found:
        yield found


@pytest.fixture
def forced(federation: Federation) -> Iterator[Client]:
    """A client that bundles whatever it may."""
    with dask.config.set({"daskfed.client.fusion": "always"}), Client(federation) as client:
        yield client


def lazy_chain(name: str, *functions: Callable[..., Any]) -> list[Delayed]:
    """Return calls of one function after another, each under a key of its own."""
    found: list[Any] = [0]
    for number, function in enumerate(functions):
        found.append(dask.delayed(function)(found[-1], dask_key_name=f"{name}-{number}"))
    return found[1:]


def lazy_tree(name: int, leaves: int) -> Delayed:
    """Return the sum of many small numbers; the number ``name`` is in its keys, and not in their prefixes."""
    level = [dask.delayed(inc)(n, dask_key_name=f"leaf-{name}-{n}") for n in range(leaves)]
    for depth in range(20):
        if len(level) == 1:
            break
        pairs = enumerate(zip(level[::4], level[1::4], level[2::4], level[3::4], strict=True))
        level = [dask.delayed(_add)(*four, dask_key_name=f"node-{name}-{depth}-{n}") for n, four in pairs]
    return level[0]


def _add(*numbers: int) -> int:
    return sum(numbers)


def expected(leaves: int) -> int:
    """Return what ``lazy_tree`` sums up to."""
    return leaves * (leaves + 1) // 2


def counted(client: Client) -> int:
    """Return how many transitions the schedulers of both sites have made so far."""
    found = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)
    return sum(found.values())


def test_the_second_run_is_bundled(federation: Federation) -> None:
    """By what the first has shown; and then it costs the schedulers far less."""
    with dask.config.set({"daskfed.client.fusion": "auto"}), Client(federation) as client:
        runs = []
        for number in range(2):
            before = counted(client)
            assert lazy_tree(number, 256).compute() == expected(256)
            runs.append(counted(client) - before)
            until(lambda: {"leaf", "node"} <= client._learned.keys())
        assert client._learned["leaf"].seconds < SHORT_S
        assert runs[1] < runs[0] / 2


def test_never_is_never(federation: Federation) -> None:
    with dask.config.set({"daskfed.client.fusion": "never"}), Client(federation) as client:
        assert client._bundling() is None
        assert lazy_tree(2, 64).compute() == expected(64)
        assert not client._learned


def test_intermediates_that_are_wanted(forced: Client) -> None:
    chain = lazy_chain("wanted", *[inc] * CHAIN)
    futures = forced.compute([chain[-1], chain[3], chain[6]])
    assert forced.gather(futures) == [CHAIN, 4, 7]
    kept = forced.persist(chain[4])
    assert forced.compute(chain[7]).result() == 8 and kept.compute() == 5


def test_an_inner_error(forced: Client) -> None:
    """Of the task that failed: its exception, its traceback, its key; what depends on it fails, and nothing else."""
    chain = lazy_chain("inner", *[inc] * 5, guilty, *[inc] * 4)
    after = dask.delayed(inc)(chain[-1], dask_key_name="inner-after")
    good = lazy_chain("fine", *[inc] * CHAIN)[-1]
    failed, later, fine = forced.compute([chain[-1], after, good])
    wait([failed, later, fine])
    assert (failed.status, later.status, fine.status) == ("error", "error", "finished")
    for future in (failed, later):
        assert str(future.exception()) == "on purpose with 5"
        assert traceback.extract_tb(future.traceback())[-1].name == "guilty"
    assert forced.sync(forced.scheduler.get_error_cause, keys=[failed.key]) == "inner-5"
    with pytest.raises(ZeroDivisionError, match="on purpose with 5"):
        forced.recreate_error_locally(failed)
    failed.retry()
    wait(failed)
    assert failed.status == "error" and str(failed.exception()) == "on purpose with 5"


def slow(x: int, path: Path) -> int:
    """Say that it runs, and take a while."""
    path.touch()
    time.sleep(1.0)
    return x + 1


def test_cancelling_while_a_bundle_runs(forced: Client, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    chain = lazy_chain("cancelled", inc, inc, lambda x: slow(x, path), inc, inc)
    future = forced.compute(chain[-1])
    until(path.exists)
    future.cancel()
    until(future.cancelled)
    assert lazy_tree(3, 64).compute() == expected(64)
    until(lambda: not any(forced.has_what().values()))


def test_a_worker_is_killed_within_a_bundle(forced: Client, tmp_path: Path) -> None:
    path = tmp_path / "died"
    chain = lazy_chain("mortal", inc, inc, lambda x: dying(x, path), *[inc] * 5)
    assert forced.compute(chain[-1]).result(timeout=60) == 8


def test_what_a_client_runs_again_by_itself(forced: Client) -> None:
    """A bundle is a task like others to who looks at it."""
    future = forced.compute(lazy_chain("again", *[inc] * CHAIN)[-1])
    assert forced.recreate_task_locally(future) == CHAIN


def test_a_span_stays(forced: Client) -> None:
    with distributed.span("my-span"):
        chain = lazy_chain("spanned", *[inc] * CHAIN)
    with distributed.span("other"):
        more = dask.delayed(inc)(chain[-1], dask_key_name="spanned-more")
    assert forced.compute(more).result() == CHAIN + 1


# -- one site ----------------------------------------------------------------------------------------------------------


def test_the_only_site_bundles_too() -> None:
    """Its graphs are opened for that, and stay whole; what is known of earlier ones is used."""
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, **NO_DASHBOARD}
    with dask.config.set({"daskfed.client.fusion": "always"}), Client(**options) as client:
        x = da.arange(1000, chunks=10)
        kept = (x * 2).persist()
        assert int((x + 1).sum().compute()) == 500500
        assert int(kept.max().compute()) == 1998 and len(kept.compute()) == 1000
        future = client.submit(inc, 1)
        assert dask.delayed(inc)(dask.delayed(inc)(future)).compute() == 4
        failed = client.compute(lazy_chain("lone", inc, guilty, inc)[-1])
        wait(failed)
        assert client.sync(client.scheduler.get_error_cause, keys=[failed.key]) == "lone-1"
