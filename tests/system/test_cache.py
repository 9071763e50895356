"""Results that outlive their run: what was computed with ``cache=True`` is not computed again, by whomever."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Queue, Variable, as_completed, wait

from daskfed import Client, Federation
from daskfed.data.memo import FILE, Memo
from daskfed.errors import ConfigurationError, NotCacheable
from tests.system.commands import NO_DASHBOARD
from tests.system.killable import killable
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

TWO = {"n_workers": 1, "threads_per_worker": 2, **NO_DASHBOARD}
SOON = 30


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """Two sites of one worker with two threads each."""
    with Federation(sites={"north": {"options": TWO}, "south": {"options": TWO}}) as fed:
        yield fed


@pytest.fixture(params=["never", "always"])
def new_client(federation: Federation, tmp_path: Path, request: Any) -> Iterator[Callable[[], Client]]:
    """Make clients with one empty store, each as in a run of its own; without lanes, and with."""
    clients: list[Client] = []

    def client() -> Client:
        clients.append(Client(federation))
        return clients[-1]

    with dask.config.set({"daskfed.cache.directory": str(tmp_path / "memo"), "daskfed.client.lanes": request.param}):
        yield client
        for each in reversed(clients):
            each.close()
    dask.config.config.pop("scheduler", None)  # which Dask puts back in the order in which clients began


class Runs:
    """Counts in a file how often something ran."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __len__(self) -> int:
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def note(path: str) -> None:
    with open(path, "a") as file:
        file.write("x")


def inc(x: Any, path: str) -> Any:
    note(path)
    return x + 1


def large(n: int, path: str) -> Any:
    note(path)
    return np.arange(n)


def fails(path: str) -> None:
    note(path)
    raise ValueError("not today")


def plus(x: Any, y: Any) -> Any:
    return x + y


def kept(client: Client, entries: int) -> None:
    """Wait until so many results are kept."""
    until(lambda: client.cache.info()["entries"] == entries)


