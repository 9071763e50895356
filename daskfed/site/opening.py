"""Calls that came for lanes, as a site's scheduler takes them: opened there, not by the agent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distributed.protocol.pickle import loads
from distributed.protocol.serialize import deserialize

from daskfed.dask_private import Expr, GraphNode, Task
from daskfed.messages import Key


class FramedCalls(Expr):
    """Some rows of the calls in a payload; the tasks are made where it is opened."""

    _parameters = ["header", "frames", "keys", "rows"]

    def __dask_keys__(self) -> list[Key]:
        """Return the keys of the results."""
        return list(self.operand("keys"))

    def _layer(self) -> dict[Key, GraphNode]:
        calls = dict(enumerate(calls_in(self.operand("header"), self.operand("frames"))))
        places = zip(self.operand("keys"), self.operand("rows"), strict=True)
        return {key: _task(key, *calls[row]) for key, row in places}


def calls_in(header: dict[str, Any], frames: Iterable[Any]) -> Iterator[tuple[Any, Sequence[Any], dict[str, Any]]]:
    """Yield (function, arguments, keywords) of each call in a payload: one function with columns, or with rows."""
    func, *rest = deserialize(header, list(frames))
    if len(rest) == 1:
        opened = loads(func)
        return ((opened, *loads(row)) for row in rest[0])
    columns, kwargs = rest
    return ((func, row, kwargs) for row in (zip(*columns, strict=True) if columns else ((),)))


def _task(key: Key, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Task:
    return Task(key, func, *args, **kwargs)
