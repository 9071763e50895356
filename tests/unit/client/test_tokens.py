"""Tokens of tasks are made of what they compute, whatever Dask calls them and however it joins them."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import pytest
from distributed.client import Future

from daskfed.client.graphs import materialise
from daskfed.client.tokens import CallTokens, graph_tokens, inputs_first, version_of
from daskfed.dask_private import Alias, DataNode, Task, TaskList, TaskRef, execute_subgraph
from daskfed.data.content import Digest, digest
from daskfed.errors import ConfigurationError, NotCacheable
from daskfed.messages import Constraint, Key

EMPTY = Constraint()


def inc(x: Any) -> Any:
    return x + 1


def add(x: Any, y: Any) -> Any:
    return x + y


def nothing_outside(key: Key) -> Digest:
    raise NotCacheable(f"it is not known what {key!r} is")


def token_of_call(func: Any, *args: Any, version: str = "", constraint: Constraint = EMPTY, **kwargs: Any) -> str:
    return CallTokens(func, version, constraint, lambda key: digest(str(key))).token(args, kwargs)


def tokens_of(tasks: dict[Key, Any], *keys: Key, **constraints: Constraint) -> list[str]:
    given = {key: "" for key in keys}
    found = graph_tokens(tasks, given, constraints, nothing_outside)  # type: ignore[arg-type]
    return [found[key] for key in keys]


def graph(x: Any = 1, suffix: str = "") -> dict[Key, Any]:
    a, b, c = (f"{name}{suffix}" for name in "abc")
    return {
        a: Task(a, inc, x),
        b: Task(b, inc, TaskRef(a)),
        c: Task(c, add, TaskRef(a), TaskList(TaskRef(b), 5)),
    }


def test_versions() -> None:
    assert [version_of(each) for each in (None, False, True, "v2")] == [None, None, "", "v2"]
    for wrong in (1, "", ["v2"]):
        with pytest.raises(ConfigurationError, match="cache=.* must be True, or a word"):
            version_of(wrong)


class TestCalls:
    def test_function_arguments_and_version_count(self) -> None:
        calls = [
            token_of_call(inc, 1),
            token_of_call(inc, 2),
            token_of_call(inc, 1.0),
            token_of_call(inc, x=1),
            token_of_call(inc, 1, version="v2"),
            token_of_call(lambda x: x + 2, 1),
            token_of_call(add, 1, 2),
            token_of_call(add, 2, 1),
            token_of_call(add, x=1, y=2),
        ]
        assert len(set(calls)) == len(calls)
        assert token_of_call(add, x=1, y=2) == token_of_call(add, y=2, x=1)

    def test_places_count_and_other_constraints_do_not(self) -> None:
        north = token_of_call(inc, 1, constraint=Constraint(sites=("north",)))
        assert north != token_of_call(inc, 1) != token_of_call(inc, 1, constraint=Constraint(environment="gpu"))
        assert token_of_call(inc, 1, constraint=Constraint(retries=2, priority=1)) == token_of_call(inc, 1)

    def test_futures_count_as_what_they_are(self) -> None:
        future = Future("inc-1")
        assert token_of_call(inc, future) == token_of_call(inc, Future("inc-1")) != token_of_call(inc, Future("inc-2"))
        assert token_of_call(inc, [future]) != token_of_call(inc, future)

    def test_an_unknown_future_is_named(self) -> None:
        calls = CallTokens(add, "", EMPTY, nothing_outside)
        with pytest.raises(NotCacheable, match="argument 2 of add: .*'inc-1'"):
            calls.token((1, Future("inc-1")), {})


class TestGraphs:
    def test_keys_do_not_count(self) -> None:
        assert tokens_of(graph(), "a", "b", "c") == tokens_of(graph(suffix="-x"), "a-x", "b-x", "c-x")

    def test_inputs_count_through_the_graph(self) -> None:
        before, after = tokens_of(graph(), "a", "b", "c"), tokens_of(graph(2), "a", "b", "c")
        assert not set(before) & set(after)

    def test_a_task_is_what_a_call_is(self) -> None:
        assert tokens_of(graph(), "a") == [token_of_call(inc, 1)]

    def test_aliases_and_values_count_as_what_they_stand_for(self) -> None:
        tasks = {"v": DataNode("v", 1), "n": Alias("n", "v"), "a": Task("a", inc, TaskRef("n"))}
        assert tokens_of(tasks, "a") == [token_of_call(inc, 1)]

    def test_fusing_does_not_count(self) -> None:
        tasks = graph()
        plain = {"a": tasks["a"], "b": tasks["b"], "d": Task("d", inc, TaskRef("b"))}
        fused = Task.fuse(*plain.values(), key="d")
        assert tokens_of({"d": fused}, "d") == tokens_of(plain, "d")
        partly = {"a": tasks["a"], "d": Task.fuse(plain["b"], plain["d"], key="d")}
        assert tokens_of(partly, "d") == tokens_of(plain, "d")

    def test_versions_count_below_too(self) -> None:
        tasks = graph()
        plain = graph_tokens(tasks, {"b": ""}, {}, nothing_outside)["b"]
        assert graph_tokens(tasks, {"b": "", "a": "v2"}, {}, nothing_outside)["b"] != plain

    def test_places_count(self) -> None:
        north = Constraint(sites=("north",))
        assert tokens_of(graph(), "b") != tokens_of(graph(), "b", b=north) != tokens_of(graph(), "b", a=north)

    def test_what_is_not_annotated_and_not_needed_may_be_anything(self) -> None:
        tasks = {**graph(), "z": Task("z", inc, (n for n in ()))}
        assert len(tokens_of(tasks, "c")) == 1

    def test_what_cannot_be_told_is_named(self) -> None:
        tasks = {"g": Task("g", list, (n for n in ())), "a": Task("a", len, TaskRef("g"))}
        with pytest.raises(NotCacheable, match="the task 'g', which is needed by one that is annotated.*generator"):
            tokens_of(tasks, "a")
        with pytest.raises(NotCacheable, match="the task 'g', which is annotated"):
            tokens_of(tasks, "g")

    def test_long_chains(self) -> None:
        tasks: dict[Key, Any] = {0: Task(0, inc, 1)}
        tasks |= {n: Task(n, inc, TaskRef(n - 1)) for n in range(1, 5000)}
        assert len(tokens_of(tasks, 4999)) == 1
        fused = Task.fuse(*tasks.values(), key="all")
        assert tokens_of({"all": fused}, "all") == tokens_of(tasks, 4999)
        assert list(inputs_first(tasks, [10])) == list(range(11))

    def test_tasks_that_were_fused_may_have_the_same_names_inside(self) -> None:
        inside = Task("inner", inc, TaskRef("in"))
        tasks: dict[Key, Any] = {"x": Task("x", inc, 1), "y": Task("y", inc, 2)}
        for name in "xy":
            last = Task(f"{name}-last", execute_subgraph, {"inner": inside}, "inner", ("in",), TaskRef(name))
            tasks[last.key] = last
        first, second = tokens_of(tasks, "x-last", "y-last")
        assert first != second and first == tokens_of(graph(), "b")[0]

    def test_arrays_and_delayed_objects_built_twice(self) -> None:
        def built() -> list[str]:
            x = da.random.default_rng(1).random((20, 20), chunks=10)
            total = dask.delayed(inc)((x + x.T).sum())
            with dask.annotate(cache=True):
                total = dask.delayed(add)(total, dask.delayed(inc)(1))
            (expr,) = [dask.base.collections_to_expr([total])]
            graph = materialise(expr.optimize(), list(dask.core.flatten(expr.__dask_keys__())))
            return sorted(
                graph_tokens(graph.tasks, {k: "" for k in graph.annotations["cache"]}, {}, nothing_outside).values()
            )

        assert built() == built() and len(built()) == 2