class TestSubmit:
    def test_a_later_run_is_answered_at_once(self, new_client: Callable[[], Client], runs: Runs) -> None:
        first = new_client()
        future = first.submit(inc, 1, runs.path, cache=True)
        assert future.result(timeout=SOON) == 2
        del future
        first.close()
        second = new_client()
        future = second.submit(inc, 1, path=runs.path, cache=True)
        assert future.result(timeout=SOON) == 2 and len(runs) == 2, "another call: path is named here"
        again = second.submit(inc, 1, runs.path, cache=True)
        assert again.status == "finished" and again.done() and again.result() == 2 and len(runs) == 2
        info = second.cache.info()
        assert (info["hits"], info["misses"]) == (1, 1)

    def test_what_has_changed_runs(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()

        def make(n: int) -> Callable[[str], int]:
            def work(path: str) -> int:
                note(path)
                return n

            return work

        for n, cache in ((1, True), (1, True), (2, True), (2, "v2"), (2, "v3"), (2, "v2"), (1, True)):
            assert client.submit(make(n), runs.path, cache=cache).result(timeout=SOON) == n
            kept(client, len(runs))
        assert len(runs) == 4

    @pytest.mark.parametrize("n", [10, 10**4, 10**6])
    def test_values_of_any_size(self, new_client: Callable[[], Client], runs: Runs, n: int) -> None:
        client = new_client()
        assert client.submit(large, n, runs.path, cache=True).result(timeout=SOON).sum() == n * (n - 1) // 2
        kept(client, 1)
        other = new_client()
        future = other.submit(large, n, runs.path, cache=True)
        assert future.status == "finished"
        np.testing.assert_array_equal(future.result(timeout=SOON), np.arange(n))
        assert len(runs) == 1

    def test_values_that_are_no_single_pickle(self, new_client: Callable[[], Client], runs: Runs) -> None:
        def several(path: str) -> Any:
            note(path)
            return {"a": [np.arange(10**5), "b"], "c": None}, np.ones(3)

        client = new_client()
        client.submit(several, runs.path, cache=True).result(timeout=SOON)
        kept(client, 1)
        other = new_client()
        future = other.submit(several, runs.path, cache=True)
        first, second = future.result(timeout=SOON)
        assert first["a"][0].sum() == sum(range(10**5)) and first["c"] is None and second.sum() == 3
        total = other.submit(lambda value: value[0]["a"][0].sum(), future, pure=False)
        assert total.result(timeout=SOON) == sum(range(10**5)) and len(runs) == 1

    def test_identical_calls_at_the_same_time_run_once(self, new_client: Callable[[], Client], runs: Runs) -> None:
        def slow(path: str) -> int:
            time.sleep(0.3)
            note(path)
            return 1

        client = new_client()
        futures = [client.submit(slow, runs.path, cache=True) for _ in range(5)]
        assert len({future.key for future in futures}) == 1
        assert client.gather(futures) == [1] * 5 and len(runs) == 1

    def test_impure_calls_have_keys_of_their_own(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        client.submit(inc, 1, runs.path, cache=True).result(timeout=SOON)
        kept(client, 1)
        futures = [client.submit(inc, 1, runs.path, cache=True, pure=False) for _ in range(2)]
        assert client.gather(futures) == [2, 2] and futures[0].key != futures[1].key and len(runs) == 1

    def test_errors_are_not_kept(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        for n in (1, 2):
            future = client.submit(fails, runs.path, cache=True)
            with pytest.raises(ValueError, match="not today"):
                future.result(timeout=SOON)
            assert len(runs) == n
            future.release()
            del future
            until(lambda: not client.futures)
        assert client.cache.info()["entries"] == 0

    def test_waiting_works(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        client.gather(client.map(inc, range(3), path=runs.path, cache=True))
        kept(client, 3)
        other = new_client()
        futures = other.map(inc, range(4), path=runs.path, cache=True)
        assert [future.status for future in futures[:3]] == ["finished"] * 3
        called: list[Any] = []
        futures[0].add_done_callback(lambda future: called.append(future.result()))
        assert not wait(futures, timeout=SOON).not_done
        assert sorted(future.result() for future in as_completed(futures)) == [1, 2, 3, 4]
        until(lambda: called == [1])
        assert len(runs) == 4

    def test_what_cannot_be_told_is_an_error(self, new_client: Callable[[], Client]) -> None:
        client = new_client()
        with pytest.raises(NotCacheable, match=r"argument 2 of plus: .*generator.*leave out cache=True"):
            client.submit(plus, 1, (n for n in ()), cache=True)
        plain = client.submit(plus, 1, 2)
        with pytest.raises(NotCacheable, match=r"argument 1 of plus: .*'plus-.*cache=True too"):
            client.submit(plus, plain, 2, cache=True)
        with pytest.raises(ConfigurationError, match="cache=5 must be True"):
            client.submit(plus, 1, 2, cache=5)
        with pytest.raises(ConfigurationError, match="an actor cannot be kept"):
            client.submit(list, cache=True, actor=True)

    def test_a_function_with_a_parameter_of_that_name(self, new_client: Callable[[], Client]) -> None:
        client = new_client()

        def work(cache: Any) -> Any:
            return cache

        assert client.submit(work, cache=True).result(timeout=SOON) is True
        assert client.cache.info()["misses"] == 0

    def test_sites_count(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        for site in ("north", "south", "north"):
            assert client.submit(inc, 1, runs.path, cache=True, site=site).result(timeout=SOON) == 2
            kept(client, min(2, len(runs)))
        assert len(runs) == 2

    def test_a_cancelled_call_is_not_kept_and_runs_when_it_is_asked_for(
        self, new_client: Callable[[], Client], runs: Runs
    ) -> None:
        def slow(path: str) -> int:
            time.sleep(1)
            note(path)
            return 1

        client = new_client()
        busy = client.map(time.sleep, [0.5] * 8, pure=False)
        future = client.submit(slow, runs.path, cache=True)
        client.cancel(future)
        assert future.cancelled()
        client.gather(busy)
        assert client.submit(slow, runs.path, cache=True).result(timeout=SOON) == 1
        kept(client, 1)
        hit = client.submit(slow, runs.path, cache=True)
        client.cancel(hit)
        del hit
        again = client.submit(slow, runs.path, cache=True)
        assert again.result(timeout=SOON) == 1 and len(runs) == 1

    def test_annotations_hold_for_calls(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        for _ in range(2):
            with dask.annotate(cache=True):
                assert client.submit(inc, 1, runs.path).result(timeout=SOON) == 2
                assert client.gather(client.map(inc, [1, 2], path=runs.path)) == [2, 3]
            kept(client, 3)
        assert len(runs) == 3


class TestInputs:
    def test_futures_from_the_store_are_inputs(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        client.gather(
            [client.submit(inc, 1, runs.path, cache=True), client.submit(large, 10**5, runs.path, cache=True)]
        )
        kept(client, 2)
        other = new_client()
        small, array = other.submit(inc, 1, runs.path, cache=True), other.submit(large, 10**5, runs.path, cache=True)
        assert other.explain(small)["phase"] == "cached", "nothing has needed it"
        both = other.submit(plus, small, array, pure=False)
        assert both.result(timeout=SOON).sum() == sum(range(10**5)) + 2 * 10**5
        assert other.explain(small)["phase"] == "held" and other.who_has([small])[small.key]
        graph = dask.delayed(plus)(dask.delayed(small), dask.delayed(array)[5])
        assert other.compute(graph).result(timeout=SOON) == 7
        x = da.from_delayed(dask.delayed(array), (10**5,), int)
        assert (x + 1).sum().compute() == sum(range(10**5)) + 10**5
        assert other.gather([small, both, [array]])[0] == 2
        assert len(runs) == 2

    def test_chains_of_cached_calls(self, new_client: Callable[[], Client], runs: Runs) -> None:
        for _ in range(2):
            client = new_client()
            first = client.submit(inc, 1, runs.path, cache=True)
            second = client.submit(inc, first, runs.path, cache=True)
            third = client.submit(plus, first, second, cache=True)
            assert third.result(timeout=SOON) == 5
            kept(client, 3)
        assert len(runs) == 2 and third.status == "finished"

    def test_scattered_data_counts_as_what_it_is(self, new_client: Callable[[], Client], runs: Runs) -> None:
        for n in range(2):
            client = new_client()
            (data,) = client.scatter([np.arange(10)], hash=False)
            future = client.submit(inc, data, runs.path, cache=True)
            assert future.status == "finished" or n == 0
            assert future.result(timeout=SOON).sum() == 55 and len(runs) == 1
            kept(client, 1)

    def test_variables_queues_and_datasets(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        assert client.gather(client.map(inc, range(3), path=runs.path, cache=True)) == [1, 2, 3]
        kept(client, 3)
        one, other = new_client(), new_client()
        a, b, c = one.map(inc, range(3), path=runs.path, cache=True)
        name = f"cached-{time.monotonic()}"
        Variable(name, client=one).set(a)
        Queue(name, client=one).put(b)
        one.publish_dataset(c, name=name)
        assert Variable(name, client=other).get().result(timeout=SOON) == 1
        assert Queue(name, client=other).get().result(timeout=SOON) == 2
        assert other.get_dataset(name).result(timeout=SOON) == 3
        one.unpublish_dataset(name)
        Variable(name, client=one).delete()
        assert len(runs) == 3


class TestMap:
    def test_some_hits(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        assert client.gather(client.map(inc, range(0, 100, 2), path=runs.path, cache=True)) == list(range(1, 101, 2))
        kept(client, 50)
        other = new_client()
        futures = other.map(inc, range(100), path=runs.path, cache=True, batch_size=30)
        assert [future.status for future in futures[::2]] == ["finished"] * 50
        assert other.gather(futures) == list(range(1, 101)) and len(runs) == 100
        assert other.submit(sum, futures, pure=False).result(timeout=SOON) == sum(range(1, 101))
        kept(other, 100)
        named = new_client().map(inc, [7, 8], path=runs.path, cache=True, key=["seven", "eight"])
        assert [future.key for future in named] == ["seven", "eight"]
        assert [future.result(timeout=SOON) for future in named] == [8, 9] and len(runs) == 100

    def test_the_same_call_twice(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        futures = client.map(inc, [1, 1, 2, 1], path=runs.path, cache=True)
        assert client.gather(futures) == [2, 2, 3, 2] and len(runs) == 2
        impure = client.map(inc, [5, 5], path=runs.path, cache=True, pure=False)
        assert client.gather(impure) == [6, 6] and len({future.key for future in impure}) == 2


class TestGraphs:
    def test_delayed(self, new_client: Callable[[], Client], runs: Runs) -> None:
        def built(offset: int) -> Any:
            with dask.annotate(cache=True):
                middle = dask.delayed(inc)(dask.delayed(inc)(1, runs.path), runs.path)
            return dask.delayed(plus)(middle, offset), middle

        client = new_client()
        total, _ = built(10)
        assert client.compute(total).result(timeout=SOON) == 13 and len(runs) == 2
        kept(client, 2)
        other = new_client()
        total, middle = built(20)
        assert other.compute(total).result(timeout=SOON) == 23
        alone = other.compute(middle)
        assert alone.status == "finished" and alone.result(timeout=SOON) == 3
        assert other.submit(plus, alone, 1, pure=False).result(timeout=SOON) == 4
        assert other.submit(plus, alone, 2, cache=True).result(timeout=SOON) == 5
        assert other.gather(other.compute([total, middle])) == [23, 3] and len(runs) == 2
        as_call = other.submit(inc, 1, runs.path, cache=True)
        assert as_call.status == "finished", "a call is what a task is"

    def test_a_changed_argument_runs_what_it_concerns(self, new_client: Callable[[], Client], runs: Runs) -> None:
        for x, ran in ((1, 2), (1, 2), (2, 4)):
            client = new_client()
            with dask.annotate(cache=True):
                result = dask.delayed(inc)(dask.delayed(inc)(x, runs.path), runs.path)
                assert dask.delayed(plus)(result, result).compute() == 2 * (x + 2)
            until(lambda ran=ran: len(runs) == ran)  # type: ignore[misc]
            until(lambda client=client, ran=ran: client.cache.info()["entries"] == ran * 3 // 2)  # type: ignore[misc]

    def test_a_version(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        for n, version in enumerate(("v1", "v1", "v2")):
            with dask.annotate(cache=version):
                task = dask.delayed(inc)(1, runs.path)
            assert client.compute(task).result(timeout=SOON) == 2 and len(runs) == (1, 1, 2)[n]
            kept(client, len(runs))

    def test_arrays(self, new_client: Callable[[], Client], runs: Runs) -> None:
        def noted(block: Any, path: str) -> Any:
            note(path)
            return block + 1

        def built() -> Any:
            x = da.arange(1600, chunks=400)
            with dask.annotate(cache=True):
                return x.map_blocks(noted, runs.path, dtype=int, meta=np.empty(0, int))

        client = new_client()
        first = client.compute(built()).result(timeout=SOON)
        assert len(runs) == 4 and (first == np.arange(1, 1601)).all()
        kept(client, 4)
        other = new_client()
        whole = other.compute(built())
        np.testing.assert_array_equal(whole.result(timeout=SOON), first)
        assert built().sum().compute() == first.sum() and built().persist().max().compute() == 1600 and len(runs) == 4

    def test_the_damaged_part_of_a_graph_runs(
        self, new_client: Callable[[], Client], runs: Runs, tmp_path: Path
    ) -> None:
        def built() -> Any:
            with dask.annotate(cache=True):
                return [dask.delayed(large)(10**4 + n, runs.path).sum() for n in range(3)]

        client = new_client()
        expected = client.gather(client.compute(built()))
        until(lambda: client.cache.info()["entries"] == 6)
        files = [path for path in (tmp_path / "memo" / "blobs").rglob("*") if path.is_file()]
        files[0].write_bytes(b"damaged")
        client.cache.clear("sum")
        other = new_client()
        assert other.gather(other.compute(built())) == expected and len(runs) == 4

    def test_what_cannot_be_told_names_the_task(self, new_client: Callable[[], Client]) -> None:
        client = new_client()
        source = dask.delayed(list)((n for n in ()), dask_key_name="my-source")
        with dask.annotate(cache=True):
            task = dask.delayed(len)(source)
        with pytest.raises(NotCacheable, match="'my-source', which is needed by one that is annotated with cache"):
            client.compute(task)

    def test_intermediate_results_are_let_go(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        with dask.annotate(cache=True):
            parts = [dask.delayed(large)(10**4 + n, runs.path) for n in range(4)]
        total = client.compute(dask.delayed(sum)([part.sum() for part in parts]))
        assert total.result(timeout=SOON) > 0
        kept(client, 4)
        until(lambda: set(client.futures) == {total.key})

    def test_a_graph_that_nobody_wants_any_more_ends(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        with dask.annotate(cache=True):
            parts = [dask.delayed(time.sleep)(0.5 + n / 1000) for n in range(40)]
        future = client.compute(dask.delayed(len)(parts))
        client.cancel(future)
        until(lambda: not client.futures, timeout_s=20)


class TestStore:
    def test_info_and_clear(self, new_client: Callable[[], Client], runs: Runs) -> None:
        client = new_client()
        client.gather([client.submit(inc, 1, runs.path, cache=True), client.submit(plus, 1, 2, cache=True)])
        kept(client, 2)
        assert client.cache.clear("inc") == 1 and client.cache.info()["entries"] == 1
        other = new_client()
        assert other.submit(plus, 1, 2, cache=True).status == "finished"
        assert other.submit(inc, 1, runs.path, cache=True).result(timeout=SOON) == 2 and len(runs) == 2
        assert client.cache.clear() >= 1

    def test_opening_files_is_not_kept(self, new_client: Callable[[], Client]) -> None:
        client = new_client()
        with dask.annotate(cache=True):
            lazy = client.open(da.ones, 4, chunks=2, site="north")
            assert client.submit(plus, 1, 2, cache=False).result(timeout=SOON) == 3
        assert client.cache.info()["misses"] == 0
        assert lazy.sum().compute() == 4

    def test_too_large_to_keep(self, new_client: Callable[[], Client], runs: Runs) -> None:
        with dask.config.set({"daskfed.cache.max-value": "100 kB"}):
            client = new_client()
            client.gather([client.submit(large, n, runs.path, cache=True) for n in (10, 10**5)])
            kept(client, 1)
            time.sleep(0.3)
            assert client.cache.info()["entries"] == 1

    def test_a_folder_that_others_can_write_to(self, new_client: Callable[[], Client], tmp_path: Path) -> None:
        (tmp_path / "memo").mkdir()
        (tmp_path / "memo").chmod(0o777)
        with pytest.raises(ConfigurationError, match="others may write to"):
            new_client().submit(plus, 1, 2, cache=True)

    def test_a_damaged_store_is_no_reason_not_to_compute(
        self, new_client: Callable[[], Client], runs: Runs, tmp_path: Path
    ) -> None:
        client = new_client()
        client.submit(inc, 1, runs.path, cache=True).result(timeout=SOON)
        kept(client, 1)
        (tmp_path / "memo" / FILE).write_bytes(b"nonsense" * 10_000)
        for path in (tmp_path / "memo").glob(f"{FILE}-*"):
            path.unlink()
        other = new_client()
        assert other.submit(inc, 1, runs.path, cache=True).result(timeout=SOON) == 2 and len(runs) == 2


RUN = """
import os, sys, time
import numpy as np
import dask
from daskfed import Client

def work(n, path):
    with open(path, "a") as file:
        file.write("x")
    return np.full(20_000, n)

if __name__ == "__main__":
    address, folder, path, kill = sys.argv[1:]
    dask.config.set({"daskfed.cache.directory": folder})
    with Client(address) as client:
        futures = client.map(work, range(60), path=path, cache=True)
        print("hits", sum(future.status == "finished" for future in futures), flush=True)
        values = client.gather(futures)
        assert all((value == n).all() and len(value) == 20_000 for n, value in enumerate(values))
        print("done", flush=True)
        if kill == "no":
            while client.cache.info()["entries"] < 60:
                time.sleep(0.01)
        else:
            time.sleep(60)
"""


class TestProcesses:
    @pytest.fixture
    def run(self, federation: Federation, tmp_path: Path, runs: Runs) -> Callable[..., subprocess.Popen[str]]:
        (tmp_path / "program.py").write_text(textwrap.dedent(RUN))

        def start(kill: str = "no", seed: int = 0) -> subprocess.Popen[str]:
            arguments = [federation.scheduler_address, str(tmp_path / "memo"), runs.path, kill]
            command = [sys.executable, str(tmp_path / "program.py"), *arguments]
            env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)}
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)

        return start

    def test_another_process(self, run: Callable[..., subprocess.Popen[str]], runs: Runs) -> None:
        outputs = [run(seed=seed).communicate(timeout=90)[0].split() for seed in (1, 2)]
        assert outputs == [["hits", "0", "done"], ["hits", "60", "done"]] and len(runs) == 60

    def test_two_at_once_and_one_is_killed_while_it_stores(
        self, run: Callable[..., subprocess.Popen[str]], runs: Runs, tmp_path: Path
    ) -> None:
        killed, other = run(kill="yes", seed=1), run(seed=2)
        assert killed.stdout is not None
        while killed.stdout.readline() != "done\n":
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=SOON)
        assert other.communicate(timeout=90)[0].split()[-1] == "done"
        memo = Memo(tmp_path / "memo", 10**10)
        memo.check()
        assert memo.contents().entries == 60 and len(list(memo.found(entries(memo)))) == 60
        assert run(seed=3).communicate(timeout=90)[0].split() == ["hits", "60", "done"]
        assert 60 <= len(runs) <= 120, "those run twice that both had missed"

    def test_results_are_flushed_when_a_process_ends(self, federation: Federation, tmp_path: Path, runs: Runs) -> None:
        source = RUN.replace("while client.cache.info()", "while False and client.cache.info()")
        (tmp_path / "program.py").write_text(source)
        arguments = [federation.scheduler_address, str(tmp_path / "memo"), runs.path, "no"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, str(tmp_path / "program.py"), *arguments], check=True, timeout=90, env=env)
        assert Memo(tmp_path / "memo", 10**10).contents().entries == 60


def entries(memo: Memo) -> list[str]:
    """Return all tokens of a store."""
    return [token for (token,) in memo._reader.execute("SELECT token FROM entries")]


class TestAsynchronous:
    """On an event loop nothing may wait for a disk: a thread looks, and futures are pending until it has."""

    def test_everything(self, federation: Federation, new_client: Callable[[], Client], runs: Runs) -> None:
        async def run(hits: bool) -> None:
            async with Client(federation.scheduler_address, asynchronous=True) as client:
                first = client.submit(inc, 1, runs.path, cache=True)
                again = client.submit(inc, 1, runs.path, cache=True)
                at_once = client.submit(plus, first, 1, pure=False)
                assert first.key == again.key and first.status == "pending"
                assert await at_once == 3 and await again == 2
                assert await client.gather(client.map(inc, range(5, 8), path=runs.path, cache=True)) == [6, 7, 8]
                with dask.annotate(cache=True):
                    middle = dask.delayed(inc)(dask.delayed(inc)(20, runs.path), runs.path)
                total = dask.delayed(plus)(middle, [1])  # fails if it runs: what was kept is above it
                x = da.ones(10, chunks=5)
                assert await client.compute(middle) == 22 and await client.compute(x.sum()) == 10
                failed = client.compute(total)
                assert isinstance(await failed.exception(), TypeError)
                dropped = client.submit(inc, 100, runs.path, cache=True)
                dropped.release()
                while (await client.cache.info())["entries"] < 6:
                    await asyncio.sleep(0.01)

        asyncio.run(run(hits=False))
        ran = len(runs)
        assert ran in (6, 7), "the released one may have run"
        asyncio.run(run(hits=True))
        assert len(runs) <= ran + 2, "what was needed at once is sent unlooked, and so may be the released one"

    def test_what_goes_wrong_is_the_error_of_the_future(
        self, federation: Federation, new_client: Callable[[], Client], tmp_path: Path
    ) -> None:
        (tmp_path / "memo").mkdir()
        (tmp_path / "memo").chmod(0o777)

        async def run() -> None:
            async with Client(federation.scheduler_address, asynchronous=True) as client:
                future = client.submit(plus, 1, 2, cache=True)
                with pytest.raises(ConfigurationError, match="others may write"):
                    await future

        asyncio.run(run())


def test_values_from_the_store_survive_losses(tmp_path: Path, runs: Runs) -> None:
    with dask.config.set({"daskfed.cache.directory": str(tmp_path / "memo")}):
        with killable(tmp_path, "north", "south") as fed:
            with fed.client() as client:
                client.gather(client.map(inc, range(4), path=runs.path, cache=True))
                kept(client, 4)
            with fed.client() as client:
                here, sent, *_ = futures = client.map(inc, range(4), path=runs.path, cache=True)
                with dask.annotate(sites="north"):
                    doubled = client.submit(plus, sent, sent, pure=False)
                assert doubled.result(timeout=SOON) == 4
                fed.kill_hub()
                assert client.submit(plus, here, sent, pure=False).result(timeout=SOON) == 3
                assert [future.status for future in futures] == ["finished"] * 4
                fed.kill_site("north")
                fed.add("east")
                assert client.submit(sum, futures, pure=False).result(timeout=SOON) == 10
                client.restart()
                assert here.cancelled()
                again = client.map(inc, range(4), path=runs.path, cache=True)
                assert client.submit(sum, again, pure=False).result(timeout=SOON) == 10 and len(runs) == 4


@pytest.mark.parametrize("lanes", ["never", "always"])
def test_a_client_with_its_own_site(tmp_path: Path, runs: Runs, lanes: str) -> None:
    with dask.config.set({"daskfed.cache.directory": str(tmp_path / "memo"), "daskfed.client.lanes": lanes}):
        for n in range(2):
            with Client(**TWO) as client:
                one, array = (
                    client.submit(inc, 1, runs.path, cache=True),
                    client.submit(large, 10**5, runs.path, cache=True),
                )
                assert one.status == "finished" or n == 0
                assert one.result(timeout=SOON) == 2 and array.result(timeout=SOON)[-1] == 10**5 - 1
                with dask.annotate(cache=True):
                    task = dask.delayed(inc)(5, runs.path)
                assert dask.delayed(plus)(task, 1).compute() == 7
                assert da.ones(10, chunks=5).sum().compute() == 10
                if n:
                    total = client.submit(plus, one, array, pure=False)
                    assert total.result(timeout=SOON)[0] == 2
                    graph = dask.delayed(plus)(dask.delayed(one), dask.delayed(array)[1])
                    assert client.compute(graph).result(timeout=SOON) == 3
                kept(client, 3)
        assert len(runs) == 3
