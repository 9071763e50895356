"""Calls of one function, as ``submit`` and ``map`` make them: batches that are pickled whole, not call by call."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daskfed.dask_private import DataNode, Expr, GraphNode, LLGExpr, Task, TaskRef, parse_input, sizeof
from daskfed.messages import Key

BATCH = 512  # most calls in one batch
LARGE = 100_000  # bytes from which a keyword argument that all calls share becomes a key of its own, as in stock Dask

_PLAIN = (int, float, complex, bool, str, bytes, type(None))  # values that cannot hold a future


@dataclass(frozen=True, slots=True)
class Calls:
    """A batch of calls: what a site opens, the keys of the results, and the keys that the calls need."""

    expr: Any
    keys: tuple[Key, ...]
    needs: frozenset[Key]
    rows: tuple[frozenset[Key], ...] = ()  # what each call needs of them, where that differs
    is_value: bool = False  # it calls nothing: its key stands for a value that other batches need

    def places(self, inputs: tuple[Key, ...]) -> tuple[tuple[int, ...], ...]:
        """Return for each call the places in ``inputs``, which are its needs in some order, of what it needs."""
        place = {key: n for n, key in enumerate(inputs)}
        return tuple(tuple(sorted(place[key] for key in row)) for row in self.rows)


class CallsExpr(Expr):
    """Calls of one function with a key each; the tasks are made where it is opened."""

    _parameters = ["func", "columns", "keys", "kwargs", "shared"]

    def __dask_keys__(self) -> list[Key]:
        """Return the keys of the results."""
        return list(self.operand("keys"))

    def _layer(self) -> dict[Key, GraphNode]:
        func, kwargs = self.operand("func"), self.operand("kwargs")
        rows = zip(self.operand("keys"), zip(*self.operand("columns"), strict=False), strict=False)
        tasks = {key: Task(key, func, *args, **kwargs) for key, args in rows}
        return {**tasks, **{key: DataNode(key, value) for key, value in self.operand("shared").items()}}


def call_of_submit(expr: Any) -> Calls:
    """Return the call of an expression with one task, as ``submit`` makes it."""
    ((key, task),) = expr.operand("dsk").items()
    return Calls(expr, (key,), frozenset(task.dependencies))


def calls_of_map(
    func: Callable[..., Any],
    iterables: Sequence[Collection[Any]],
    keys: Sequence[Key],
    kwargs: Mapping[str, Any],
    size: int = BATCH,
) -> Iterator[Calls]:
    """Yield the calls of ``func`` on each row of ``iterables``, at most ``size`` in a batch; the keys are given.

    As in stock Dask the shortest iterable ends the rows. A large keyword argument comes once: with its only batch, else
    as a batch of its own that has one key, the value, and that the others need.
    """
    total = min([len(keys), *map(len, iterables)]) if iterables else 0
    columns: list[Any] = [column if _sliceable(column) else list(column) for column in iterables]
    fixed, large = _keywords(kwargs)
    if total > size:
        for key, value in large.items():
            expr = LLGExpr({key: DataNode(key, value)}, _determ_token=uuid.uuid4().hex)
            yield Calls(expr, (key,), frozenset(), is_value=True)
        large = {}
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        yield _batch(func, [column[rows] for column in columns], tuple(keys[rows]), fixed, large)


def _batch(
    func: Callable[..., Any],
    columns: list[Any],
    keys: tuple[Key, ...],
    kwargs: Mapping[str, Any],
    large: Mapping[Key, Any],
) -> Calls:
    columns = list(map(_parsed, columns))
    shared = set(itertools.chain.from_iterable(map(_needs, kwargs.values()))).difference(large)
    referring = [column for column in columns if isinstance(column, list) and any(map(_needs, column))]
    rows = [shared.union(*map(_needs, row)) for row in zip(*referring, strict=False)]
    needs = shared.union(*rows)
    expr = CallsExpr(func, columns, list(keys), dict(kwargs), dict(large), _determ_token=uuid.uuid4().hex)
    return Calls(expr, keys, frozenset(needs), tuple(map(frozenset, rows)))


def _keywords(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Key, Any]]:
    """Return keyword arguments with references to the large ones, and those by key."""
    parsed = {name: parse_input(value) for name, value in kwargs.items()}
    token = uuid.uuid4().hex
    names = [name for name, value in parsed.items() if not isinstance(value, GraphNode) and sizeof(value) > LARGE]
    large: dict[Key, Any] = {f"{name}-{token}": parsed[name] for name in names}
    return {**parsed, **{name: TaskRef(f"{name}-{token}") for name in names}}, large


def _parsed(column: Any) -> Any:
    """Return a column with its futures as references; one that cannot hold any stays as it is, and small."""
    if not isinstance(column, (list, tuple)):
        return column
    return [value if isinstance(value, _PLAIN) else parse_input(value) for value in column]


def _needs(value: Any) -> Iterable[Key]:
    if isinstance(value, TaskRef):
        return (value.key,)
    return value.dependencies if isinstance(value, GraphNode) else ()


def _sliceable(column: Any) -> bool:
    """Whether a slice of a column is a column: sets, dicts and their views have none, a Series slices by label."""
    return isinstance(column, (list, tuple, range)) or (type(column).__module__ == "numpy" and column.dtype != object)
