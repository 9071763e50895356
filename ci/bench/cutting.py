"""How ten named graphs are cut: blocks, stages, critical path, keys that cross, and the time that cutting takes.

Stages are counted in the graph itself, whatever the cut makes of it (see :func:`stages`).
Times are CPU time of one core, the median of several runs; dask.order is timed apart.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from _common import verdict
from dask.core import flatten
from dask.order import order

from daskfed.client.cutting import Piece, cut
from daskfed.dask_private import GraphNode, convert_legacy_graph
from daskfed.messages import Key

RUNS = 5
COLUMNS = ("tasks", "blocks", "stages", "path", "cross keys", "largest", "cut µs/task", "order µs/task")


def graphs() -> dict[str, Any]:
    """Return the ten graphs' collections by name."""
    x = da.random.random((4000, 4000), chunks=100)
    y = da.random.random((2000, 2000), chunks=100)
    t = da.random.random((365, 40, 40), chunks=(5, 20, 20))
    frame = pd.DataFrame({"b": np.arange(20000) % 50, "c": np.arange(20000.0)})
    df = dd.from_pandas(frame, npartitions=100)
    return {
        "mean": x.mean(),
        "mean over an axis": x.mean(axis=0),
        "climatology anomaly": t - t.mean(axis=0),
        "standardise": (y - y.mean(0)) / y.std(0),
        "x + x.T": y + y.T,
        "y @ y.T": y @ y.T,
        "rechunk": y.rechunk((2000, 20), method="tasks"),
        "map_overlap": y.map_overlap(lambda block: block, depth=1, meta=np.ones((1, 1))),
        "groupby": df.groupby("b").c.mean(),
        "task shuffle": df.shuffle("b", npartitions=100),
    }


def opened(collection: Any) -> tuple[dict[Key, GraphNode], list[Key]]:
    """Return the optimised graph of a collection and its keys."""
    optimised = collection.optimize() if hasattr(collection, "expr") else dask.optimize(collection)[0]
    return convert_legacy_graph(dict(optimised.__dask_graph__())), list(flatten(optimised.__dask_keys__()))


def stages(graph: Mapping[Key, GraphNode], rank: Mapping[Key, int]) -> int:
    """Return how many stages a graph has in itself: one, and one for each time that keys come together on a path.

    Keys come together in a task that needs several, and all steps of a tree are once: a task whose inputs of the last
    stage include a partial result, which nobody else needs, goes on with that stage. ``rank``: inputs come first.
    """
    users = Counter(need for node in graph.values() for need in node.dependencies)
    stage: dict[Key, int] = {}
    partial: set[Key] = set()  # what came together, or was made of one such, for a single user
    for key in sorted(graph, key=rank.__getitem__):
        needs = graph[key].dependencies
        last = max((stage[need] for need in needs), default=0)
        goes_on = any(need in partial and stage[need] == last for need in needs)
        together = len(needs) > 1
        stage[key] = last + (together and not goes_on)
        if users[key] == 1 and (together or goes_on):
            partial.add(key)
    return 1 + max(stage.values())


def critical_path(pieces: list[Piece]) -> int:
    """Return how many pieces must run one after the other."""
    makers = {key: number for number, piece in enumerate(pieces) for key in piece.outputs}
    length: list[int] = []
    for piece in pieces:
        length.append(1 + max((length[makers[key]] for key in piece.inputs), default=0))
    return max(length)


def cpu_us(work: Callable[[], Any]) -> float:
    """Return the median CPU time of several runs in microseconds."""
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e6


def row(graph: dict[Key, GraphNode], keys: list[Key]) -> tuple[float, ...]:
    """Return the columns of one graph."""
    rank = order(graph)
    pieces = cut(graph, keys, rank=rank)
    ordering = cpu_us(lambda: order(graph)) / len(graph)
    cutting = cpu_us(lambda: cut(graph, keys, rank=rank)) / len(graph)
    crossing = {key for piece in pieces for key in piece.inputs}
    largest = max(len(piece.tasks) for piece in pieces)
    sizes = len(graph), len(pieces), stages(graph, rank), critical_path(pieces), len(crossing), largest
    return *sizes, cutting, ordering


def main() -> int:
    """Print the table and whether the bars are met; return 1 where one is not."""
    warnings.simplefilter("ignore")
    print(f"{'graph':20}", *(f"{name:>13}" for name in COLUMNS))
    rows = []
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        for name, collection in graphs().items():
            rows.append(row(*opened(collection)))
            *counts, cutting, ordering = rows[-1]
            print(f"{name:20}", *(f"{count:13}" for count in counts), f"{cutting:13.1f} {ordering:13.1f}", flush=True)
    passed = [
        verdict("critical path in blocks / stages", max(path / count for _, _, count, path, *_ in rows), 2),
        verdict("cutting, CPU µs per task", max(columns[6] for columns in rows), 60),
        verdict("largest block, tasks", max(columns[5] for columns in rows), 1000),
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
