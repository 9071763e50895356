"""One system runs one case of calls, in a process of its own: ``python _calls.py SYSTEM CASE``; prints JSON.

Every system has two workers of one thread each on this machine, configured as its manual says for short tasks.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Submit = Callable[..., Any]
WORKERS = 2
QUIET = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": ":0"}


def nothing(x: int) -> int:
    """Return its argument."""
    return x


def sleeps(x: int, seconds: float) -> int:
    """Sleep, and return the first argument."""
    time.sleep(seconds)
    return x


class System:
    """Runs calls: ``map`` returns futures of all, ``submit`` one, ``results`` their values in order."""

    def __init__(self, map_: Submit, submit: Submit, results: Callable[[list[Any]], list[Any]]) -> None:
        self.map, self.submit, self.results = map_, submit, results


def _dask(client: Any) -> System:
    return System(
        lambda function, *columns: client.map(function, *columns, pure=False),
        lambda function, *args: client.submit(function, *args, pure=False),
        client.gather,
    )


@contextlib.contextmanager
def daskfed_embedded() -> Iterator[System]:
    """Run ``Client()`` of daskfed."""
    import dask

    from daskfed import Client

    dask.config.set({"daskfed.client.lanes": "auto"})
    with Client(**QUIET) as client:
        yield _dask(client)


@contextlib.contextmanager
def daskfed_apart() -> Iterator[System]:
    """Run daskfed with the hub and the site in processes of their own."""
    import dask
    from _common import hub_and_sites

    from daskfed import Client

    dask.config.set({"daskfed.client.lanes": "auto"})
    with hub_and_sites(("north",), n_workers=WORKERS) as (address, _), Client(address) as client:
        client.wait_for_workers(WORKERS)
        yield _dask(client)


@contextlib.contextmanager
def stock(saturation: float | str = 1.1) -> Iterator[System]:
    """Run a stock Dask LocalCluster."""
    import dask
    from distributed import Client

    with dask.config.set({"distributed.scheduler.worker-saturation": saturation}), Client(**QUIET) as client:
        yield _dask(client)


@contextlib.contextmanager
def stock_unlimited() -> Iterator[System]:
    """Run a stock Dask LocalCluster that gives workers all tasks at once."""
    with stock("inf") as system:
        yield system


@contextlib.contextmanager
def pool() -> Iterator[System]:
    """Run the ProcessPoolExecutor of Python, without chunks."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS) as executor:
        yield _executor(executor.submit)


def _executor(submit: Submit) -> System:
    return System(
        lambda function, *columns: [submit(function, *row) for row in zip(*columns, strict=True)],
        submit,
        lambda futures: [future.result() for future in futures],
    )


@contextlib.contextmanager
def parsl() -> Iterator[System]:
    """Run Parsl's HighThroughputExecutor."""
    import parsl as library
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    executor = HighThroughputExecutor(
        max_workers_per_node=WORKERS, prefetch_capacity=100, encrypted=False, provider=LocalProvider(max_blocks=1)
    )
    with tempfile.TemporaryDirectory() as folder, library.load(Config([executor], usage_tracking=0, run_dir=folder)):
        apps: dict[Any, Any] = {}

        def submit(function: Any, *args: Any) -> Any:
            if function not in apps:
                apps[function] = library.python_app(function)
            return apps[function](*args)

        yield _executor(submit)


@contextlib.contextmanager
def ray() -> Iterator[System]:
    """Run Ray."""
    import ray as library

    library.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    remotes: dict[Any, Any] = {}

    def submit(function: Any, *args: Any) -> Any:
        if function not in remotes:
            remotes[function] = library.remote(function)
        return remotes[function].remote(*args)

    try:
        yield System(
            lambda function, *columns: [submit(function, *row) for row in zip(*columns, strict=True)],
            submit,
            lambda futures: list(library.get(futures)),
        )
    finally:
        library.shutdown()


SYSTEMS = {
    "daskfed": daskfed_embedded,
    "daskfed, hub and site apart": daskfed_apart,
    "stock Dask": stock,
    "stock Dask, worker-saturation inf": stock_unlimited,
    "ProcessPoolExecutor": pool,
    "Parsl HTEX": parsl,
    "Ray": ray,
}


# -- cases -----------------------------------------------------------------------------------------------------------


def mapped(system: System, calls: int = 20_000) -> dict[str, float]:
    """Map no-ops and gather them."""
    start = time.perf_counter()
    assert system.results(system.map(nothing, range(calls))) == list(range(calls))
    return {"calls/s": calls / (time.perf_counter() - start)}


def submitted(system: System, calls: int = 5_000) -> dict[str, float]:
    """Submit no-ops in a loop, then gather."""
    start = time.perf_counter()
    futures = [system.submit(nothing, n) for n in range(calls)]
    assert system.results(futures) == list(range(calls))
    return {"calls/s": calls / (time.perf_counter() - start)}


def one_by_one(system: System, calls: int = 1_000) -> dict[str, float]:
    """Submit one no-op and wait for its result, again and again."""
    took = []
    for n in range(calls):
        start = time.perf_counter()
        assert system.results([system.submit(nothing, n)]) == [n]
        took.append(1000 * (time.perf_counter() - start))
    return {"p50 ms": statistics.median(took), "p99 ms": statistics.quantiles(took, n=100)[98]}


def slept(system: System) -> dict[str, float]:
    """Map calls that sleep; the share of the time that two bare threads would take."""
    found = {}
    for ms, calls in ((1, 2000), (10, 400), (100, 60)):
        start = time.perf_counter()
        system.results(system.map(sleeps, range(calls), [ms / 1000] * calls))
        took = time.perf_counter() - start
        found[f"{ms} ms"] = _bare(ms / 1000, calls) / took
    return found


def _bare(seconds: float, calls: int) -> float:
    """Return how long two threads sleep that do nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    def sleep_all() -> None:
        for _ in range(calls // WORKERS):
            time.sleep(seconds)

    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(lambda _: sleep_all(), range(WORKERS)))
    return time.perf_counter() - start


CASES = {"map": mapped, "submits": submitted, "one by one": one_by_one, "sleeps": slept}


def main(system: str, case: str) -> None:
    """Warm a system up, run a case, and print what was measured."""
    with SYSTEMS[system]() as running:
        for _ in range(3):
            running.results(running.map(nothing, range(500)))
        print(json.dumps(CASES[case](running)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
