"""Keys that no message can carry get a plain equal, wherever they are named."""

from __future__ import annotations

import operator
from datetime import date
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef

from daskfed.client.plain_keys import is_plain, plain_key, with_plain_keys


class Name(str):
    """A string of another type."""


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (("x", np.int64(3)), ("x", 3)),
        (("x", ("y", np.float64(0.5))), ("x", ("y", 0.5))),
        (("x", np.str_("a")), ("x", "a")),
        (Name("x"), "x"),
        (("x", 1, None, True), ("x", 1, None, True)),
    ],
)
def test_a_key_gets_its_plain_equal(key: Any, plain: Any) -> None:
    """It has the same hash, so that whoever knows it under the former name finds it."""
    found = plain_key(key)
    assert found == plain == key and hash(found) == hash(key) and is_plain(found)


def test_what_has_no_plain_equal_gets_a_name_of_its_own() -> None:
    """The same one each time, since graphs that are submitted one after another may share it."""
    one, same, other = (plain_key(("x", date(2026, 1, day))) for day in (1, 1, 2))
    assert is_plain(one) and one == same != other and one[0] == "x"


def test_tasks_and_what_refers_to_them_are_renamed() -> None:
    """Also in lists and aliases, and where only the reference is odd."""
    odd, plain = ("x", np.int64(0)), ("x", 0)
    tasks = {
        odd: DataNode(odd, 1),
        "sum": Task("sum", operator.add, TaskRef(odd), 1),
        "list": Task("list", sum, List(TaskRef(("x", np.int64(0))), 2)),
        ("a", np.int64(1)): Alias(("a", np.int64(1)), odd),
        "b": Task("b", operator.neg, TaskRef(("p", np.int64(7)))),
        ("p", 7): DataNode(("p", 7), 5),
    }
    found = with_plain_keys(tasks)
    named = [*found, *(dep for node in found.values() for dep in node.dependencies), *(n.key for n in found.values())]
    assert all(map(is_plain, named))
    assert set(found) == {plain, "sum", "list", ("a", 1), "b", ("p", 7)}
    assert found["sum"]({plain: 1}) == 2 and found["list"]({plain: 1}) == 3 and found["b"]({("p", 7): 5}) == -5
    assert found[("a", 1)]({plain: 1}) == 1


def test_plain_tasks_stay_as_they_are() -> None:
    """Almost every graph is plain already."""
    tasks = {("x", 0): DataNode(("x", 0), 1), "y": Task("y", operator.neg, TaskRef(("x", 0)))}
    found = with_plain_keys(tasks)
    assert all(found[key] is node for key, node in tasks.items())
