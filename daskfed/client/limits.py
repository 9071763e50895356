"""``timeout=``: how long a call, or a task of a graph, may run. The function is wrapped here, the rest is done there.

See :mod:`daskfed.site.limit`. A wrapped function has the name and the token of the one inside, so keys stay the same.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from inspect import iscoroutinefunction
from math import inf
from typing import Any

from dask.tokenize import normalize_token
from dask.utils import funcname, parse_timedelta

from daskfed.client.keywords import TIMEOUT
from daskfed.dask_private import GraphNode, HLGExpr, Task
from daskfed.data.fetch import by_value
from daskfed.errors import ConfigurationError
from daskfed.messages import Key
from daskfed.site import limit


class Limited:
    """A function that may take so many seconds; where daskfed is not installed, a pickle of it opens all the same."""

    def __init__(self, function: Callable[..., Any], seconds: float) -> None:
        self.__wrapped__ = function
        self.__name__ = self.__qualname__ = funcname(function)
        self.__doc__ = getattr(function, "__doc__", None)
        self.seconds = seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function here, as ``recreate_error_locally`` does: for as long as it takes."""
        return self.__wrapped__(*args, **kwargs)

    def __dask_tokenize__(self) -> Any:
        """Return what keys of calls are made from: the same as without a limit."""
        return normalize_token(self.__wrapped__)

    def __reduce__(self) -> tuple[Any, ...]:
        there = self.__wrapped__, self.seconds, self.__name__
        return (partial, (AWAITED, *there)) if iscoroutinefunction(self.__wrapped__) else (LIMIT, there)


class ByValue:
    """Something of ours that is pickled by value."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        self._pickled: bytes | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._thing(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pickled is None:
            self._pickled = by_value(self._thing)
        return pickle.loads, (self._pickled,)


LIMIT = ByValue(limit.Limit)
AWAITED = ByValue(limit.awaited)


def limited(function: Callable[..., Any], timeout: Any) -> Callable[..., Any]:
    """Return a function that raises TimeoutError where it takes longer: seconds, or text such as "5m".

    Raises ConfigurationError where it is no such time.
    """
    seconds = seconds_of(timeout)
    return function if seconds == inf else Limited(function, seconds)


def seconds_of(timeout: Any) -> float:
    """Return a timeout in seconds, none as infinity; raises ConfigurationError."""
    if timeout is None:
        return inf
    try:
        seconds = float(parse_timedelta(timeout))
    except (TypeError, ValueError, KeyError, AttributeError):
        seconds = 0.0
    if isinstance(timeout, bool) or not seconds > 0:
        raise ConfigurationError(f"timeout={timeout!r}: expected seconds, or a time like '5m', more than nothing")
    return seconds


def with_limits(tasks: dict[Key, GraphNode], timeouts: Mapping[Key, Any]) -> dict[Key, GraphNode]:
    """Return the tasks of a graph, of which some have a timeout."""
    return {key: _limited_task(node, timeouts[key]) if key in timeouts else node for key, node in tasks.items()}


def _limited_task(node: GraphNode, timeout: Any) -> GraphNode:
    if not isinstance(node, Task):
        return node
    return Task(node.key, limited(node.func, timeout), *node.args, **node.kwargs)


def wants_limits(expr: Any, annotations: Mapping[str, Any]) -> bool:
    """Whether some tasks of an expression have a timeout, all or those of some layers."""
    return annotations.get(TIMEOUT) is not None or any(map(_has_limits, expr.walk()))


def _has_limits(expr: Any) -> bool:
    if not isinstance(expr, HLGExpr):
        return False
    layers = getattr(expr.hlg, "layers", {}).values()
    return any(TIMEOUT in (layer.annotations or ()) for layer in layers)
