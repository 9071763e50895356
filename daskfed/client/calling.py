"""Submitting single calls at little cost: they are pickled as they are submitted, and leave together.

What a client says to its hub goes through an :class:`Outbox`, in order. Calls that come to lie next to each other there
become blocks, releases one message. So a loop of ``submit`` costs the hub about what ``map`` does, and a single call
leaves at once.
"""

from __future__ import annotations

import pickle
import time
import types
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import iscoroutinefunction
from itertools import groupby
from math import inf
from typing import Any, NamedTuple

from dask.base import tokenize
from dask.utils import funcname, key_split
from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Serialized

from daskfed.client.submission import Submission
from daskfed.client.versions import PYTHON
from daskfed.messages import PLAIN, BlockKind, BlockSpec, Constraint, Key

RELEASE = "client-releases-keys"
MOST_AT_ONCE = 2**12  # keys that leave together: more would be much memory at the hub, which meanwhile could begin
PAUSE_S = 0.002  # before it is looked again whether the rest may leave
TOGETHER_S = 0.001  # within which what comes after several others leaves with what comes after it
SEVERAL = 4  # items
REMEMBERED = 256  # functions whose pickles are kept
MOST_ITEMS = 64  # containers with more are not looked through
DEPTH = 3  # of containers that are
HEADER = {"serializer": "pickle", "writeable": ()}
OPTIONS = frozenset({"key", "pure", "priority", "retries"})  # of submit, with which a call may go this way
OTHERS = frozenset(
    {
        "workers", "resources", "fifo_timeout", "allow_other_workers", "actor", "actors", "site", "environment",
        "timeout", "cache",
    }
)  # fmt: skip


class Call(NamedTuple):
    """One call that was submitted."""

    key: Key
    function: bytes  # pickled
    arguments: bytes  # pickled (args, kwargs)
    priority: int
    retries: int

    @property
    def kind(self) -> tuple[bytes, int, int]:
        """What calls of one block have in common."""
        return self.function, self.priority, self.retries


