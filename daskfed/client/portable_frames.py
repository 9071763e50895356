"""Dataframes that were opened at a site and planned on a client that cannot see their files."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from dask.base import key_split
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr.io import io as frame_io
from dask.dataframe.dask_expr.io.parquet import ReadParquet

from daskfed.client.frames import pinned
from daskfed.client.notes import Note
from daskfed.client.portable import rekeyed_tasks
from daskfed.dask_private import Expr, convert_legacy_graph

_LABELS = {"read_parquet": "read-parquet"}


class PartReader:
    """Reads one partition with the expression of a reader, which is unpickled only where the data are."""

    _opened: dict[str, Any] = {}  # token -> expression, in this process

    def __init__(self, reader: Any) -> None:
        self.token = reader.deterministic_token
        # Without what it knows of the files: that is large, for one of the readers it cannot be pickled, and a worker
        # of the site finds it out again.
        known = reader._parameters.index("_dataset_info_cache")
        operands = [None if i == known else operand for i, operand in enumerate(reader.operands)]
        self.pickled = pickle.dumps((type(reader), *operands, self.token, {}))

    def __call__(self, index: int, columns: list[str] | None = None) -> Any:
        """Return the partition of this index, with some columns only."""
        reader = self._opened.get(self.token)
        if reader is None:
            reader = Expr._reconstruct(*pickle.loads(self.pickled))
            reader._dataset_info  # looks at the files, once for all partitions and choices of columns
            self._opened[self.token] = reader
        if columns is not None:
            reader = reader.substitute_parameters({"columns": list(columns)})
        return reader._filtered_task("part", index)()

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self.token


def portable_frame(frame: Any, note: Note) -> Any:
    """Return a dataframe that needs no look at files before its tasks run, with its readers pinned by ``note``."""
    expr = frame.expr
    for leaf in list(_leaves(expr)):
        portable = _portable_reader(leaf)
        if portable is None:
            return new_collection(pinned(_tasks_only(frame.expr, note), note))
        expr = expr.substitute(leaf, pinned(portable, note))
    return new_collection(expr)


def _leaves(expr: Any) -> Iterator[Any]:
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if node._name in seen:
            continue
        seen.add(node._name)
        if isinstance(node, frame_io.IO) or not node.dependencies():
            yield node
        else:
            stack.extend(node.dependencies())


def _portable_reader(leaf: Any) -> Any:
    """Return an expression in the place of a reader; None where we do not know how."""
    if leaf.dependencies() or any(isinstance(operand, Expr) for operand in leaf.operands):
        return None
    if isinstance(leaf, ReadParquet):
        return _part_reader(leaf)
    if isinstance(leaf, frame_io.FromMapProjectable):
        return leaf.substitute_parameters({"user_meta": frame_io.FromMap._meta.func(leaf)})
    if isinstance(leaf, frame_io.FromMap):
        return leaf.substitute_parameters({"user_meta": leaf._meta})
    return leaf if isinstance(leaf, frame_io.FromPandas) else None


def _part_reader(leaf: Any) -> Any:
    whole = leaf.substitute_parameters({"columns": None, "_series": False, "_partitions": None})
    indices = list(leaf._partitions)
    return frame_io.FromMapProjectable(
        func=PartReader(whole),
        iterables=[indices],
        columns=leaf.operand("columns"),
        args=[],
        kwargs={},
        columns_arg_required=True,
        user_meta=whole._meta,
        enforce_metadata=False,
        user_divisions=leaf.divisions,
        label=_LABELS.get(leaf._funcname, leaf._funcname),
        _series=leaf.operand("_series"),
    )


def _tasks_only(expr: Any, note: Note) -> Any:
    """Return an expression that holds nothing but the tasks of another, with keys of their own."""
    plan = expr.optimize(fuse=False)
    tasks = convert_legacy_graph(plan.__dask_graph__())
    seed = repr(sorted(note.items()))
    named = {key: rekeyed_tasks({key: tasks[key]}, [key], seed) for key in plan.__dask_keys__()}
    keys = [next(iter(named[key])) for key in plan.__dask_keys__()]
    divisions = plan.divisions
    return frame_io.FromGraph(rekeyed_tasks(tasks, tasks, seed), plan._meta, divisions, keys, key_split(plan._name))
