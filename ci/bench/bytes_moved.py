"""Bytes that cross between two sites in five jobs with halves pinned, against the lower bound by max-flow.

Both are bytes of serialised values, as they travel. Each job runs several times; the median counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import networkx as nx
import numpy as np
import pandas as pd
from _common import hub_and_sites, median, verdict, wait_for
from _graph import materialised
from dask.order import order
from dask.utils import format_bytes
from distributed.protocol import to_serialize

import daskfed
from daskfed import at
from daskfed.client.graphs import MaterialisedGraph
from daskfed.data.parcels import Parcel
from daskfed.messages import Key

REPEATS = 3
LEAST_BYTES = 200e6  # of the data of each job
SIDE = 3600  # an array of SIDE x SIDE float64 has 104 MB
CHUNK = 900
ROWS, PARTS = 4_400_000, 16  # two frames of 106 MB


def frame(seed: int, start: int, rows: int) -> pd.DataFrame:
    """Return one partition: a key column and two of numbers, 24 bytes a row."""
    rng = np.random.default_rng(seed + start)
    return pd.DataFrame({"k": np.arange(start, start + rows) * 7 % ROWS, "a": rng.random(rows), "b": rng.random(rows)})


def frames(seed: int) -> dd.DataFrame:
    """Return a dataframe of 106 MB."""
    rows = ROWS // PARTS
    parts = [dask.delayed(frame)(seed, i * rows, rows) for i in range(PARTS)]
    return dd.from_delayed(parts, meta=frame(0, 0, 1))


def product_sum() -> Any:
    """(x * y).sum(), x at one site and y at the other."""
    x, y = pinned_arrays()
    return (x * y).sum()


def matmul() -> Any:
    """The sum of x @ y.T, so that the result is small."""
    x, y = pinned_arrays()
    return (x @ y.T).sum()


def climatology() -> Any:
    """The spread of the anomaly from the mean over time; each half of the period lies at one site."""
    with at("north"):
        first = da.random.random((400, 180, 180), chunks=(20, 90, 90))
    with at("south"):
        second = da.random.random((400, 180, 180), chunks=(20, 90, 90))
    t = da.concatenate([first, second])
    return (t - t.mean(axis=0)).std()


def groupby() -> Any:
    """A mean per group; half of the partitions lie at each site."""
    north, south = pinned_frames()
    both = dd.concat([north, south])
    return both.assign(g=both.k % 100).groupby("g").a.mean()


def merge() -> Any:
    """The number of rows and a sum of a merge of a frame at one site with one at the other."""
    north, south = pinned_frames()
    return north.merge(south, on="k").a_x.sum()


def pinned_arrays() -> tuple[da.Array, da.Array]:
    """Return two arrays of 104 MB, one at each site."""
    with at("north"):
        x = da.random.random((SIDE, SIDE), chunks=CHUNK)
    with at("south"):
        y = da.random.random((SIDE, SIDE), chunks=CHUNK)
    return x, y


def pinned_frames() -> tuple[dd.DataFrame, dd.DataFrame]:
    """Return two dataframes of 106 MB, one at each site."""
    with at("north"):
        north = frames(1)
    with at("south"):
        south = frames(2)
    return north, south


JOBS = {"(x*y).sum()": product_sum, "x @ y.T": matmul, "groupby": groupby, "merge": merge, "climatology": climatology}


def key_sizes(graph: MaterialisedGraph) -> dict[Key, int]:
    """Run a graph here, one task after the other, and return the bytes of every result, serialised."""
    tasks = graph.tasks
    users = {key: 0 for key in tasks}
    for node in tasks.values():
        for dep in node.dependencies:
            users[dep] += 1
    sizes: dict[Key, int] = {}
    values: dict[Key, Any] = {}
    rank = order(tasks)
    for key in sorted(tasks, key=rank.__getitem__):
        node = tasks[key]
        values[key] = node({dep: values[dep] for dep in node.dependencies})
        sizes[key] = Parcel.of(to_serialize(values[key]), checked=False).nbytes
        for dep in node.dependencies:
            users[dep] -= 1
            if not users[dep]:
                del values[dep]
    return sizes


def lower_bound(graph: MaterialisedGraph, sizes: Mapping[Key, int]) -> int:
    """Return the fewest bytes that must cross with the pins fixed, each key counted once.

    A minimum cut of a hypergraph: every key is a hyperedge over its producer and its consumers, as heavy as its value
    (Lawler 1973: in, out nodes joined by an edge of that weight, endless edges between them and the members).
    """
    members: dict[Key, list[Key]] = {key: [key] for key in graph.tasks}
    for key, node in graph.tasks.items():
        for dep in node.dependencies:
            members[dep].append(key)
    net = nx.DiGraph()
    for key, (producer, *consumers) in members.items():
        net.add_edge(("in", key), ("out", key), capacity=sizes[key])
        for member in (producer, *consumers):
            net.add_edge(member, ("in", key))
            net.add_edge(("out", key), member)
    for key, constraint in graph.constraints.items():
        if constraint.sites == ("north",):
            net.add_edge("SOURCE", key)
        elif constraint.sites == ("south",):
            net.add_edge(key, "SINK")
    return int(nx.maximum_flow_value(net, "SOURCE", "SINK"))


def moved(client: daskfed.Client) -> int:
    """Return the bytes that crossed between sites so far."""
    return sum(link["nbytes"] for link in client.transfers().values())


def crossed(client: daskfed.Client, collection: Any) -> int:
    """Compute a collection and return the bytes that crossed between sites meanwhile."""
    before = moved(client)
    collection.compute()
    return moved(client) - before


def measure(client: daskfed.Client, name: str) -> bool:
    """Run one job several times, print, and say whether its bars are kept."""
    job = JOBS[name]
    graph = materialised(job())
    sizes = key_sizes(graph)
    data = sum(size for key, size in sizes.items() if not graph.tasks[key].dependencies)
    bound = lower_bound(graph, sizes)
    runs = [crossed(client, job()) for _ in range(REPEATS)]
    each = ", ".join(map(format_bytes, runs))
    print(f"{name}: {format_bytes(data)} of data, {each} crossed, bound {format_bytes(bound)}")
    ratio = median(runs) / max(bound, 1)
    passed = [
        verdict(f"{name}, {LEAST_BYTES / 1e6:.0f} MB / its data", LEAST_BYTES / data, 1),
        verdict(f"{name}, bytes moved (median of {REPEATS}) / lower bound", ratio, 1.2),
    ]
    return all(passed)


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    with (
        hub_and_sites(("north", "south")) as (address, _),
        daskfed.Client(address, timeout=60) as client,
        dask.config.set({"dataframe.shuffle.method": "tasks"}),
    ):
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == 2, "the sites' workers")
        return not all([measure(client, name) for name in JOBS])


if __name__ == "__main__":
    sys.exit(main())
