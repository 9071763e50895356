"""Cutting a graph into pieces that are placed as one.

    graph --contract--> nodes --grow, stage by stage--> pieces of nodes --assemble--> list[Piece]

:mod:`daskfed.client.contraction` decides what is never divided, :mod:`daskfed.client.staging` what goes together; here
are the entry and the exit. Everything is a pure function of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from dask.order import order

from daskfed.client.contraction import contract, copies
from daskfed.client.packing import Limits
from daskfed.client.staging import Stages
from daskfed.dask_private import GraphNode
from daskfed.messages import Constraint, Key


@dataclass(frozen=True, slots=True)
class Piece:
    """One block of a graph, before it gets an id."""

    tasks: dict[Key, GraphNode]  # in dask's order; with its own copies of shared sources
    inputs: tuple[Key, ...]  # keys that it needs from elsewhere: outputs of other pieces, or keys known outside
    outputs: tuple[Key, ...]  # keys that the client wants or other pieces need
    constraint: Constraint  # where all of its tasks may run; retries: the most that one of them has
    stage: int  # its inputs come from pieces of lower stages
    rank: int  # order in which the client would like pieces to run: the lowest of dask's order
    priorities: dict[Key, int]  # place of each task in dask's order of the whole graph
    near: tuple[str, ...] = ()  # sites that most of its data is bound to, or goes to: a hint, not a constraint


def cut(
    graph: Mapping[Key, GraphNode],
    wanted: Collection[Key],
    constraints: Mapping[Key, Constraint] | None = None,
    near: Mapping[Key, tuple[str, ...]] | None = None,
    *,
    slabs: int = 16,
    cap: int = 1000,
    rank: Mapping[Key, int] | None = None,
) -> list[Piece]:
    """Return the pieces of ``graph``, those of lower stages first.

    Every key is in exactly one piece, apart from shared sources, of which each piece that needs them has a copy.

    ``graph`` is culled; keys that it needs but does not hold are known outside. ``wanted`` are the keys that the
    client wants. ``constraints`` holds those of keys that have one; for a key known outside, the sites where it is.
    ``near`` are the sites that have what tasks read, of those that are not bound.
    ``slabs`` is into how many pieces a wide graph falls at least, if it has as many roots; ``cap`` is the most tasks
    in one piece, but for a P2P shuffle, which stays whole. ``rank`` is dask's order of the graph, if it is known.
    Raises ConfigurationError where a P2P shuffle is bound to different places, ValueError where ``slabs`` or ``cap``
    is not positive, and RuntimeError where the graph has a cycle.
    """
    if slabs < 1 or cap < 1:
        raise ValueError(f"slabs and cap must be positive, not {slabs} and {cap}")
    graph = _without_futures(graph)
    if not graph:
        return []
    ranks = _order(graph) if rank is None else rank
    constraints = constraints or {}
    wanted_here = set(wanted)
    nodes = contract(graph, ranks, constraints, wanted_here & constraints.keys(), cap, near or {})
    if len(nodes.shared) <= copies(cap):
        cap -= len(nodes.shared)
    stages = Stages(nodes, Limits.of(nodes, slabs, cap))
    assembly = _Assembly(graph, wanted_here, constraints, ranks, stages)
    pieces = map(assembly.piece, stages.grow())
    return assembly.with_outputs(sorted(pieces, key=lambda piece: (piece.stage, piece.rank)))


def uncut(graph: Mapping[Key, GraphNode], wanted: Collection[Key]) -> list[Piece]:
    """Return a graph without constraints as one piece, as :func:`cut` would if it might be as large; none of nothing.

    Raises RuntimeError where the graph has a cycle.
    """
    if not (graph := _without_futures(graph)):
        return []
    ranks = _order(graph)
    tasks = {key: graph[key] for key in sorted(graph, key=ranks.__getitem__)}
    inputs = sorted({need for node in tasks.values() for need in node.dependencies}.difference(tasks), key=str)
    asked = set(wanted)
    outputs = tuple(key for key in tasks if key in asked)
    return [Piece(tasks, tuple(inputs), outputs, Constraint(), 0, 0, dict(ranks))]


def _without_futures(graph: Mapping[Key, GraphNode]) -> Mapping[Key, GraphNode]:
    """Return a graph without keys that stand for themselves: such a one is a future, and its result known outside."""
    return {key: node for key, node in graph.items() if key not in node.dependencies}


def _order(graph: Mapping[Key, GraphNode]) -> Mapping[Key, int]:
    return cast("Mapping[Key, int]", order(cast(Any, graph)))


class _Assembly:
    """Turns lists of nodes into pieces."""

    def __init__(
        self,
        graph: Mapping[Key, GraphNode],
        wanted: set[Key],
        constraints: Mapping[Key, Constraint],
        rank: Mapping[Key, int],
        stages: Stages,
    ) -> None:
        self.graph = graph
        self.constraints = constraints
        self.rank = rank
        self.stages = stages
        self.asked = wanted  # keys that the client or a piece needs, and that no piece gives out yet

    def piece(self, members: list[int]) -> Piece:
        """Return the piece of these nodes, for now without outputs."""
        nodes = self.stages.nodes
        own = [key for node in members for key in nodes.members[node]]
        needs = {need for key in own for need in self.graph[key].dependencies}.difference(own)
        copies = needs & nodes.shared
        keys = sorted([*own, *copies], key=self.rank.__getitem__)
        inputs = sorted(needs - copies, key=self._order)
        self.asked.update(inputs)
        return Piece(
            tasks={key: self.graph[key] for key in keys},
            inputs=tuple(inputs),
            outputs=(),
            constraint=self._constraint(members, own),
            stage=self.stages.stage[members[0]],
            rank=self.rank[keys[0]],
            priorities={key: self.rank[key] for key in keys},
            near=self.stages.nodes.placements.sites(self.stages.area[members[0]]),
        )

    def _order(self, key: Key) -> tuple[int, str]:
        return (self.rank[key], "") if key in self.rank else (len(self.rank), str(key))

    def _constraint(self, members: list[int], keys: list[Key]) -> Constraint:
        placement = self.stages.nodes.placements.constraints[self.stages.placement(members)]
        retries = max((self.constraints[key].retries for key in keys if key in self.constraints), default=0)
        return replace(placement, retries=retries)

    def with_outputs(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces with their outputs; a wanted key with several copies is an output of the first."""
        done = []
        for piece in pieces:
            outputs = tuple(key for key in piece.tasks if key in self.asked)
            self.asked.difference_update(outputs)
            done.append(replace(piece, outputs=outputs))
        return done
