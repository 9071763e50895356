"""From a materialised graph, or from calls, to blocks with payloads that are ready to send. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dask.utils import key_split
from distributed.protocol import to_serialize
from distributed.protocol.serialize import Serialized, serialize
from distributed.utils import nbytes

from daskfed.client.bundling import Bundling
from daskfed.client.calls import Calls
from daskfed.client.constraints import annotations_of
from daskfed.client.cutting import Piece, cut, uncut
from daskfed.client.graphs import BlockExpr, MaterialisedGraph, block_payload
from daskfed.client.lanes import payload_for_lanes
from daskfed.client.versions import PYTHON
from daskfed.config import NEVER
from daskfed.messages import BlockKind, BlockSpec, Constraint, Key, encode
from daskfed.site.bundles import Together

MOST_TOGETHER = 8  # blocks of calls in one message
LABEL_PREFIXES = 3  # prefixes of outputs that a block's label shows


@dataclass
class Submission:
    """Blocks of one graph and their payloads, in the same order."""

    blocks: list[BlockSpec] = field(default_factory=list)
    payloads: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return sum(sum(map(nbytes, frames_of(payload))) for payload in self.payloads)

    def messages(self, wanted: Iterable[Key]) -> Iterator[dict[str, Any]]:
        """Yield the messages that submit the blocks: one, or several of many calls, each of which stands for itself."""
        wanted = list(wanted)
        if wanted != [key for block in self.blocks for key in block.outputs]:
            yield self._message(self.blocks, self.payloads, wanted)
            return
        apart = all(block.kind is BlockKind.CALLS for block in self.blocks)
        most = MOST_TOGETHER if apart else max(1, len(self.blocks))
        for start in range(0, len(self.blocks), most):
            some = slice(start, start + most)
            yield self._message(self.blocks[some], self.payloads[some], None)

    def _message(
        self, blocks: Sequence[BlockSpec], payloads: Sequence[dict[str, Any]], wanted: list[Key] | None
    ) -> dict[str, Any]:
        """Return a message that submits blocks; None as what is wanted of them means all."""
        told = [encode(block) for block in blocks]
        return {"op": "fed-submit", "blocks": told, "payloads": list(payloads), "wanted": wanted}

    def add(
        self,
        block: BlockSpec,
        expr: Any,
        priorities: Mapping[Key, int] | None,
        actors: bool | Mapping[Key, Collection[Key]] = False,
    ) -> None:
        """Append a block; ``actors``: all outputs are, or output -> actors among the tasks that it takes.

        Raises TypeError where its tasks cannot be pickled.
        """
        self.blocks.append(block)
        payload = {"expr": pickled(expr), "priorities": dict(priorities) if priorities else None}
        self.payloads.append({**payload, "actors": actors} if actors else payload)


def plan_graph(
    graph: MaterialisedGraph,
    ids: Iterator[str],
    actors: Collection[Key] = (),
    bundling: Bundling | None = None,
    whole: bool = False,
) -> Submission:
    """Cut a graph and pickle each piece; ``actors`` are the keys of tasks that make actors.

    Without ``bundling`` no tasks run as one. A graph is not cut if it is to stay ``whole``, as there is but one site,
    and has no constraints. Raises TypeError where a task cannot be pickled.
    """
    submission = Submission()
    pieces = _pieces(graph, whole and not graph.constraints)
    bundles = _bundles_of(pieces, graph, actors, bundling)
    for piece, bundled in zip(pieces, bundles, strict=True):
        ntasks = len(piece.tasks) - sum(len(each.tasks) - 1 for each in bundled)
        stateful = not set(actors).isdisjoint(piece.outputs)
        spec = replace(_block_of(piece, next(ids)), stateful=stateful, ntasks=ntasks)
        priorities = _priorities(piece, bundled)
        payload = block_payload(graph, piece.tasks, bundled)
        submission.add(spec, payload, priorities, _actors_behind(piece, actors))
    return submission


def _priorities(piece: Piece, bundled: Iterable[Together]) -> dict[Key, int]:
    """Return the priorities of what the scheduler has; a bundle has that of its first task."""
    found = dict(piece.priorities)
    for each in bundled:
        found[each.key] = min(found.pop(key) for key in each.tasks)
    return found


def _pieces(graph: MaterialisedGraph, whole: bool) -> list[Piece]:
    return uncut(graph.tasks, graph.wanted) if whole else cut(graph.tasks, graph.wanted, graph.constraints, graph.near)


def _bundles_of(
    pieces: Sequence[Piece], graph: MaterialisedGraph, actors: Collection[Key], bundling: Bundling | None
) -> list[list[Together]]:
    """Return the bundles of each piece; a piece with actors has none, since each of them is named to its site."""
    if bundling is None:
        return [[] for _ in pieces]
    found = bundling.bundles(graph, [(piece.tasks, piece.outputs) for piece in pieces])
    plain = [bool(actors) and not piece.tasks.keys().isdisjoint(actors) for piece in pieces]
    return [[] if alone else each for alone, each in zip(plain, found, strict=True)]


def _actors_behind(piece: Piece, actors: Collection[Key]) -> dict[Key, list[Key]]:
    """Return output -> actors among the tasks of the piece that it takes, itself included, where there are any."""
    if not actors or piece.tasks.keys().isdisjoint(actors):
        return {}
    found = {}
    for output in piece.outputs:
        stack, seen = [output], {output}
        while stack:
            needs = (need for need in piece.tasks[stack.pop()].dependencies if need in piece.tasks)
            stack += (new := set(needs) - seen)
            seen |= new
        found[output] = [key for key in piece.tasks if key in seen and key in actors]
    return {output: behind for output, behind in found.items() if behind}


def _block_of(piece: Piece, name: str) -> BlockSpec:
    counts = Counter(map(key_split, piece.tasks))
    return BlockSpec(
        id=name,
        client="",
        owner="",
        kind=BlockKind.GRAPH,
        inputs=piece.inputs,
        outputs=piece.outputs,
        ntasks=len(piece.tasks),
        prefixes=tuple(counts.items()),
        constraint=replace(piece.constraint, python=PYTHON),
        rank=piece.rank,
        near=piece.near,
        label=label_of(piece.outputs),
    )


Batches = Iterable[tuple[Calls, Constraint, tuple[str, ...]]]
"""Calls, what constrains them, and the sites that they are near."""


def plan_calls(
    batches: Batches, annotations: Mapping[str, Any], ids: Iterator[str], actors: bool = False, lanes: str = NEVER
) -> Submission:
    """Make a block of each batch of calls, with its constraint, and near the sites that are named.

    ``annotations`` are given to every call; ``actors``: they make actors. ``lanes`` says whether calls go down them.
    """
    submission = Submission()
    for each, constraint, near in batches:
        makes_actors = actors and not each.is_value
        spec = _block_of_calls(each, constraint, near, next(ids), makes_actors)
        told = {**annotations, **annotations_of(constraint)}
        payload = None if makes_actors else payload_for_lanes(each, told, lanes)
        if payload is not None:
            submission.blocks.append(spec)
            submission.payloads.append(payload)
        else:
            submission.add(spec, annotated(each, told), None, makes_actors)
    return submission


def plan_lanes(batches: Batches, annotations: Mapping[str, Any], ids: Iterator[str], lanes: str) -> Submission | None:
    """Make a block of each batch of calls, as :func:`plan_calls`, if all of them may go down lanes; else None."""
    submission = Submission()
    for each, constraint, near in batches:
        payload = payload_for_lanes(each, {**annotations, **annotations_of(constraint)}, lanes)
        if payload is None:
            return None
        submission.blocks.append(_block_of_calls(each, constraint, near, next(ids)))
        submission.payloads.append(payload)
    return submission


def _block_of_calls(
    calls: Calls, constraint: Constraint, near: tuple[str, ...], name: str, stateful: bool = False
) -> BlockSpec:
    return BlockSpec(
        id=name,
        client="",
        owner="",
        kind=BlockKind.CALLS,
        inputs=tuple(calls.needs),
        outputs=tuple(calls.keys),
        ntasks=len(calls.keys),
        prefixes=((key_split(calls.keys[0]), len(calls.keys)),),
        constraint=replace(constraint, python=PYTHON),
        near=near,
        label=label_of(calls.keys),
        stateful=stateful,
        uses=calls.places(tuple(calls.needs)),
    )


def annotated(calls: Calls, annotations: Mapping[str, Any]) -> Any:
    """Return the expression of calls, with annotations for all of them if there are any."""
    if not annotations:
        return calls.expr
    tasks = dict(calls.expr.__dask_graph__())
    return BlockExpr.of(tasks, {name: dict.fromkeys(tasks, value) for name, value in annotations.items()})


def label_of(keys: Iterable[Key]) -> str:
    """Return what a person would call a block with these outputs."""
    names = list(dict.fromkeys(map(key_split, keys)))
    return ", ".join(names[:LABEL_PREFIXES]) + (", …" if len(names) > LABEL_PREFIXES else "")


def pickled(expr: Any) -> Serialized:
    """Return an expression as opaque frames; raises TypeError where it cannot be pickled."""
    return Serialized(*serialize(to_serialize(expr), on_error="raise"))


def frames_of(payload: Mapping[str, Any]) -> Collection[Any]:
    """Return the frames of what a payload runs."""
    return payload["calls" if "calls" in payload else "expr"].frames  # type: ignore[no-any-return]
