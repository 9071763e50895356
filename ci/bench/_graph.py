"""The array graph of 10,000 tasks that benchmarks share, and graphs as the client cuts them.

Apart from ``_common``, which workers import while time is taken: this takes them a second.
"""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr

from daskfed.client.graphs import MaterialisedGraph, materialise

SIDE = 53  # chunks along each side of its array: with fewer, optimisation leaves less than 10,000 tasks


def graph(side: int = SIDE) -> da.Array:
    """Return an array computation of 10,000 tasks: the mean of what is left without the mean of each column."""
    x = da.random.random((side * 10, side * 10), chunks=10)
    return (x - x.mean(axis=0)).mean()


def materialised(collection: Any) -> MaterialisedGraph:
    """Return the optimised graph of a collection, as the client cuts it."""
    expr = FinalizeCompute(collections_to_expr([collection])).optimize()
    return materialise(expr, list(dask.core.flatten(expr.__dask_keys__())))


def print_size(collection: Any) -> None:
    """Print how many tasks a collection has, as it was built and after optimisation."""
    raw, left = len(dict(collection.__dask_graph__())), len(materialised(collection).tasks)
    print(f"tasks: {raw} as built, {left} after optimisation", flush=True)
