"""Calls as lanes run them: what is sent, and results that come home with the news that they are there.

:class:`CallState` is what a client knows of a key: small, and with the pickled result where that has come along.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import iscoroutinefunction, unwrap
from typing import Any

from distributed.client import Future, FutureCancelledError, FutureState
from distributed.protocol.serialize import Serialized, serialize

from daskfed.client.calls import Calls, CallsExpr
from daskfed.config import ALWAYS, NEVER
from daskfed.dask_private import GraphNode, Task
from daskfed.messages import BlockSpec, Key
from daskfed.site.opening import calls_in

PLAIN_ANNOTATIONS = frozenset({"sites", "environment", "retries", "priority"})
SETTLED = frozenset({"finished", "error", "cancelled"})


class CallState(FutureState):
    """The state of a key, without an event as long as nobody waits for it by one."""

    __slots__ = ("in_block", "value", "watch")

    _event: Any  # slots of the class that it derives from
    exception: Any
    status: Any
    type: Any

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.in_block = False  # whether the hub got it in a block that names its keys, and says when that runs
        self.value: bytes | None = None  # pickled, where it is here
        self.watch: Countdown | None = None

    def _get_event(self) -> asyncio.Event:
        if self._event is None:
            self._event = asyncio.Event()
            if self.status in SETTLED:
                self._event.set()
        return self._event  # type: ignore[no-any-return]

    def finish(self, type: Any = None) -> None:
        """The key is in memory."""
        self.status = "finished"
        if type is not None:
            self.type = type
        self._settle()

    def set_error(self, exception: Any, traceback: Any) -> None:
        """The key has failed."""
        super().set_error(exception, traceback)
        self._settle()

    def cancel(self, reason: Any = None, msg: Any = None) -> None:
        """The key is cancelled."""
        self.status = "cancelled"
        self.exception = FutureCancelledError(key=self.key, reason=reason, msg=msg)
        self._settle()

    def _settle(self) -> None:
        if self._event is not None:
            self._event.set()
        if self.watch is not None:
            self.watch.settled(self)

    def lose(self) -> None:
        """The key is lost."""
        self.value = None
        super().lose()

    def retry(self) -> None:
        """The key is made again."""
        self.value = None
        super().retry()

    def reset(self) -> None:
        """The key is pending again."""
        self.value = None
        super().reset()

    def done(self) -> bool:
        """Whether it is known what became of the key."""
        return self.status in SETTLED


class BlocksNeeded(Exception):
    """A graph that was to pass as a whole needs results of blocks, of which its site's scheduler may not know yet."""


_noticing = threading.local()


@contextmanager
def pickled_futures() -> Iterator[None]:
    """Have :func:`noticed_futures` return the keys of those that this thread pickles inside."""
    _noticing.keys = set()
    try:
        yield
    finally:
        del _noticing.keys


def noticed_futures() -> set[Key]:
    """Return the keys of the futures that this thread has pickled."""
    return getattr(_noticing, "keys", set())


def _reduced(future: Future) -> tuple[Any, ...]:
    if (keys := getattr(_noticing, "keys", None)) is not None:
        keys.add(future.key)
    return Future, (future.key,)


Future.__reduce__ = _reduced  # else what a graph needs is seen only where it is opened


class Countdown:
    """Waits until all of some states are settled, or one of them is bad."""

    def __init__(self, states: Iterable[CallState]) -> None:
        self._waits: set[int] = set()
        self._over = asyncio.Event()
        self._states = [state for state in states if state.status not in SETTLED]

    async def wait(self) -> None:
        """Wait; states that another countdown watches are waited for one by one."""
        others = [state for state in self._states if state.watch is not None]
        mine = [state for state in self._states if state.watch is None]
        self._waits = set(map(id, mine))
        for state in mine:
            state.watch = self
        try:
            if mine:
                await self._over.wait()
            for state in others:
                await state.wait()
        finally:
            for state in mine:
                state.watch = None

    def settled(self, state: CallState) -> None:
        """One of them is settled."""
        self._waits.discard(id(state))
        if not self._waits or state.status != "finished":
            self._over.set()


def payload_for_lanes(calls: Calls, annotations: Mapping[str, Any], lanes: str) -> dict[str, Any] | None:
    """Return a payload of calls that may go down lanes, ``lanes`` being what the user wants; else None."""
    if lanes == NEVER or calls.needs or calls.is_value or not PLAIN_ANNOTATIONS.issuperset(annotations):
        return None
    func, columns, kwargs = _parts(calls.expr)
    if func is None or iscoroutinefunction(unwrap(func)) or not all(map(_is_plain, (*columns, list(kwargs.values())))):
        return None
    parts = Serialized(*serialize((func, columns, kwargs), serializers=("pickle",), on_error="raise"))  # as one pickle
    return {"calls": parts, **how_for_lanes(lanes)}


def how_for_lanes(lanes: str) -> dict[str, Any]:
    """Return what goes with a payload of calls, ``lanes`` being what the user wants."""
    return {"always": True} if lanes == ALWAYS else {}


def _parts(expr: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return function, columns and keywords of the calls in an expression; of what is no such call, no function."""
    if isinstance(expr, CallsExpr):
        func = None if expr.operand("shared") else expr.operand("func")
        return func, expr.operand("columns"), expr.operand("kwargs")
    (task,) = expr.operand("dsk").values()
    return (task.func, [[each] for each in task.args], task.kwargs) if type(task) is Task else (None, [], {})


def _is_plain(column: Any) -> bool:
    """Whether no value of a column stands for something else."""
    return not isinstance(column, list) or not any(isinstance(value, GraphNode) for value in column)


def calls_of(spec: BlockSpec, payload: Mapping[str, Any]) -> dict[Key, Task]:
    """Return the calls in a payload as the tasks that they are without lanes."""
    calls = calls_in(payload["calls"].header, payload["calls"].frames)
    each = zip(spec.outputs, calls, strict=True)
    return {key: Task(key, func, *args, **kwargs) for key, (func, args, kwargs) in each}
