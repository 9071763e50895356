"""Graphs of 10,000 tiny tasks, run twice: ours, which bundles them the second time, against a stock LocalCluster.

Each system runs each graph in a process of its own, in turn, ROUNDS times; medians count. ``fusion.py ROUNDS GRAPH...``
runs some of the graphs only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
from _common import hub_and_sites, median, verdict, wait_for

OPTIONS = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
ROUNDS = 3
RUNS = ("first", "second")
PAUSE_S = 2.0  # between the runs: what was learnt is told once in a while
LIMIT_S = 300.0
GRAPHS = ("array", "dataframe groupby", "tree reduction", "random DAG")

Found = dict[str, float]
"""Seconds and CPU seconds of the first and of the second run."""


@contextlib.contextmanager
def stock() -> Iterator[Any]:
    """Run a stock LocalCluster."""
    import distributed

    with distributed.Client(**OPTIONS) as client:
        yield client


@contextlib.contextmanager
def embedded() -> Iterator[Any]:
    """Run ``Client()``, with its one site."""
    from daskfed import Client

    with Client(**OPTIONS) as client:
        yield client


@contextlib.contextmanager
def two_sites() -> Iterator[Any]:
    """Run two sites of one worker each, over which graphs are cut."""
    from daskfed import Client

    with hub_and_sites(("north", "south")) as (address, _), Client(address, timeout=60) as client:
        wait_for(lambda: len(client.sites()) == 2 and all(map(_has_worker, client.sites().values())), "two sites")
        yield client


def _has_worker(site: dict[str, Any]) -> bool:
    return bool(site["workers"])


dask.config.set({"daskfed.client.fusion": "auto"})
SYSTEMS = {"stock": stock, "embedded": embedded, "two sites": two_sites}


def spent_s() -> float:
    """Return the CPU seconds of this process and all that it has started."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measure(system: str, name: str) -> Found:
    """Run a graph twice, with other keys each time."""
    import _tiny

    found = {}
    with SYSTEMS[system]():
        for run in RUNS:
            lazy = _tiny.GRAPHS[name]()
            time.sleep(PAUSE_S)
            begun, cpu = time.perf_counter(), spent_s()
            lazy.compute()
            found |= {run: time.perf_counter() - begun, f"{run} cpu": spent_s() - cpu}
    return found


def measured(system: str, name: str) -> Found:
    """Measure in a process of its own; raises CalledProcessError, TimeoutExpired where that fails."""
    here = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((os.getcwd(), here))}
    command = [sys.executable, __file__, "--measure", system, name]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=LIMIT_S, env=env, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, rounds: int) -> bool:
    """Measure all systems on one graph and print; return whether the bars are met."""
    found: dict[str, list[Found]] = {system: [] for system in SYSTEMS}
    for _ in range(rounds):
        for system, runs in found.items():
            runs.append(measured(system, name))
    medians = {system: {key: median([run[key] for run in runs]) for key in runs[0]} for system, runs in found.items()}
    for system, values in medians.items():
        told = ", ".join(f"{run} run {values[run]:.2f} s ({values[f'{run} cpu']:.2f} s of CPU)" for run in RUNS)
        print(f"{name}, {system}: {told}", flush=True)
    ours, theirs = medians["embedded"], medians["stock"]
    return all(
        (
            verdict(f"{name}: first run, embedded / stock", ours["first"] / theirs["first"], 1.0),
            verdict(f"{name}: second run, embedded / stock", ours["second"] / theirs["second"], 0.5),
        )
    )


def main(args: list[str]) -> int:
    """Measure and print; return 1 where a bar is missed."""
    if args[:1] == ["--measure"]:
        print(json.dumps(measure(*args[1:])))
        return 0
    rounds = int(args[0]) if args else ROUNDS
    return not all([compare(name, rounds) for name in args[1:] or GRAPHS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
