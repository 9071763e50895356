"""How ten named graphs are cut: blocks, stages, critical path, keys that cross, and the time that cutting takes.

Times are CPU time of one core, the median of several runs; dask.order is timed apart.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
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
    stages = 1 + max(piece.stage for piece in pieces)
    return len(graph), len(pieces), stages, critical_path(pieces), len(crossing), largest, cutting, ordering


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
        verdict("critical path in blocks / stages", max(path / stages for _, _, stages, path, *_ in rows), 2),
        verdict("cutting, CPU µs per task", max(columns[6] for columns in rows), 60),
        verdict("largest block, tasks", max(columns[5] for columns in rows), 1000),
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
