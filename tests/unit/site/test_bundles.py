"""Several tasks as one: what a worker runs, and what the scheduler has."""

from __future__ import annotations

import base64
import operator
import pickle
import subprocess
import sys
import weakref

import distributed
import pytest

from daskfed.dask_private import Alias, DataNode, GraphNode, Task, TaskRef
from daskfed.messages import Key
from daskfed.site.bundles import RUN, Bundle, Together, run_bundle, with_bundles

CONSTANT = DataNode("c", 5)
SUM = Task("sum", operator.add, TaskRef("x"), TaskRef("c"))
PRODUCT = Task("product", operator.mul, TaskRef("sum"), TaskRef("y"))
TASKS = [CONSTANT, SUM, PRODUCT]


def test_it_gives_what_its_last_task_gives() -> None:
    bundle = Bundle("product", TASKS)
    assert bundle.key == "product" and bundle.dependencies == {"x", "y"}
    assert bundle({"x": 1, "y": 2}) == 12


def test_an_alias_may_be_the_last() -> None:
    assert Bundle("named", [SUM, Alias("named", "sum")])({"x": 1, "c": 2}) == 3


def test_a_worker_gets_a_plain_task() -> None:
    """Of a type that is Dask's own, which tells who looks at it what it is."""
    sent = pickle.loads(pickle.dumps(Bundle("product", TASKS)))
    assert type(sent) is Task and sent.key == "product" and sent.dependencies == {"x", "y"}
    assert sent({"x": 1, "y": 2}) == 12 and repr(sent) == "<Task 'product', 3 tasks run as one>"


def test_it_may_get_another_key() -> None:
    """The scheduler gives it that of an alias which stands for it alone."""
    bundle = Bundle("product", TASKS).copy()
    bundle.key = "result"
    assert list(bundle.parts()) == ["c", "sum", "result"]
    assert bundle.parts()["result"].key == "result"
    assert pickle.loads(pickle.dumps(bundle)).key == "result"


def test_who_is_in_it() -> None:
    parts = Bundle("product", TASKS).parts()
    assert parts == {"c": CONSTANT, "sum": SUM, "product": PRODUCT}
    assert Bundle("b-2", [Task("a-1", int), Task("a-2", int), Task("b-2", int)]).prefixes == {"a": 2, "b": 1}


def test_only_what_makes_data_of_nothing_produces_data() -> None:
    source = Task("source", int, _data_producer=True)
    assert Bundle("z", [source, Task("z", abs, TaskRef("source"))]).data_producer
    assert not Bundle("z", [source, Task("z", max, TaskRef("source"), TaskRef("x"))]).data_producer


class Thing:
    """A value that says whether it is still there."""


def test_values_are_let_go_as_soon_as_nobody_needs_them() -> None:
    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    def make(*inputs: Thing) -> Thing:
        alive.add(made := Thing())
        return made

    def count(*inputs: Thing) -> int:
        return len(alive)

    tasks = [
        Task("a", make),
        Task("b", make, TaskRef("a")),
        Task("c", make, TaskRef("b")),
        Task("n", count, TaskRef("c")),
    ]
    assert run_bundle(needs=(), tasks=tasks, results=()) == 1


SCRIPT = """
import sys, base64, pickle
sys.modules["daskfed"] = None  # not installed
task = pickle.loads(base64.b64decode(sys.stdin.read()))
print(task({"x": 1, "y": 2}))
"""


def test_workers_need_no_daskfed() -> None:
    sent = base64.b64encode(pickle.dumps(Bundle("product", TASKS)))
    ended = subprocess.run([sys.executable, "-c", SCRIPT], input=sent, capture_output=True, check=True, timeout=60)
    assert ended.stdout.decode().strip() == "12"


def test_what_is_sent_with_each_is_short() -> None:
    assert len(RUN) < 4500


def test_bundles_in_a_graph() -> None:
    graph: dict[Key, GraphNode] = {"x": Task("x", int), **{task.key: task for task in TASKS}, "z": Task("z", abs, TaskRef("product"))}
    made = with_bundles(graph, [Together("product", ("c", "sum", "product"))])
    assert list(made) == ["x", "product", "z"]
    assert isinstance(made["product"], Bundle) and made["z"] is graph["z"]


PAIR = Together("both", ("a", "b"), ("a", "b"))
USED: dict[Key, GraphNode] = {
    "a": Task("a", operator.add, TaskRef("x"), 1),
    "b": Task("b", operator.add, TaskRef("x"), 2),
    "c": Task("c", operator.mul, TaskRef("a"), TaskRef("b")),
    "d": Task("d", operator.neg, TaskRef("c")),
}


def test_a_bundle_may_have_several_results() -> None:
    """Who needs one of them takes it from there."""
    made = with_bundles(USED, [PAIR])
    assert list(made) == ["both", "c", "d"] and made["d"] is USED["d"]
    results = made["both"]({"x": 1})
    assert results == {"a": 2, "b": 3}
    assert made["c"].dependencies == {"both"}
    assert pickle.loads(pickle.dumps(made["c"]))({"both": results}) == 6


def test_tasks_that_need_results_of_a_bundle_may_be_in_one() -> None:
    made = with_bundles(USED, [PAIR, Together("d", ("c", "d"))])
    assert list(made) == ["both", "d"]
    results = made["both"]({"x": 1})
    assert made["d"]({"both": results}) == -6
    last = made["d"]
    assert isinstance(last, Bundle)
    c, d = last.parts().values()
    assert c.dependencies == {"both"} and c({"both": results}) == 6 and d is USED["d"]


def test_what_needs_results_of_a_bundle_when_that_is_no_more() -> None:
    """It depends on the tasks that make them, and is itself again."""
    made = with_bundles(USED, [PAIR, Together("other", ("c",), ("c",))])
    user = made["other"]
    assert isinstance(user, Bundle)
    assert user.without("both").dependencies == {"a", "b"}
    alone = with_bundles(USED, [PAIR])["c"]
    assert isinstance(alone, Bundle) and alone.without("both") == USED["c"]


def test_an_error_is_that_of_the_task() -> None:
    with pytest.raises(ZeroDivisionError):
        Bundle("b", [Task("a", int), Task("b", operator.truediv, 1, TaskRef("a"))])({})


def test_the_way_over_the_wire() -> None:
    """As a scheduler sends it."""
    pickled = distributed.protocol.pickle.dumps(Bundle("product", TASKS))
    assert distributed.protocol.pickle.loads(pickled)({"x": 1, "y": 2}) == 12
