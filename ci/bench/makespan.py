"""Two sites against one, in turns, with 50 ms (sleeping) tasks: mean, groupby, climatology; makespans, their ratio."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from _common import hub_and_sites, median, timed, verdict, wait_for

import daskfed

REPEATS = 3
PARTS = 160
NAP_S = 0.05


def nap(block: Any) -> Any:
    """Return the block after a while, as a task that computes for 50 ms would without using a core."""
    time.sleep(NAP_S)
    return block


def mean() -> Any:
    """Return the mean of an array whose chunks take 50 ms each."""
    return da.ones((PARTS, 1000), chunks=(1, 1000)).map_blocks(nap, dtype=float).mean()


def groupby() -> Any:
    """Return a groupby over partitions that take 50 ms each."""
    frame = pd.DataFrame({"b": np.arange(PARTS * 50) % 50, "c": np.arange(PARTS * 50) / 7})
    return dd.from_pandas(frame, npartitions=PARTS).map_partitions(nap, meta=frame).groupby("b").c.mean()


def climatology() -> Any:
    """Return the anomaly from a mean over time, both passes with tasks of 50 ms."""
    t = da.ones((PARTS // 2, 40, 40), chunks=(1, 40, 40)).map_blocks(nap, dtype=float)
    return (t - t.mean(axis=0)).map_blocks(nap, dtype=float).std()


ONE, TWO = ("north",), ("north", "south")
JOBS = {"mean": mean, "groupby": groupby, "climatology": climatology}


@contextlib.contextmanager
def federation(sites: tuple[str, ...]) -> Iterator[daskfed.Client]:
    """Yield a client of a hub and ``sites`` of one thread each, once they are warm."""
    with (
        hub_and_sites(sites) as (address, _),
        daskfed.Client(address, timeout=60, set_as_default=False) as client,
    ):
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == len(sites), "the sites' workers")
        makespan(client, da.ones(100, chunks=10).sum())
        yield client


def makespan(client: daskfed.Client, collection: Any) -> float:
    """Return the wall seconds of a computation."""
    with client.as_current():
        return timed(collection.compute)


def makespans() -> dict[tuple[str, ...], dict[str, list[float]]]:
    """Return the wall seconds of each job by sites, measured in turns: now one site goes first, now two."""
    found: dict[tuple[str, ...], dict[str, list[float]]] = {sites: {name: [] for name in JOBS} for sites in (ONE, TWO)}
    with federation(ONE) as one, federation(TWO) as two:
        clients = {ONE: one, TWO: two}
        for repeat in range(REPEATS):
            for name, job in JOBS.items():
                for sites in (TWO, ONE) if repeat % 2 else (ONE, TWO):
                    found[sites][name].append(makespan(clients[sites], job()))
    return found


def main() -> int:
    """Measure and print; return 1 where the bar is missed."""
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):  # as a client does that is the default one
        found = makespans()
    one, two = found[ONE], found[TWO]
    passed = []
    for name in JOBS:
        print(f"{name}: one site {median(one[name]):.2f} s, two sites {median(two[name]):.2f} s (medians of {REPEATS})")
        passed.append(verdict(f"{name}, two sites / one", median(two[name]) / median(one[name]), 0.65))
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
