"""What travels beside a block: which of its tasks make actors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from daskfed.client.calls import calls_of_map
from daskfed.client.client import actor_keys
from daskfed.client.graphs import MaterialisedGraph
from daskfed.client.submission import plan_calls, plan_graph
from daskfed.dask_private import Task, TaskRef
from daskfed.messages import Constraint

IDS = map(str, itertools.count())


def test_a_block_says_which_actors_each_output_takes() -> None:
    """A site that is asked for some outputs of a block has no other actors among its tasks."""
    tasks: dict[Any, Any] = {
        "actor": Task("actor", list),
        "user": Task("user", len, TaskRef("actor")),
        "own": Task("own", set),
        "other": Task("other", dict),
    }
    graph = MaterialisedGraph(tasks, {"user", "own", "other"})
    submission = plan_graph(graph, IDS, {"actor", "own"})
    told: dict[Any, Any] = {}
    for block, payload in zip(submission.blocks, submission.payloads, strict=True):
        told |= payload.get("actors", {})
        assert block.stateful is ("own" in block.outputs)
    assert told == {"user": ["actor"], "own": ["own"]}


def test_a_value_that_calls_share_is_no_actor() -> None:
    calls = calls_of_map(print, [range(4)], ["a", "b", "c", "d"], {"end": "x" * 200_000}, size=2)
    blocks = plan_calls(((each, Constraint(), ()) for each in calls), {}, IDS, actors=True).blocks
    assert [block.stateful for block in blocks] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, ""), (False, ""), (True, "ab"), ((), ""), ([], ""), ("c", "c"), (["a", "c"], "ac"), (("a", "c"), "ac"),
        ({"a": True, "b": False}, "a"),
    ],
)  # fmt: skip
def test_what_names_actors(given: Any, meant: str) -> None:
    assert actor_keys(given, ["a", "b"]) == set(meant)


def test_a_tuple_may_be_a_key() -> None:
    assert actor_keys(("x", 0), [("x", 0)]) == {("x", 0)}


def test_many_calls_are_submitted_in_several_messages_and_a_graph_in_one() -> None:
    keys = [f"f-{n}" for n in range(100)]
    calls = calls_of_map(abs, [range(100)], keys, {}, size=1)
    submission = plan_calls(((each, Constraint(), ()) for each in calls), {}, IDS)
    messages = list(submission.messages(keys))
    assert len(messages) > 1 and all(message["wanted"] is None for message in messages)
    assert [key for message in messages for block in message["blocks"] for key in block["outputs"]] == keys
    assert sum(len(message["payloads"]) for message in messages) == 100
    (some,) = submission.messages(keys[:50])
    assert some["wanted"] == keys[:50] and len(some["blocks"]) == 100
    graph = MaterialisedGraph({key: Task(key, list) for key in keys}, set(keys))
    planned = plan_graph(graph, IDS)
    outputs = [key for block in planned.blocks for key in block.outputs]
    assert [message["wanted"] for message in planned.messages(outputs)] == [None]
