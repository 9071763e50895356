"""Batches of calls: sizes, keys, futures in arguments, large keyword arguments, and what a site makes of them."""

from __future__ import annotations

import pickle
from collections import namedtuple
from typing import Any

import dask
import distributed
import numpy as np
import pytest

from daskfed.client.calls import Calls, call_of_submit, calls_of_map
from daskfed.dask_private import LLGExpr, Task, parse_input

Point = namedtuple("Point", "x y")


class StandInFuture(dask._task_spec.TaskRef):
    """Like a future: a reference to a key that must not be pickled along."""

    def __reduce__(self) -> Any:
        raise AssertionError("a future was pickled")


def combine(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def run(batches: list[Calls], **known: Any) -> dict[Any, Any]:
    """Run pickled batches, each knowing only the keys it says it needs."""
    results: dict[Any, Any] = dict(known)
    for batch in batches:
        graph = dict(pickle.loads(pickle.dumps(batch.expr)).__dask_graph__())
        given = {key: dask._task_spec.DataNode(key, results[key]) for key in batch.needs}
        results.update(zip(batch.keys, dask.get({**graph, **given}, list(batch.keys)), strict=True))
    return {key: value for key, value in results.items() if key not in known}


def test_a_map_is_split_into_batches() -> None:
    keys = [f"double-{i}" for i in range(1200)]
    batches = list(calls_of_map(combine, [range(1200), list("ab") * 600], keys, {"z": 1}))
    assert [len(batch.keys) for batch in batches] == [512, 512, 176]
    assert [key for batch in batches for key in batch.keys] == keys
    assert all(batch.needs == frozenset() for batch in batches)
    assert run(batches) == {f"double-{i}": ((i, "ab"[i % 2]), {"z": 1}) for i in range(1200)}


def test_a_batch_of_numbers_is_pickled_in_a_few_bytes_a_call() -> None:
    keys = [f"k{i}" for i in range(512)]
    (ranged,) = calls_of_map(combine, [range(512)], keys, {})
    (array,) = calls_of_map(combine, [np.arange(512)], keys, {})
    bare = len(pickle.dumps(keys))
    assert len(pickle.dumps(ranged.expr)) < bare + 400
    assert len(pickle.dumps(array.expr)) < bare + 512 * 8 + 600
    assert run([array])["k7"] == ((7,), {})


@pytest.mark.parametrize(
    ("iterables", "rows"),
    [
        ([[1, 2, 3], (4, 5)], [(1, 4), (2, 5)]),
        ([{1: "a", 2: "b"}], [(1,), (2,)]),
        ([{1: "a", 2: "b"}.values()], [("a",), ("b",)]),
        ([np.array([[1, 2], [3, 4]])[:, 0]], [(1,), (3,)]),
        ([np.array([None, "x"], dtype=object)], [(None,), ("x",)]),
        (["ab"], [("a",), ("b",)]),
        ([[]], []),
        ([], []),
    ],
)
def test_any_collection_can_be_mapped_over(iterables: list[Any], rows: list[tuple[Any, ...]]) -> None:
    batches = list(calls_of_map(combine, iterables, [f"k{i}" for i in range(9)], {}, size=2))
    assert [args for args, _ in run(batches).values()] == rows


def test_a_series_is_mapped_over_by_value() -> None:
    import pandas as pd

    series = pd.Series([5, 6, 7], index=[2, 1, 0])
    batches = list(calls_of_map(combine, [series], ["a", "b", "c"], {}, size=2))
    assert [args for args, _ in run(batches).values()] == [(5,), (6,), (7,)]


def test_futures_in_arguments_are_needed_and_not_pickled() -> None:
    f, g, h = map(StandInFuture, "fgh")
    rows = [1, f, [g, 2], {"a": (h, 3)}, Point(f, {g})]
    batches = list(calls_of_map(combine, [rows], list("abcde"), {"k": {"deep": [h]}}, size=3))
    assert [batch.needs for batch in batches] == [{"f", "g", "h"}, {"h", "f", "g"}]
    (plain,) = calls_of_map(combine, [[1, "f"]], ["x", "y"], {})
    assert plain.needs == frozenset()
    results = run(batches, f=10, g=20, h=30)
    kwargs = {"k": {"deep": [30]}}
    assert [args for args, _ in results.values()] == [
        (1,),
        (10,),
        ([20, 2],),
        ({"a": (30, 3)},),
        (Point(10, {20}),),
    ]
    assert all(given == kwargs for _, given in results.values())


def test_a_large_keyword_argument_travels_once() -> None:
    large = np.zeros(50_000)
    keys = [f"k{i}" for i in range(6)]
    shared, *batches = calls_of_map(combine, [range(6)], keys, {"big": large, "small": 1}, size=2)
    assert len(shared.keys) == 1 and shared.needs == frozenset()
    assert {batch.needs for batch in batches} == {frozenset(shared.keys)}
    assert all(len(pickle.dumps(batch.expr)) < 2000 for batch in batches)
    results = run([shared, *batches])
    assert all(results[key][1]["big"] is not None and results[key][1]["big"].nbytes == large.nbytes for key in keys)
    (whole,) = calls_of_map(combine, [range(6)], keys, {"big": large})
    assert whole.needs == frozenset() and whole.keys == tuple(keys)
    assert run([whole])["k3"][1]["big"].nbytes == large.nbytes


def test_two_maps_do_not_share_the_key_of_a_large_keyword_argument() -> None:
    first, second = (next(calls_of_map(combine, [range(4)], list("abcd"), {"big": np.zeros(20_000)}, 2)) for _ in "ab")
    assert first.keys != second.keys


def test_one_call() -> None:
    f = StandInFuture("f")
    task = Task("x", combine, 1, parse_input([f]), z=parse_input({"f": f}))
    call = call_of_submit(LLGExpr({"x": task}))
    assert call.keys == ("x",) and call.needs == {"f"}
    assert run([call], f=5) == {"x": ((1, [5]), {"z": {"f": 5}})}


def test_a_stock_scheduler_opens_a_batch() -> None:
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None, set_as_default=False
    ) as client:
        f = client.scatter(4)
        (batch,) = calls_of_map(combine, [[1, f]], ["p", "q"], {"z": np.zeros(20_000)})
        futures = client._graph_to_futures(batch.expr, list(batch.keys), span_metadata={})
        values = client.gather(futures)
    assert [values[key][0] for key in "pq"] == [(1,), (4,)]
