"""Bundles: which tiny tasks of a block run as one task of a site's scheduler.

A scheduler and a worker spend about a millisecond on a task, however short that is. A *bundle* is some tasks of one
block, alike in their constraint and their annotations. They are found in two steps:

1. Tasks of which only the last is needed by others: a chain, a tree with its leaves, a diamond (:class:`_Growth`). The
   bundle has the key of that task. As nothing else leaves it, no circle is closed.
2. Several such, or single tasks, that are as far from the start of the block, so that none needs another one
   (:func:`level_bundles`). Such a bundle has a key of its own, and those who need its results, all in bundles too or
   timed, take them from it. What others need, in other blocks or the user, is not in one.

Everything here is a pure function of the tasks, and of what is known of the prefixes of their keys.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dask.utils import key_split

from daskfed.client.constraints import EMPTY
from daskfed.client.contraction import shuffle_groups
from daskfed.client.graphs import MaterialisedGraph
from daskfed.dask_private import Alias, DataNode, GraphNode, Task, sizeof
from daskfed.messages import Key
from daskfed.site.bundles import Together

SHORT_S = 0.005  # what takes longer would not be done sooner in a bundle
LEAST_S = 0.00002  # that each task is reckoned with
LONGEST_S = 0.020  # of a bundle, which holds a thread, and must run anew as a whole
SHORTEST_S = 0.002  # bundles may become so long however small the graph is: about what two tasks cost
PER_THREAD = 4  # bundles of the longest kind that a graph falls into, at least, for each thread that there is
APART = 4  # where a task cannot take in all its inputs, it takes in some, up to this part of the longest bundle
MOST_TASKS = 256  # in a bundle
MOST_FORCED = 32  # in a bundle, where it does not matter how long tasks take
CHEAP_BYTES = 256 * 1024  # that a worker fetches in about the time that a task costs
UNKNOWN_BYTES = 2**40  # of a result of which nothing is known


class Learned(NamedTuple):
    """What is known of the tasks of one prefix."""

    seconds: float  # of one thread, that one takes
    nbytes: float  # of its result

    @classmethod
    def told(cls, seconds: float, nbytes: int) -> Learned:
        """Return what the hub said, which says less than nothing of a size that it does not know."""
        return cls(seconds, UNKNOWN_BYTES if nbytes < 0 else nbytes)


class Limits(NamedTuple):
    """How large bundles may become."""

    seconds: float
    tasks: int
    nbytes: float  # that may have to be brought to a bundle's worker for the sake of one task
    side: int  # bundles that are to run side by side, if there are as many tasks


class Fact(NamedTuple):
    """What matters of a task that may go into a bundle."""

    kind: Hashable  # what all tasks of a bundle have in common
    seconds: float


@dataclass(frozen=True)
class Bundling:
    """Bundles tasks of which it is known that they are short, or, with ``always``, whatever may be bundled."""

    learned: Mapping[str, Learned] = field(default_factory=dict)  # by prefix
    threads: int = 1  # that the federation has
    always: bool = False

    @property
    def is_useful(self) -> bool:
        """Whether anything is bundled at all."""
        return self.always or any(known.seconds <= SHORT_S for known in self.learned.values())

    def bundles(
        self, graph: MaterialisedGraph, pieces: Sequence[tuple[Mapping[Key, GraphNode], Collection[Key]]]
    ) -> list[list[Together]]:
        """Return the bundles of each piece of a graph: of its tasks, inputs first, and its outputs."""
        if not self.is_useful:
            return [[] for _ in pieces]
        facts = _Facts(self, graph)
        known = [facts.of(tasks) for tasks, _ in pieces]
        limits = self._limits(sum(fact.seconds for each in known for fact in each.values()))
        each_piece = zip(pieces, known, strict=True)
        return [bundled(tasks, outputs, found, facts.nbytes, limits) for (tasks, outputs), found in each_piece]

    def _limits(self, total_s: float) -> Limits:
        share_s = total_s / (PER_THREAD * max(1, self.threads))
        goal_s = min(LONGEST_S, max(SHORTEST_S, share_s))
        side = PER_THREAD * max(1, self.threads)
        if self.always:
            return Limits(goal_s, MOST_FORCED, float("inf"), side)
        return Limits(goal_s, MOST_TASKS, CHEAP_BYTES, side)


class _Facts:
    """Finds out which tasks of a graph may go into bundles."""

    def __init__(self, bundling: Bundling, graph: MaterialisedGraph) -> None:
        self.bundling = bundling
        self.graph = graph
        self.never = shuffle_groups(graph.tasks).keys()
        self._coroutines: dict[int, bool] = {}  # by the id of a function, which the graph keeps alive
        self._plain = not (graph.constraints or graph.annotations)

    def of(self, tasks: Mapping[Key, GraphNode]) -> dict[Key, Fact]:
        """Return the facts of those of ``tasks`` that may go into a bundle."""
        found = {}
        for key, node in tasks.items():
            if key not in self.never and (seconds := self._seconds(key, node)) is not None:
                found[key] = Fact(None if self._plain else self._kind(key), seconds)
        return found

    def _seconds(self, key: Key, node: GraphNode) -> float | None:
        """Return how long a task probably takes; None of one that must not, or need not, go into a bundle."""
        if isinstance(node, DataNode | Alias):
            return 0.0
        if not isinstance(node, Task) or node.block_fusion or self._is_coroutine(node):
            return None
        known = self.bundling.learned.get(key_split(key))
        if self.bundling.always:
            return LEAST_S
        return max(LEAST_S, known.seconds) if known is not None and known.seconds <= SHORT_S else None

    def _is_coroutine(self, node: Task) -> bool:
        name = id(node.func)
        if name not in self._coroutines:
            self._coroutines[name] = bool(node.is_coro)
        return self._coroutines[name]

    def _kind(self, key: Key) -> Hashable:
        notes = ((name, values[key]) for name, values in self.graph.annotations.items() if key in values)
        return self.graph.constraints.get(key, EMPTY), tuple((name, type(value), repr(value)) for name, value in notes)

    def nbytes(self, key: Key) -> float:
        """Return how large a result probably is."""
        node = self.graph.tasks.get(key)
        if isinstance(node, DataNode):
            return float(sizeof(node.value))
        known = self.bundling.learned.get(key_split(key))
        return UNKNOWN_BYTES if known is None else known.nbytes


def bundled(
    tasks: Mapping[Key, GraphNode],
    outputs: Collection[Key],
    facts: Mapping[Key, Fact],
    nbytes: Callable[[Key], float],
    limits: Limits,
) -> list[Together]:
    """Return the bundles of one piece, each with its tasks in the order of ``tasks``, where inputs come first.

    Each task takes in what only it needs, and what then only both need, as far as the limits allow. ``outputs`` are
    needed elsewhere; tasks without ``facts`` stay alone.
    """
    growth = _Growth(tasks, outputs, facts, nbytes, limits)
    for key in tasks:
        if key in facts:
            growth.add(key)
    place = {key: number for number, key in enumerate(tasks)}
    for part in growth.parts.values():
        part.tasks.sort(key=place.__getitem__)
    beside = level_bundles(growth, limits)
    taken = {key for each in beside for key in each.results}
    alone = (tuple(part.tasks) for key, part in growth.parts.items() if len(part.tasks) > 1 and key not in taken)
    return [*(Together(members[-1], members) for members in alone), *beside]


@dataclass(slots=True)
class _Part:
    """Tasks that go together so far."""

    tasks: list[Key]
    seconds: float
    needs: dict[Key, int]  # what it needs from elsewhere -> how many of its tasks need that


class _Growth:
    """The parts that the tasks of one piece form so far, each under the key of its last task."""

    def __init__(
        self,
        tasks: Mapping[Key, GraphNode],
        outputs: Collection[Key],
        facts: Mapping[Key, Fact],
        nbytes: Callable[[Key], float],
        limits: Limits,
    ) -> None:
        self.parts: dict[Key, _Part] = {}
        self.tasks = tasks
        self.outputs = frozenset(outputs)
        self.facts = facts
        self.nbytes = nbytes
        self._limits = limits
        self._users = Counter(need for node in tasks.values() for need in node.dependencies)

    def add(self, key: Key) -> None:
        """Begin a part with a task, and have it take in other parts."""
        part = _Part([key], self.facts[key].seconds, dict.fromkeys(self.tasks[key].dependencies, 1))
        while (found := self._only_for(key, part)) and self._take(part, found):
            pass
        self.parts[key] = part

    def _only_for(self, key: Key, part: _Part) -> list[Key]:
        """Return those of its needs that nobody else has, and that are of its kind."""
        kind, users = self.facts[key].kind, self._users
        return [
            need
            for need, count in part.needs.items()
            if need in self.parts
            and count == users[need]
            and need not in self.outputs
            and self.facts[need].kind == kind
        ]

    def _take(self, part: _Part, found: list[Key]) -> bool:
        """Take in those of ``found`` that fit, the shortest first; return whether there was any."""
        parts, before = self.parts, len(part.tasks)
        limit_s = self._limits.seconds
        if part.seconds + sum(parts[key].seconds for key in found) > limit_s:
            limit_s /= APART
        for key in sorted(found, key=lambda key: parts[key].seconds):
            other = parts[key]
            if part.seconds + other.seconds > limit_s:
                break
            if len(part.tasks) + len(other.tasks) <= self._limits.tasks and self._is_near(part, key, other):
                self._join(part, key)
        return len(part.tasks) > before

    def _is_near(self, part: _Part, key: Key, other: _Part) -> bool:
        """Whether little need be moved: what two parts need lies at two workers, and the one fetches it from the other.

        Apart, only the result of the one would be moved.
        """
        if self._limits.nbytes == float("inf"):
            return True
        mine = (need for need in part.needs if need != key and need not in other.needs)
        if not (theirs := [need for need in other.needs if need not in part.needs]):
            return True
        moved = min(self._sum(mine), self._sum(theirs))
        return moved <= self._limits.nbytes

    def _sum(self, keys: Iterable[Key]) -> float:
        return sum(map(self.nbytes, keys))

    def _join(self, part: _Part, key: Key) -> None:
        other = self.parts.pop(key)
        part.tasks += other.tasks
        part.seconds += other.seconds
        del part.needs[key]
        for need, count in other.needs.items():
            part.needs[need] = part.needs.get(need, 0) + count


def level_bundles(growth: _Growth, limits: Limits) -> list[Together]:
    """Return bundles of parts that do not need each other, whose results are small and needed by timed tasks only."""
    found = []
    for parts in _levels(growth).values():
        room = -(-len(parts) // limits.side)
        for keys in _batches(growth, parts, limits, room):
            tasks = tuple(task for key in keys for task in growth.parts[key].tasks)
            found.append(Together(_name(tasks), tasks, tuple(keys)))
    return found


def _levels(growth: _Growth) -> dict[tuple[int, Hashable], list[Key]]:
    """Return, by how far from the start they are, and by kind, the parts that may be with others in a bundle."""
    closed = set(growth.outputs)
    for key, node in growth.tasks.items():
        if key not in growth.facts:
            closed.update(node.dependencies)
    level: dict[Key, int] = {}  # of the last tasks of parts, and of other tasks
    levels: dict[tuple[int, Hashable], list[Key]] = {}
    inner = {key for last, part in growth.parts.items() for key in part.tasks if key != last}
    for key, node in growth.tasks.items():
        if key in inner:
            continue
        part = growth.parts.get(key)
        needs = node.dependencies if part is None else part.needs
        level[key] = 1 + max((level[need] for need in needs if need in level), default=0)
        if part is not None and key not in closed and not isinstance(node, DataNode | Alias):
            levels.setdefault((level[key], growth.facts[key].kind), []).append(key)
    return levels


def _batches(growth: _Growth, parts: Iterable[Key], limits: Limits, room: int) -> Iterator[list[Key]]:
    """Yield at most ``room`` of ``parts`` at a time, at least two, that keep to the limits."""
    batch: list[Key] = []
    seconds, tasks, nbytes = 0.0, 0, 0.0
    for key in parts:
        part = growth.parts[key]
        size = growth.nbytes(key) + sum(map(growth.nbytes, part.needs)) if limits.nbytes != float("inf") else 0.0
        more = seconds + part.seconds, tasks + len(part.tasks), nbytes + size
        if len(batch) >= room or more[0] > limits.seconds or more[1] > limits.tasks or more[2] > limits.nbytes:
            if len(batch) > 1:
                yield batch
            batch, more = [], (part.seconds, len(part.tasks), size)
        if more[2] <= limits.nbytes:
            batch.append(key)
            seconds, tasks, nbytes = more
        else:
            seconds, tasks, nbytes = 0.0, 0, 0.0
    if len(batch) > 1:
        yield batch


def _name(tasks: tuple[Key, ...]) -> str:
    """Return the key of a bundle of these tasks."""
    return f"{key_split(tasks[-1])}-bundle-{hashlib.sha1(repr(tasks).encode()).hexdigest()}"
