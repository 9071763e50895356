"""A graph as numbered nodes: the first step of cutting.

A *node* is what cutting never divides: one task, or all tasks of a P2P shuffle (transfers, barrier, unpacks), which
only work together in one cluster. Nodes are numbered in dask's order. *Shared sources* (small values that lie in the
graph itself and that many tasks use: xarray's opened store, a constant) are no nodes: every piece gets its own copy.
Only plain values are copied. A task without inputs may read a clock or a file that changes, and two copies of it
would then disagree within one result.

A *placement* is a constraint without its retries; an *area* is the sites or workers that a placement names, that have
what a task reads, or where a key from outside is known to be. Both are numbers here, 0 stands for "no constraint" and
"anywhere".
"""

from __future__ import annotations

import operator
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from dask.sizeof import sizeof

from daskfed.dask_private import Alias, DataNode, GraphNode, P2PBarrierTask, Task
from daskfed.errors import ConfigurationError
from daskfed.messages import Constraint, Key

MANY_USERS = 16  # from how many dependents on a source counts as shared by many
LARGE_BYTES = 65536  # a source that many share is copied up to this pickled size ...
TINY_BYTES = 4096  # ... and one that a few share up to this: about what the hub spends on a key that crosses

FREE = 0  # the placement of tasks without a constraint
ANYWHERE = 0  # the area of tasks whose data may be at any site


class Placements:
    """Numbers for the different placements of a graph."""

    def __init__(self) -> None:
        self.constraints: list[Constraint] = []
        self.areas: list[int] = []  # placement -> area
        self._numbers: dict[Constraint, int] = {}
        self._seen: dict[int, tuple[Constraint, int]] = {}  # by id, for hashing them is slow; keeps them alive
        self._area_numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {((), ()): ANYWHERE}
        self.number(Constraint())

    def number(self, constraint: Constraint) -> int:
        """Return the number of this placement; constraints that differ only in retries share one."""
        known = self._seen.get(id(constraint))
        if known is None:
            known = self._seen[id(constraint)] = constraint, self._intern(replace(constraint, retries=0))
        return known[1]

    def _intern(self, placement: Constraint) -> int:
        number = self._numbers.setdefault(placement, len(self.constraints))
        if number == len(self.constraints):
            self.constraints.append(placement)
            self.areas.append(self.area_of(placement.sites, placement.workers))
        return number

    def area_of(self, sites: tuple[str, ...], workers: tuple[str, ...] = ()) -> int:
        """Return the number of the area of these sites or workers."""
        return self._area_numbers.setdefault((sites, workers), len(self._area_numbers))

    def sites(self, area: int) -> tuple[str, ...]:
        """Return the sites that an area stands for."""
        return list(self._area_numbers)[area][0]

    def is_free(self, number: int) -> bool:
        """Whether tasks of this placement may run at every site, in every environment and on every worker."""
        one = self.constraints[number]
        return not (one.sites or one.environment or one.workers or one.resources)

    def admits(self, placement: int, task: int) -> bool:
        """Whether a task of placement ``task`` may run in a piece of ``placement``.

        It may where they are equal, or where the task is free and only inherits a narrower place. Priorities must
        agree, because the hub orders pieces by them.
        """
        if placement == task:
            return True
        return self.is_free(task) and self.constraints[placement].priority == self.constraints[task].priority


@dataclass(slots=True)
class Nodes:
    """The nodes of a graph, numbered in dask's order; all lists have one entry per node."""

    members: list[list[Key]]  # the node's tasks, in dask's order
    size: list[int]  # number of its tasks; where copies of sources are many, they count as well
    inputs: list[list[int]]  # nodes whose results it needs, ascending
    users: list[list[int]]  # nodes that need its results
    is_part: list[bool]  # it only takes a part of its one input; told only where there are constraints
    placement: list[int]  # number of its placement
    area: list[int]  # number of the area that it is bound to, or where its inputs from outside are
    placements: Placements
    shared: set[Key]  # sources that are copied into every piece which needs them