class Outbox:
    """What a client says to its hub, in order.

    ``later`` has something called on the event loop after so many seconds, ``send`` takes a message, ``pack`` makes
    messages of calls. What is very much leaves bit by bit, each when ``has_left`` says that the former did; ``now`` is
    a clock, in seconds. An item that comes alone leaves in the next turn of the loop; after several, more will follow,
    and those are waited for.
    """

    def __init__(
        self,
        later: Callable[[float, Callable[[], None]], None],
        send: Callable[[dict[str, Any]], None],
        pack: Callable[[list[Call]], Iterable[dict[str, Any]]],
        has_left: Callable[[], bool] = lambda: True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._later = later
        self._send = send
        self._pack = pack
        self._has_left = has_left
        self._items: deque[dict[str, Any] | Call] = deque()
        self._due = False
        self._now = now
        self._waits_until = 0.0

    def put(self, item: dict[str, Any] | Call) -> None:
        """Have something leave soon; from any thread."""
        self._items.append(item)
        if not self._due:
            self._due = True
            self._later(0, self._flush)

    def _flush(self) -> None:
        if (left := self._waits_until - self._now()) > 0:
            self._later(left, self._flush)
            return
        self._due = False
        if self._has_left():
            self.flush(MOST_AT_ONCE)
        if self._items and not self._due:
            self._due = True
            self._later(PAUSE_S, self._flush)

    def flush(self, most: float = inf) -> None:
        """Send what there is, or about so many keys of it; on the event loop."""
        items, weight = [], 0
        while self._items and weight < most:
            items.append(self._items.popleft())
            weight += _weight(items[-1])
        if len(items) >= SEVERAL:
            self._waits_until = self._now() + TOGETHER_S
        for kind, several in groupby(items, key=_kind):
            for message in self._together(kind, list(several)):
                self._send(message)

    def _together(self, kind: str, items: list[Any]) -> Iterable[dict[str, Any]]:
        if kind == "call":
            return self._pack(items)
        if kind == RELEASE and len(items) > 1:
            return [{**items[0], "keys": [key for item in items for key in item["keys"]]}]
        return items


def _weight(item: dict[str, Any] | Call) -> int:
    """Return about how many keys an item names."""
    if isinstance(item, Call):
        return 1
    return len(item.get("keys", ())) + sum(len(block["outputs"]) for block in item.get("blocks", ()))


def _kind(item: dict[str, Any] | Call) -> str:
    if isinstance(item, Call):
        return "call"
    return RELEASE if item["op"] == RELEASE else ""


class Functions:
    """Pickles of functions that always give the same one; ``wants`` says which packages a pickle mentions."""

    def __init__(self, wants: Callable[[list[bytes]], set[str]]) -> None:
        self._wants = wants
        self._known: OrderedDict[int, tuple[Any, Any, bytes | None]] = OrderedDict()

    def pickled(self, function: Any) -> bytes | None:
        """Return the pickle of a function; None where it may be another one tomorrow, or sites may lack a package."""
        known = self._known.get(id(function))
        code = getattr(function, "__code__", None)
        if known is not None and known[0] is function and known[1] is code:
            return known[2]
        found = self._pickle(function)
        self._known[id(function)] = (function, code, found)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    def _pickle(self, function: Any) -> bytes | None:
        if not isinstance(function, types.FunctionType | types.BuiltinFunctionType | type) or iscoroutinefunction(
            function
        ):
            return None
        if isinstance(function, types.FunctionType) and function.__module__ == "__main__" and not is_closed(function):
            return None
        if isinstance(function, type) and function.__module__ == "__main__":
            return None
        try:
            found = bytes(dumps(function))
        except Exception:  # which the long way explains
            return None
        if isinstance(function, types.FunctionType) and not is_closed(function) and b"cloudpickle" in found:
            return None
        return None if self._wants([found]) else found


def is_closed(function: types.FunctionType) -> bool:
    """Whether a function uses nothing that may change: no cells, no global values, no attributes of its own."""
    if function.__closure__ or function.__dict__ or function.__kwdefaults__:
        return False
    if any(type(value) not in PLAIN for value in function.__defaults__ or ()):
        return False
    used = (function.__globals__.get(name) for name in _names(function.__code__))
    return all(value is None or isinstance(value, types.ModuleType) for value in used)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def is_simple(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is a number or a string, or a small container of some, so that no site can fail to open it."""
    kind = type(value)
    if kind in PLAIN:
        return True
    if kind not in (tuple, list, dict, set) or depth == 0 or len(value) > MOST_ITEMS:
        return False
    items = (*value, *value.values()) if kind is dict else value
    return all(is_simple(item, depth - 1) for item in items)


def call_of(functions: Functions, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Return the call of a ``submit`` with these arguments, or None where that must go the long way."""
    if not OTHERS.isdisjoint(kwargs) or not is_simple(args):
        return None
    own = {name: value for name, value in kwargs.items() if name not in OPTIONS}
    if own and not is_simple(own) or (function := functions.pickled(func)) is None:
        return None
    if (key := kwargs.get("key")) is None:
        token = tokenize(func, own, *args) if kwargs.get("pure", True) else uuid.uuid4()
        key = f"{funcname(func)}-{token}"
    return Call(key, function, pickle.dumps((args, own), 5), kwargs.get("priority") or 0, kwargs.get("retries") or 0)


def submission_of(calls: list[Call], ids: Iterator[str], most: int, how: Mapping[str, Any]) -> Submission:
    """Return blocks of calls, at most so many in each; ``how`` goes with their payloads."""
    submission = Submission()
    for (function, priority, retries), alike in groupby(calls, key=lambda call: call.kind):
        several = list(alike)
        for start in range(0, len(several), most):
            some = several[start : start + most]
            keys = tuple(call.key for call in some)
            name = key_split(keys[0])
            submission.blocks.append(
                BlockSpec(
                    id=next(ids), client="", owner="", kind=BlockKind.CALLS, inputs=(), outputs=keys, ntasks=len(keys),
                    prefixes=((name, len(keys)),), label=name,
                    constraint=Constraint(python=PYTHON, priority=priority, retries=retries),
                )
            )  # fmt: skip
            rows = [call.arguments for call in some]
            submission.payloads.append({"calls": Serialized(HEADER, [pickle.dumps((function, rows), 5)]), **how})
    return submission
