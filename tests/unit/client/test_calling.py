"""Single calls that are pickled as they are submitted, and what a client says to its hub, in order."""

from __future__ import annotations

import asyncio
import itertools
import operator
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest

from daskfed.client import calling
from daskfed.client.calling import Call, Functions, Outbox, call_of, is_closed, is_simple, submission_of
from daskfed.client.lanes import CallState, Countdown, calls_of

OFFSET = 3
NO_PACKAGES: Callable[[list[bytes]], set[str]] = lambda frames: set()  # noqa: E731


def function(source: str, **names: Any) -> types.FunctionType:
    """Return the function ``f`` of a script."""
    scope: dict[str, Any] = {"__name__": "__main__", **names}
    exec(source, scope)
    found = scope["f"]
    assert isinstance(found, types.FunctionType)
    return found


@pytest.mark.parametrize(
    ("source", "closed"),
    [
        ("def f(x): return x + 1", True),
        ("import math\ndef f(x): return math.sqrt(x)", True),
        ("def f(x, y=2): return [z + y for z in range(x)]", True),
        ("OFFSET = 1\ndef f(x): return x + OFFSET", False),
        ("def g(x): return x\ndef f(x): return g(x)", False),
        ("def f(x, y=[]): return y", False),
        ("def outer(n):\n    def f(x): return x + n\n    return f\nf = outer(1)", False),
        ("OFFSET = 1\ndef f(x): return [y + OFFSET for y in x]", False),
    ],
)
def test_a_function_is_closed_if_nothing_that_it_uses_may_change(source: str, closed: bool) -> None:
    assert is_closed(function(source)) is closed


def test_only_functions_that_stay_the_same_are_pickled_once() -> None:
    functions = Functions(NO_PACKAGES)
    closed = function("def f(x): return x + 1")
    assert functions.pickled(closed) is functions.pickled(closed)
    assert functions.pickled(function("OFFSET = 1\ndef f(x): return x + OFFSET")) is None
    found = functions.pickled(operator.neg)
    assert found is not None and pickle.loads(found) is operator.neg
    assert functions.pickled(lambda x: x + OFFSET) is None


def test_one_that_needs_packages_which_sites_may_lack_goes_the_long_way() -> None:
    assert Functions(lambda frames: {"rare"}).pickled(operator.neg) is None


def test_another_code_of_the_same_function_is_pickled_anew() -> None:
    functions, closed = Functions(NO_PACKAGES), function("def f(x): return x + 1")
    before = functions.pickled(closed)
    closed.__code__ = function("def f(x): return x + 2").__code__
    assert functions.pickled(closed) != before


@pytest.mark.parametrize(
    ("value", "simple"),
    [(1, True), ("a", True), ((1, [2.5, {"a": None}]), True), (object(), False), ([[[[[1]]]]], False)],
)
def test_simple_values(value: object, simple: bool) -> None:
    assert is_simple(value) is simple


def test_which_calls_go_at_once() -> None:
    functions = Functions(NO_PACKAGES)
    call = call_of(functions, operator.add, (1, 2), {"pure": False, "priority": 3, "retries": 1})
    assert call is not None and pickle.loads(call.arguments) == ((1, 2), {})
    assert (call.priority, call.retries) == (3, 1) and str(call.key).startswith("add-")
    same = [call_of(functions, operator.add, (1, 2), {}) for _ in range(2)]
    assert same[0] == same[1] and same[0] != call_of(functions, operator.add, (2, 1), {})
    assert call_of(functions, operator.add, (object(), 2), {}) is None
    assert call_of(functions, operator.add, (1, 2), {"workers": "a"}) is None
    assert call_of(functions, sorted, ([2, 1],), {"reverse": True, "key": "mine"}) is not None