def contract(
    graph: Mapping[Key, GraphNode],
    rank: Mapping[Key, int],
    constraints: Mapping[Key, Constraint],
    keep: Set[Key],
    cap: int,
    near: Mapping[Key, tuple[str, ...]] | None = None,
) -> Nodes:
    """Return the nodes of ``graph``.

    ``rank`` is dask's order of all its keys, ``keep`` holds keys that must not be copied, ``cap`` is the most tasks
    that a piece may have. ``near`` are the sites that have what tasks read, of those that are not bound.
    Raises ConfigurationError where the tasks of one P2P shuffle are bound to different places.
    """
    shared = shared_sources(graph, keep, copies(cap))
    keys = [key for key in sorted(graph, key=rank.__getitem__) if key not in shared]
    members, index = _number(keys, shuffle_groups(graph))
    inputs = _inputs(graph, members, index)
    if len(members) != len(keys):
        members, index = _without_cycles(members, inputs)
        inputs = _inputs(graph, members, index)
    size = [len(keys) for keys in members]
    if len(shared) > copies(cap):
        size = [sum(1 + len(shared & graph[key].dependencies) for key in keys) for keys in members]
    whole, free, anywhere = [False] * len(members), [FREE] * len(members), [ANYWHERE] * len(members)
    nodes = Nodes(members, size, inputs, users_of(inputs), whole, free, anywhere, Placements(), shared)
    if constraints or near:
        _bind(nodes, graph, constraints, near or {})
    return nodes


def copies(cap: int) -> int:
    """Return how many copies of sources may go into a piece of ``cap`` tasks without being counted one by one."""
    return cap // 8


def _number(keys: Iterable[Key], groups: Mapping[Key, Key]) -> tuple[list[list[Key]], dict[Key, int]]:
    if not groups:
        alone = [[key] for key in keys]
        return alone, {one[0]: number for number, one in enumerate(alone)}
    members: list[list[Key]] = []
    index: dict[Key, int] = {}
    of_group: dict[Key, int] = {}
    for key in keys:
        number = of_group.setdefault(groups.get(key, key), len(members))
        if number == len(members):
            members.append([])
        members[number].append(key)
        index[key] = number
    return members, index


def _inputs(graph: Mapping[Key, GraphNode], members: list[list[Key]], index: Mapping[Key, int]) -> list[list[int]]:
    # Sorted, because sets of keys have no stable order.
    if len(members) == len(index):
        return [sorted([index[need] for need in graph[keys[0]].dependencies if need in index]) for keys in members]
    needs = ({index[need] for key in keys for need in graph[key].dependencies if need in index} for keys in members)
    return [sorted(found - {number}) for number, found in enumerate(needs)]


def users_of(inputs: list[list[int]]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in inputs]
    for number, needs in enumerate(inputs):
        for need in needs:
            users[need].append(number)
    return users


# -- shared sources --------------------------------------------------------------------------------------------------


def shared_sources(graph: Mapping[Key, GraphNode], keep: Set[Key], most: int) -> set[Key]:
    """Return the keys of the values in ``graph`` that are cheaper to copy than to move, but for those to ``keep``.

    A task that needs more than ``most`` of them gets none copied, so that no piece is more copies than tasks. Where a
    value is bound to does not matter: it comes with the graph, from the client.
    """
    values = {key: node for key, node in graph.items() if isinstance(node, DataNode) and key not in keep}
    if not values:
        return set()
    users = Counter(need for node in graph.values() for need in node.dependencies if need in values)
    shared = {key for key, node in values.items() if users[key] > 1 and _worth_copying(node.value, users[key])}
    for node in graph.values():
        if len(node.dependencies) > most and len(shared & node.dependencies) > most:
            shared -= node.dependencies
    return shared


def _worth_copying(value: object, users: int) -> bool:
    limit = LARGE_BYTES if users > MANY_USERS else TINY_BYTES
    try:
        return sizeof(value) <= limit and _Meter(limit).fits(value)
    except Exception:  # user code: what cannot be measured is not copied
        return False


