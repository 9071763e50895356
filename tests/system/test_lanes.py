"""Calls down lanes behave as tasks do: results, errors, retries, priorities, deaths of workers, clients inside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from operator import add
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
from distributed import Event, KilledWorker, get_client, get_worker, secede, worker_client

from daskfed import Client, Federation
from tests.system.commands import NO_DASHBOARD
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

TWO = {"n_workers": 1, "threads_per_worker": 2, **NO_DASHBOARD}


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """Two sites of one worker with two threads each."""
    with Federation(sites={"north": {"options": TWO}, "south": {"options": TWO}}) as fed:
        yield fed


@pytest.fixture
def client(federation: Federation) -> Iterator[Client]:
    """A client whose calls always go down lanes, where they may."""
    with dask.config.set({"daskfed.client.lanes": "always"}), Client(federation) as found:
        yield found


def inc(x: int) -> int:
    return x + 1


def slow(x: int, seconds: float = 0.1) -> int:
    time.sleep(seconds)
    return x


def scheduler_keys(client: Client) -> list[str]:
    """Return the keys of tasks that the sites' schedulers know."""
    told = client.run_on_scheduler(lambda dask_scheduler: [str(key) for key in dask_scheduler.tasks])
    return [key for keys in told.values() for key in keys]


def test_calls_are_no_tasks_of_a_scheduler(client: Client) -> None:
    futures = client.map(inc, range(2000), pure=False)
    assert client.gather(futures) == list(range(1, 2001))
    last = client.submit(inc, 1, pure=False)
    assert last.result(timeout=30) == 2 and last.type is int
    known = scheduler_keys(client)
    assert not {future.key for future in (*futures, last)}.intersection(known)


def test_some_of_a_map_fail(client: Client) -> None:
    def odd(x: int) -> int:
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x

    futures = client.map(odd, range(50), pure=False)
    assert client.gather(futures, errors="skip") == list(range(0, 50, 2))
    with pytest.raises(ValueError, match="7 is odd"):
        futures[7].result(timeout=10)
    assert "is odd" in str(futures[9].exception(timeout=10))
    assert futures[9].traceback(timeout=10) is not None


class Closed:
    """Cannot be opened where it arrives."""

    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


def test_what_cannot_be_opened_is_the_error_of_its_calls(client: Client) -> None:
    futures = client.map(lambda each: each, [Closed()] * 5, pure=False)
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(timeout=30)
    assert client.gather(client.map(inc, range(5), pure=False)) == [1, 2, 3, 4, 5]


def test_retries(client: Client, tmp_path: Path) -> None:
    def third_time(folder: str) -> int:
        made = len(list(Path(folder).iterdir()))
        (Path(folder) / str(made)).touch()
        if made < 2:
            raise RuntimeError("not yet")
        return made

    assert client.submit(third_time, str(tmp_path), retries=2, pure=False).result(timeout=20) == 2
    fails = client.submit(third_time, str(tmp_path / "nowhere"), retries=1, pure=False)
    with pytest.raises(FileNotFoundError):
        fails.result(timeout=20)


def test_a_large_result_stays_with_its_worker(client: Client) -> None:
    future = client.submit(np.ones, 10**6, pure=False)
    total = client.submit(np.sum, future, pure=False)
    assert total.result(timeout=20) == 10**6
    assert future.key in scheduler_keys(client)
    assert len(future.result(timeout=20)) == 10**6
    key = future.key
    del future, total
    until(lambda: key not in scheduler_keys(client))


def test_a_result_that_cannot_be_pickled_fails_where_it_is_gathered(client: Client) -> None:
    import threading

    future = client.submit(threading.Lock, pure=False)
    assert until(lambda: future.status != "pending") and future.status == "finished"
    with pytest.raises(TypeError, match="pickle|serialize"):
        future.result(timeout=20)


@pytest.mark.parametrize("site", ["north", "south"])
def test_graphs_take_results_of_calls(client: Client, site: str) -> None:
    parts = client.map(inc, range(20), pure=False)
    with dask.annotate(sites=[site]):
        total = dask.delayed(sum)([dask.delayed(part) for part in parts])
    assert client.compute(total).result(timeout=30) == sum(range(1, 21))
    assert client.submit(sum, parts, pure=False).result(timeout=30) == sum(range(1, 21))


def test_who_has_what_and_how_large(client: Client) -> None:
    future = client.submit(inc, 1, pure=False, site="north")
    assert future.result(timeout=20) == 2
    ((worker,),) = client.who_has([future]).values()
    assert worker.startswith("fed://north/")
    assert future.key in {key for keys in client.has_what().values() for key in keys}
    assert client.nbytes([future.key], summary=False)[future.key] > 0


