"""Two sites against one with 50 ms (sleeping) tasks: mean, groupby, climatology; makespans and their ratio."""

from __future__ import annotations

import sys
import time
from typing import Any

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


JOBS = {"mean": mean, "groupby": groupby, "climatology": climatology}


def makespans(sites: tuple[str, ...]) -> dict[str, list[float]]:
    """Return the wall seconds of each job, several times, over ``sites`` of one thread each."""
    with hub_and_sites(sites) as (address, _), daskfed.Client(address, timeout=60) as client:
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == len(sites), "the sites' workers")
        da.ones(100, chunks=10).sum().compute()
        found: dict[str, list[float]] = {name: [] for name in JOBS}
        for _ in range(REPEATS):
            for name, job in JOBS.items():
                found[name].append(timed(job().compute))
        return found


def main() -> int:
    """Measure and print; return 1 where the bar is missed."""
    one, two = makespans(("north",)), makespans(("north", "south"))
    passed = []
    for name in JOBS:
        print(f"{name}: one site {median(one[name]):.2f} s, two sites {median(two[name]):.2f} s (medians of {REPEATS})")
        passed.append(verdict(f"{name}, two sites / one", median(two[name]) / median(one[name]), 0.65))
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
