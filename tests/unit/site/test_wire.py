"""Reading what a scheduler says: batches, marks and silences, without a scheduler."""

from __future__ import annotations

from typing import Any

from daskfed.dask_private import Serialized
from daskfed.messages import MadeKey
from daskfed.site.events import KeysErred, KeysForgotten, KeysReady, Load
from daskfed.site.wire import Reading


def in_memory(key: str, nbytes: int | None = None) -> list[dict[str, Any]]:
    told = [] if nbytes is None else [{"op": "fed-key", "key": key, "nbytes": nbytes}]
    return [*told, {"op": "key-in-memory", "key": key, "type": b"int"}]


def erred(key: str, error: bytes = b"boom", size: int = 1) -> dict[str, Any]:
    exception = Serialized({}, [memoryview(error * size)])
    return {"op": "task-erred", "key": key, "exception": exception, "traceback": None}


def echo(mark: dict[str, Any]) -> dict[str, Any]:
    """What the scheduler answers to a mark: it does not know such a key."""
    assert mark["op"] == "report-key"
    return {"op": "cancelled-keys", "keys": [mark["key"]], "reason": "already forgotten"}


def load(unfinished: int = 5) -> dict[str, Any]:
    return {"op": "fed-load", "unfinished": unfinished, "threads": 2}


def test_keys_that_come_together_are_one_event_with_their_sizes_and_types() -> None:
    report = Reading("c").report([*in_memory("x", 8), *in_memory("y", 16), *in_memory("z")])
    assert report.events == [KeysReady((MadeKey("x", 8), MadeKey("y", 16), MadeKey("z", 0)))]
    assert report.types == {"x": b"int", "y": b"int", "z": b"int"}


def test_a_size_that_comes_behind_its_key_counts_too() -> None:
    size, key = in_memory("x", 8)
    assert Reading("c").report([key, size]).events == [KeysReady((MadeKey("x", 8),))]


def test_the_order_of_different_things_is_kept() -> None:
    batch = [*in_memory("a"), erred("b"), *in_memory("c"), {"op": "cancelled-keys", "keys": ["d"]}, load()]
    assert Reading("c").report(batch).events == [
        KeysReady((MadeKey("a", 0),)),
        KeysErred(("b",)),
        KeysReady((MadeKey("c", 0),)),
        KeysForgotten(("d",)),
        Load(5, 2, 0),
    ]


def test_keys_that_failed_with_one_error_are_one_event() -> None:
    report = Reading("c").report([erred("a"), erred("b"), erred("c", b"bang")])
    assert report.events == [KeysErred(("a", "b")), KeysErred(("c",))]
    assert bytes(report.errors["b"]["exception"].frames[0]) == b"boom"


def test_an_error_of_the_scheduler_itself_is_unopened_as_any_other() -> None:
    report = Reading("c").report([{"op": "task-erred", "key": "a", "exception": b"pickled", "traceback": None}])
    assert report.errors["a"]["exception"].header["serializer"] == "pickle"
    assert report.errors["a"]["exception"].frames == [b"pickled"]


def test_large_errors_are_not_compared() -> None:
    report = Reading("c").report([erred("a", size=2**15), erred("b", size=2**15)])
    assert report.events == [KeysErred(("a",)), KeysErred(("b",))]


def test_failures_for_want_of_an_import_are_marked_as_such() -> None:
    report = Reading("c").report([{"op": "fed-erred", "key": "a", "blame": None}, erred("a")])
    assert report.events == [KeysErred(("a",), transfer=True)]


def test_failures_for_want_of_workers_name_the_task_that_is_blamed() -> None:
    blamed = [{"op": "fed-erred", "key": key, "blame": blame} for key, blame in (("a", "a"), ("b", "a"), ("c", "c"))]
    report = Reading("c").report([*blamed, *map(erred, "abcd")])
    assert report.events == [KeysErred(("a", "b"), blame="a"), KeysErred(("c",), blame="c"), KeysErred(("d",))]


def test_a_load_says_which_blocks_it_includes() -> None:
    reading = Reading("c")
    first, second = reading.mark(submitted=1), reading.mark(submitted=1)
    assert reading.report([load(1)]).events == [Load(1, 2, 0)]
    assert reading.report([echo(first), load(2)]).events == [Load(2, 2, 1)]
    assert reading.report([load(3), echo(second), load(4)]).events == [Load(3, 2, 1), Load(4, 2, 2)]


def test_nothing_is_heard_of_a_released_key_until_the_scheduler_has_seen_the_release() -> None:
    reading = Reading("c")
    mark = reading.mark(silent=["x", "y"])
    late = [*in_memory("x"), erred("y"), {"op": "cancelled-keys", "keys": ["x", "z"]}]
    report = reading.report(late)
    assert report.events == [KeysForgotten(("z",))]
    assert report.types == {} and report.errors == {}
    assert not reading.heard_release(["x"]) and reading.heard_release(["z"])
    assert reading.report([echo(mark), *in_memory("x")]).events == [KeysReady((MadeKey("x", 0),))]
    assert reading.heard_release(["x", "y"])


def test_a_key_that_is_released_twice_is_silent_until_the_second_release_was_seen() -> None:
    reading = Reading("c")
    first, second = reading.mark(silent=["x"]), reading.mark(silent=["x"])
    assert reading.report([echo(first), *in_memory("x")]).events == []
    assert reading.report([echo(second), *in_memory("x")]).events == [KeysReady((MadeKey("x", 0),))]


def test_other_reports() -> None:
    status: dict[str, Any] = {"op": "fed-status", "workers": 1}
    report = Reading("c").report([status, {"op": "fed-learned"}, {"op": "restart"}, {"op": "?"}])
    assert report.status == {"op": "fed-status", "workers": 1}
    assert report.learned == [{"op": "fed-learned"}]
    assert report.restarted and report.events == []