def test_cancelled_calls_do_not_run(client: Client) -> None:
    name = f"gate-{time.monotonic()}"

    def wait_for(name: str, n: int) -> int:
        Event(f"{name}-{n}").set()
        Event(name).wait(30)
        return n

    futures = client.map(wait_for, [name] * 8, range(8), pure=False, site="south")
    until(lambda: sum(Event(f"{name}-{n}", client=client).is_set() for n in range(8)) == 2)
    late = [n for n in range(8) if not Event(f"{name}-{n}", client=client).is_set()]
    client.cancel([futures[n] for n in late])
    Event(name, client=client).set()
    assert sorted(client.gather([each for n, each in enumerate(futures) if n not in late])) == sorted(
        set(range(8)) - set(late)
    )
    assert client.submit(inc, 1, pure=False, site="south").result(timeout=20) == 2
    assert not [n for n in late if Event(f"{name}-{n}", client=client).is_set()]


def test_urgent_calls_overtake(client: Client, tmp_path: Path) -> None:
    def note(folder: str, what: str) -> None:
        time.sleep(0.02)
        with open(f"{folder}/order", "a") as file:
            file.write(what)

    usual = client.map(note, [str(tmp_path)] * 100, ["u"] * 100, pure=False, site="north")
    urgent = client.submit(note, str(tmp_path), "!", priority=10, pure=False, site="north")
    client.gather([*usual, urgent])
    assert (tmp_path / "order").read_text().index("!") < 50


def test_resources_and_other_annotations_go_to_the_scheduler(client: Client) -> None:
    with dask.annotate(note="kept"):
        future = client.submit(lambda: get_worker().get_current_task(), pure=False)
    assert future.result(timeout=20) == future.key


class TestClientsInCalls:
    @pytest.mark.parametrize("way", ["worker_client", "secede"])
    def test_all_threads_are_in_lanes_and_each_call_waits_for_a_graph(self, client: Client, way: str) -> None:
        def by_worker_client(n: int) -> int:
            with worker_client() as own:
                return int(own.compute(dask.delayed(sum)([dask.delayed(inc)(n), n])).result(timeout=60))

        def by_secede(n: int) -> int:
            own = get_client()
            future = own.submit(inc, n, pure=False)
            secede()
            return int(future.result(timeout=60)) + n

        function = by_worker_client if way == "worker_client" else by_secede
        futures = client.map(function, range(16), pure=False, site="north")
        assert client.gather(futures) == [2 * n + 1 for n in range(16)]

    def test_calls_that_step_aside_leave_their_threads_to_others(self, client: Client) -> None:
        def step_aside(name: str) -> bool:
            secede()
            return bool(Event(name).wait(timeout=60))

        names = [f"aside-{n}" for n in range(6)]
        aside = client.map(step_aside, names, pure=False, site="north")
        for name in names:
            client.submit(lambda each: Event(each).set(), name, pure=False, site="north").result(timeout=30)
        assert client.gather(aside) == [True] * 6

    def test_what_a_call_prints_and_where_it_runs(self, client: Client) -> None:
        def work() -> str:
            print("said in a lane")
            return str(get_worker().address)

        assert client.submit(work, pure=False).result(timeout=20).startswith("tcp://")

    def test_a_future_that_a_call_returns(self, client: Client) -> None:
        def work() -> Any:
            return get_client().submit(inc, 1, pure=False)

        assert client.submit(work, pure=False).result(timeout=20).result(timeout=20) == 2


def test_large_results_are_told_of_at_once(client: Client) -> None:
    def large(n: int) -> bytes:
        return bytes(n)

    client.submit(large, 2**20, pure=False).result(timeout=30)  # the function is known
    took = []
    for _ in range(5):
        start = time.monotonic()
        assert len(client.submit(large, 2**20, pure=False).result(timeout=30)) == 2**20
        took.append(time.monotonic() - start)
    assert min(took) < 0.5, "not only when the turn of a lane is over"


class TestDeaths:
    def test_a_worker_dies_and_nothing_is_lost(self, client: Client, tmp_path: Path) -> None:
        def once(folder: str, n: int) -> int:
            flag = Path(folder) / "died"
            if n == 37 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return n

        futures = client.map(once, [str(tmp_path)] * 200, range(200), pure=False)
        assert client.gather(futures) == list(range(200))

    def test_one_that_kills_workers_is_given_up_and_its_neighbours_finish(self, client: Client) -> None:
        def deadly(n: int) -> int:
            if n == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return n

        futures = client.map(deadly, range(6), pure=False)
        with pytest.raises(Exception, match="kill|died") as found:
            futures[3].result(timeout=200)
        assert isinstance(found.value, KilledWorker) or "Killed" in type(found.value).__name__
        assert client.gather([each for n, each in enumerate(futures) if n != 3]) == [0, 1, 2, 4, 5]

    def test_restart_while_lanes_run(self, client: Client) -> None:
        futures = client.map(slow, range(40), pure=False, site="north")
        time.sleep(0.5)
        client.restart()
        assert all(future.status == "cancelled" for future in futures)
        again = client.map(slow, range(40), pure=False)
        assert client.gather(again) == list(range(40))


