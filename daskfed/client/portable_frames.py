"""Dataframes that were opened at a site and planned on a client that cannot see their files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
from dask.base import key_split

from daskfed.client.frames import pinned
from daskfed.client.notes import Note
from daskfed.client.rekeying import rekeyed_key, rekeyed_tasks
from daskfed.client.stock import dataframes
from daskfed.dask_private import Expr, convert_legacy_graph


class Part:
    """What one partition is read from; opaque to everything but its reader, and hashed by name."""

    def __init__(self, value: Any, token: str) -> None:
        self.value, self.token = value, token

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self.token


class PieceReader:
    """Reads partitions as Dask's reader of Parquet files through fsspec does, which plans them when it is built."""

    def __init__(self, reader: Any) -> None:
        self.token, self.function = reader.deterministic_token, reader._io_func

    def __call__(self, part: Part, columns: list[str]) -> Any:
        """Return some columns of a partition."""
        return self.function.project_columns(list(columns))(part.value)

    def __dask_tokenize__(self) -> Any:
        return type(self).__name__, self.token

    @staticmethod
    def part(task: Any) -> Any:
        """Return what a task of the reader reads."""
        return task.args[0]


class FragmentReader(PieceReader):
    """Reads partitions as Dask's reader of Parquet files through Arrow does: the files as they were found, in order."""

    def __init__(self, reader: Any) -> None:
        task = reader._filtered_task("part", 0)
        self.token, self.to_pandas, self.to_table = reader.deterministic_token, task.kwargs, dict(task.args[0].kwargs)
        del self.to_table["fragment_wrapper"]
        self.index = [name for name in self.to_table.pop("columns") if name not in reader.columns]

    def __call__(self, part: Part, columns: list[str]) -> Any:
        """Return some columns of a partition."""
        names = [*columns, *self.index]
        table = dataframes().fragment_to_table(fragment_wrapper=part.value, columns=names, **self.to_table)
        return dataframes().table_to_pandas(table, **self.to_pandas)

    @staticmethod
    def part(task: Any) -> Any:
        """Return what a task of the reader reads."""
        return task.args[0].kwargs["fragment_wrapper"]


def portable_frame(frame: Any, note: Note) -> Any:
    """Return a dataframe that needs no look at files before its tasks run, with its readers pinned by ``note``."""
    expr = frame.expr
    for leaf in list(_leaves(expr)):
        portable = _portable_reader(leaf)
        if portable is None:
            return dataframes().new_collection(pinned(_tasks_only(frame.expr, note), note))
        expr = expr.substitute(leaf, pinned(portable, note))
    return dataframes().new_collection(expr)


def _leaves(expr: Any) -> Iterator[Any]:
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if node._name in seen:
            continue
        seen.add(node._name)
        if isinstance(node, dataframes().IO) or not node.dependencies():
            yield node
        else:
            stack.extend(node.dependencies())


def _portable_reader(leaf: Any) -> Any:
    """Return an expression in the place of a reader; None where we do not know how."""
    if leaf.dependencies() or any(isinstance(operand, Expr) for operand in leaf.operands):
        return None
    if type(leaf) is dataframes().ReadParquetPyarrowFS:
        return _read_by_part(leaf, FragmentReader)
    if type(leaf) is dataframes().ReadParquetFSSpec and not leaf._plan["empty"]:
        return _read_by_part(leaf, PieceReader)
    if isinstance(leaf, dataframes().FromMapProjectable):
        return leaf.substitute_parameters({"user_meta": dataframes().meta_of_all_columns(leaf)})
    if isinstance(leaf, dataframes().FromMap):
        return leaf.substitute_parameters({"user_meta": leaf._meta})
    return leaf if isinstance(leaf, dataframes().FromPandas) else None


def _read_by_part(leaf: Any, kind: type[PieceReader]) -> Any:
    whole = leaf.substitute_parameters({"columns": None, "_series": False, "_partitions": None})
    token = whole.deterministic_token
    reader = kind(whole)
    parts = [Part(reader.part(whole._filtered_task("part", i)), f"{token}-{i}") for i in leaf._partitions]
    return dataframes().FromMapProjectable(
        func=reader,
        iterables=[parts],
        columns=leaf.operand("columns"),
        args=[],
        kwargs={},
        columns_arg_required=True,
        user_meta=whole._meta,
        enforce_metadata=False,
        user_divisions=leaf.divisions,
        label="read-parquet",
        _series=leaf.operand("_series"),
    )


def _tasks_only(expr: Any, note: Note) -> Any:
    """Return an expression that holds nothing but the tasks of another, with keys of their own."""
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):  # others need a disk or a barrier that all share
        plan = expr.optimize(fuse=False)
    tasks = convert_legacy_graph(plan.__dask_graph__())
    seed = repr(sorted(note.items()))
    keys = [rekeyed_key(key, seed) for key in plan.__dask_keys__()]
    layer = rekeyed_tasks(tasks, tasks, seed)
    return dataframes().FromGraph(layer, plan._meta, plan.divisions, keys, key_split(plan._name))
