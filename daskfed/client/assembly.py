"""The last step of compute(), taken by the client.

Stock ``compute()`` adds a task that concatenates all parts of a result on one worker; across sites it would pull the
whole result over the network to one of them, and then once more to the client. Here the parts come to the client, which
calls the same function on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from daskfed.client.graphs import MaterialisedGraph
from daskfed.dask_private import GraphNode
from daskfed.messages import Key


@dataclass(frozen=True, slots=True)
class Assembly:
    """A task that the client runs itself when its inputs have come."""

    key: Key
    task: GraphNode
    inputs: tuple[Key, ...]

    def run(self, values: Mapping[Key, Any]) -> Any:
        """Return the result, from the value of each input; raises what the task raises, KeyError if one is missing."""
        return self.task({key: values[key] for key in self.inputs})


def split_final(graph: MaterialisedGraph) -> tuple[MaterialisedGraph, dict[Key, Assembly]]:
    """Take the final tasks out of a graph: return the rest, which wants their inputs instead, and those tasks by key.

    A final task with one input stays (what it puts together lies on one worker anyway), and one that others need.
    """
    assemblies = {key: _assembly(key, graph.tasks[key]) for key in graph.finals}
    assemblies = {key: each for key, each in assemblies.items() if len(each.inputs) > 1}
    if not assemblies:
        return graph, {}
    used = {dep for key, node in graph.tasks.items() for dep in node.dependencies}
    assemblies = {key: each for key, each in assemblies.items() if key not in used}
    wanted = (graph.wanted - assemblies.keys()).union(*(each.inputs for each in assemblies.values()))
    tasks = {key: node for key, node in graph.tasks.items() if key not in assemblies}
    return replace(graph, wanted=wanted).restricted(tasks), assemblies


def _assembly(key: Key, task: GraphNode) -> Assembly:
    return Assembly(key, task, tuple(sorted(task.dependencies, key=str)))