class Box:
    """An outbox, what leaves it, and what it wants to have called."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.has_left = True
        self.now = 0.0
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.box = Outbox(
            self.call_later, self.sent.append,
            lambda calls: [{"op": "calls", "calls": calls}], lambda: self.has_left, lambda: self.now,
        )  # fmt: skip

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.later.append((delay_s, call))

    def run(self) -> None:
        while self.later:
            self.step()

    def step(self) -> None:
        delay_s, call = self.later.pop(0)
        self.now += delay_s
        call()


def call(n: int) -> Call:
    return Call(f"f-{n}", b"f", pickle.dumps(((n,), {})), 0, 0)


def test_what_lies_next_to_each_other_leaves_together_and_nothing_changes_places() -> None:
    box = Box()
    release = {"op": "client-releases-keys", "client": "c"}
    for item in (call(1), call(2), {**release, "keys": ["a"]}, {**release, "keys": ["b"]}, {"op": "x"}, call(3)):
        box.box.put(item)
    assert len(box.later) == 1
    box.run()
    assert box.sent == [
        {"op": "calls", "calls": [call(1), call(2)]},
        {**release, "keys": ["a", "b"]},
        {"op": "x"},
        {"op": "calls", "calls": [call(3)]},
    ]
    box.box.put({"op": "y"})
    box.run()
    assert box.sent[-1] == {"op": "y"}


def test_after_several_calls_others_are_waited_for_and_a_single_one_leaves_at_once() -> None:
    box = Box()
    for n in range(4):
        box.box.put(call(n))
    box.step()
    assert len(box.sent) == 1 and not box.later
    box.box.put(call(4))
    box.step()
    box.box.put(call(5))
    assert len(box.sent) == 1 and [delay_s for delay_s, _ in box.later] == [pytest.approx(calling.TOGETHER_S)]
    box.run()
    assert box.sent[1:] == [{"op": "calls", "calls": [call(4), call(5)]}]
    for n in range(6, 9):
        box.box.put(call(n))
        box.step()
        assert box.sent[-1] == {"op": "calls", "calls": [call(n)]}


def test_what_is_very_much_leaves_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "MOST_AT_ONCE", 4)
    box = Box()
    blocks = [{"op": "fed-submit", "blocks": [{"outputs": ("x", "y")}, {"outputs": ("z",)}], "n": n} for n in range(3)]
    for item in (*blocks, {"op": "last"}):
        box.box.put(item)
    box.step()
    assert box.sent == blocks[:2] and len(box.later) == 1
    box.has_left = False
    for _ in range(3):
        box.step()
    assert box.sent == blocks[:2]
    box.box.put({"op": "later still"})
    box.has_left = True
    box.run()
    assert box.sent == [*blocks, {"op": "last"}, {"op": "later still"}]
    for item in blocks:
        box.box.put(item)
    box.has_left = False
    box.box.flush()  # all that there is, as the client closes
    assert box.sent[-3:] == blocks


def test_calls_become_blocks_of_one_function_each() -> None:
    calls = [*map(call, range(5)), call(5)._replace(function=b"g"), call(6)._replace(priority=1)]
    submission = submission_of(calls, map(str, itertools.count()), 3, {"always": True})
    assert [block.outputs for block in submission.blocks] == [
        ("f-0", "f-1", "f-2"), ("f-3", "f-4"), ("f-5",), ("f-6",),
    ]  # fmt: skip
    assert [block.constraint.priority for block in submission.blocks] == [0, 0, 0, 1]
    assert all(payload["always"] for payload in submission.payloads)


def test_the_calls_of_a_payload_can_be_told_as_tasks() -> None:
    pickled = pickle.dumps(operator.neg)
    calls = [call(n)._replace(function=pickled) for n in (4, 5)]
    submission = submission_of(calls, iter("ab"), 10, {})
    tasks = calls_of(submission.blocks[0], submission.payloads[0])
    assert {key: task() for key, task in tasks.items()} == {"f-4": -4, "f-5": -5}


class TestStates:
    def test_without_who_waits_there_is_no_event(self) -> None:
        state = CallState("x")
        assert not state.done()
        state.finish(int)
        assert state.done() and state.type is int and state._event is None

    def test_who_waits_for_one_is_woken(self) -> None:
        async def scenario() -> None:
            state = CallState("x")
            waiting = asyncio.ensure_future(state.wait())
            await asyncio.sleep(0)
            state.finish()
            await asyncio.wait_for(waiting, 1)
            await asyncio.wait_for(state.wait(), 1)
            state.retry()
            assert not state.done()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(state.wait(), 0.01)

        asyncio.run(scenario())

    def test_a_value_goes_with_what_is_lost_or_made_again(self) -> None:
        for move in ("lose", "retry", "reset"):
            state = CallState("x")
            state.value = b"old"
            getattr(state, move)()
            assert state.value is None

    def test_a_countdown_ends_with_the_last_or_with_a_bad_one(self) -> None:
        async def scenario() -> None:
            states = [CallState(str(n)) for n in range(3)]
            states[0].finish()
            waiting = asyncio.ensure_future(Countdown(states).wait())
            beside = asyncio.ensure_future(Countdown(states[1:]).wait())
            await asyncio.sleep(0)
            states[1].finish()
            await asyncio.sleep(0.01)
            assert not waiting.done()
            states[2].finish()
            await asyncio.wait_for(asyncio.gather(waiting, beside), 1)
            states = [CallState(str(n)) for n in range(3)]
            waiting = asyncio.ensure_future(Countdown(states).wait())
            await asyncio.sleep(0)
            states[1].cancel()
            await asyncio.wait_for(waiting, 1)
            assert all(state.watch is None for state in states)

        asyncio.run(scenario())