class _Meter:
    """A file that throws away what a pickler writes and stops it after so many bytes."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def fits(self, value: object) -> bool:
        try:
            pickle.Pickler(self, protocol=5, buffer_callback=self.write).dump(value)
        except _Full:
            return False
        return True

    def write(self, data: Any) -> None:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise _Full


class _Full(Exception):
    pass


# -- P2P shuffles ----------------------------------------------------------------------------------------------------


class _Groups:
    """Union-find over keys."""

    def __init__(self) -> None:
        self.leader: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        leader = self.leader
        while (above := leader.setdefault(item, item)) != item:
            leader[item] = item = leader[above]
        return item

    def join(self, one: Any, other: Any) -> None:
        self.leader[self.find(other)] = self.find(one)


def shuffle_groups(graph: Mapping[Key, GraphNode]) -> dict[Key, Key]:
    """Return, for each task of a P2P shuffle, one key that stands for the shuffle.

    Shuffles that share a task (both sides of a hash join) are one. Fusion may leave an Alias between a transfer and
    its barrier, so aliases are followed.
    """
    barriers = {key for key, node in graph.items() if isinstance(node, P2PBarrierTask)}
    if not barriers:
        return {}
    groups = _Groups()
    for barrier in barriers:
        for transfer in _behind_aliases(graph, graph[barrier].dependencies):
            groups.join(barrier, transfer)
    for key, node in graph.items():
        for barrier in barriers.intersection(node.dependencies):
            groups.join(barrier, key)
    return {key: groups.find(key) for key in list(groups.leader)}


def _behind_aliases(graph: Mapping[Key, GraphNode], keys: Iterable[Key]) -> Iterator[Key]:
    for key in keys:
        while key in graph:
            yield key
            node = graph[key]
            if not isinstance(node, Alias):
                break
            key = node.target


def _without_cycles(members: list[list[Key]], inputs: list[list[int]]) -> tuple[list[list[Key]], dict[Key, int]]:
    """Join nodes that contraction has put on a cycle (a path that leaves a shuffle and comes back to it).

    Everything on a cycle or between two cycles becomes one node: coarser than need be, in a case hardly ever met.
    """
    users = users_of(inputs)
    on_cycle = set(range(len(inputs))).difference(ready_order(inputs, users))
    on_cycle.difference_update(ready_order(users, inputs))
    groups = {key: min(on_cycle) for number in on_cycle for key in members[number]}
    keys = [key for one in members for key in one]
    leaders = {key: members[first][0] for key, first in groups.items()}
    leaders |= {key: one[0] for number, one in enumerate(members) if number not in on_cycle for key in one}
    return _number(keys, leaders)


def ready_order(inputs: list[list[int]], users: list[list[int]]) -> list[int]:
    """Return the nodes in an order in which inputs come first; what is on a cycle or needs it is left out."""
    missing = [len(needs) for needs in inputs]
    ready = [number for number, count in enumerate(missing) if not count]
    for number in ready:
        for user in users[number]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return ready


# -- constraints -----------------------------------------------------------------------------------------------------


def _bind(
    nodes: Nodes,
    graph: Mapping[Key, GraphNode],
    constraints: Mapping[Key, Constraint],
    near: Mapping[Key, tuple[str, ...]],
) -> None:
    """Set what only matters where there are constraints: placements, areas, and which nodes take parts."""
    placements = nodes.placements
    for number, keys in enumerate(nodes.members):
        if len(keys) == 1:
            own = constraints.get(keys[0])
            placement = FREE if own is None else placements.number(own)
            nodes.is_part[number] = len(nodes.inputs[number]) == 1 and _takes_part(graph[keys[0]])
        else:
            placement = _common_placement(placements, keys, constraints)
        nodes.placement[number] = placement
        area = placements.areas[placement] or placements.area_of(near.get(keys[0], ()))
        nodes.area[number] = area or _area_outside(placements, keys, graph, constraints)


def _takes_part(node: GraphNode) -> bool:
    return isinstance(node, Task) and node.func is operator.getitem


def _common_placement(placements: Placements, keys: list[Key], constraints: Mapping[Key, Constraint]) -> int:
    found = {placements.number(constraints[key]) for key in keys if key in constraints}
    bound = {number for number in found if not placements.is_free(number)}
    if len(bound) > 1:
        places = " and ".join(sorted(str(placements.constraints[number]) for number in bound))
        raise ConfigurationError(
            f"the P2P shuffle of {keys[0]!r} must run as a whole, but its tasks are bound to {places}; "
            "use the task-based method for this shuffle or rechunk"
        )
    return max(bound or found or {FREE}, key=lambda number: placements.constraints[number].priority)


def _area_outside(
    placements: Placements, keys: list[Key], graph: Mapping[Key, GraphNode], constraints: Mapping[Key, Constraint]
) -> int:
    """Return the area that holds most of the node's inputs from outside, as far as ``constraints`` tells."""
    areas: Counter[int] = Counter()
    for key in keys:
        for need in graph[key].dependencies:
            if need not in graph and need in constraints:
                areas[placements.areas[placements.number(constraints[need])]] += 1
    del areas[ANYWHERE]
    return min(areas, key=lambda area: (-areas[area], area), default=ANYWHERE)