def test_graphs_get_their_turn_beside_many_calls(client: Client) -> None:
    calls = client.map(slow, range(400), seconds=0.02, pure=False, site="north")  # 4 s of two threads
    time.sleep(0.5)
    start = time.monotonic()
    with dask.annotate(sites=["north"]):
        graph = dask.delayed(sum)([dask.delayed(slow)(n, seconds=0.05) for n in range(4)])
    assert client.compute(graph).result(timeout=60) == 6
    waited = time.monotonic() - start
    assert any(not call.done() for call in calls), "the graph ran while calls wait"
    assert waited < 3.5
    assert client.gather(calls) == list(range(400))


class TestAnEmbeddedSite:
    """Its graphs pass as a whole, and what the site's scheduler does not know they must get."""

    @pytest.fixture
    def client(self) -> Iterator[Client]:
        options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
        with dask.config.set({"daskfed.client.lanes": "always"}), Client(**options) as found:
            yield found

    def test_graphs_of_what_calls_make(self, client: Client) -> None:
        made, waiting = client.map(inc, range(20)), client.map(slow, range(20), pure=False)
        assert client.submit(sum, made).result(timeout=30) == 210
        assert client.submit(sum, waiting).result(timeout=30) == 190
        assert client.submit(lambda *, given: given["it"] + 1, given={"it": made[1]}).result(timeout=30) == 3
        total = dask.delayed(sum)([dask.delayed(inc)(made[2]), waiting[3], made[4]])
        assert client.compute(total).result(timeout=30) == 12
        array = dask.array.from_delayed(dask.delayed(np.full)(4, made[0]), (4,), dtype=int)
        assert client.compute(array.sum()).result(timeout=30) == 4

    def test_calls_of_calls(self, client: Client) -> None:
        level = client.map(inc, range(64), pure=False)
        while len(level) > 1:
            level = [client.submit(add, *pair, pure=False) for pair in zip(level[::2], level[1::2], strict=True)]
        assert level[0].result(timeout=60) == sum(range(1, 65))

    def test_those_that_fail_fail_what_needs_them_and_nothing_else(self, client: Client) -> None:
        def fails(x: int) -> int:
            raise ValueError(x)

        bad, good = client.submit(fails, 3, pure=False), client.submit(inc, 3)
        of_bad, of_good = client.compute([dask.delayed(inc)(bad), dask.delayed(inc)(good)])
        assert of_good.result(timeout=30) == 5
        with pytest.raises(ValueError, match="3"):
            of_bad.result(timeout=30)


class TestScaling:
    def test_many_calls_make_an_adaptive_cluster_grow_and_it_shrinks_after_them(self) -> None:
        options = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
        adaptive = {"minimum": 1, "maximum": 3, "interval": "200ms", "target_duration": "2s", "wait_count": 3}
        with (
            dask.config.set({"daskfed.client.lanes": "always"}),
            Federation(sites={"north": {"options": options}}) as fed,
            Client(fed) as client,
        ):
            fed.adapt(**adaptive)
            calls = client.map(slow, range(400), seconds=0.05, pure=False)  # 20 s of one thread
            until(lambda: len(client.scheduler_info()["workers"]) == 3, 30)
            assert any(not call.done() for call in calls), "it grew while there was work"
            assert client.gather(calls) == list(range(400))
            until(lambda: len(client.scheduler_info()["workers"]) == 1, 30)
            assert client.gather(client.map(inc, range(50), pure=False)) == list(range(1, 51))
            assert all(call.status == "finished" for call in calls)

    def test_workers_are_retired_while_they_run_lanes(self) -> None:
        options = {"n_workers": 2, "threads_per_worker": 1, **NO_DASHBOARD}
        with (
            dask.config.set({"daskfed.client.lanes": "always"}),
            Federation(sites={"north": {"options": options}}) as fed,
            Client(fed) as client,
        ):
            large = client.map(bytes, [2**20] * 20, pure=False)
            calls = client.map(slow, range(200), seconds=0.02, pure=False)
            time.sleep(0.7)
            client.retire_workers([next(iter(client.scheduler_info()["workers"]))])
            assert client.gather(calls) == list(range(200))
            assert [len(value) for value in client.gather(large)] == [2**20] * 20
