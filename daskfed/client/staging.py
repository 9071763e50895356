"""Growing pieces stage by stage: the heart of cutting.

Stage by stage, a *unit* opens at every node whose inputs all lie in lower stages. Then nodes follow as they become
ready: one whose inputs of this stage lie in one unit joins that unit; one that has inputs in several units joins them
into one, as long as the result stays small. So reductions, columns and neighbourhoods find themselves, and units end
where a graph would otherwise tie all of its data together. What cannot follow opens a unit in the next stage. At the
end of a stage its units are packed into pieces of even size, neighbours first.

Edges only go to higher stages, so pieces never wait for each other in a circle, and a path through the pieces is at
most as long as there are stages.

When a node does not follow:

* its placement differs from the unit's (a free node inherits a narrower one), or most of its data is in another area:
  a unit never mixes two areas;
* it is drawn to a lower piece: of ``x - x.mean()`` the subtraction stays with ``x``. An input draws with the weight
  1 / (number of its users), because what many use will travel anyway;
* it would tie together what only a *wide* input (one with very many users) has in common;
* the unit would grow too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from daskfed.client.areas import areas
from daskfed.client.contraction import ANYWHERE, Nodes

DRAWN = 2.0  # a lower piece draws a node away from its unit where it has this many times the weight
LOOSE = 1.25  # how much larger than its goal a piece may become, rather than dividing what belongs together
FEW_TIES = 8  # an input that ties no more nodes than this is never wide


class Limits(NamedTuple):
    """How large pieces should be, in tasks."""

    slabs: int  # into how many pieces a wide graph should fall, at least
    goal: int  # size of a piece where the whole graph is one stage
    least: int  # up to this size a unit costs no parallelism worth keeping
    unit: int  # largest unit that may cost parallelism
    cap: int  # largest piece, but for a P2P shuffle that is larger by itself

    @classmethod
    def of(cls, nodes: Nodes, slabs: int, cap: int) -> Limits:
        """Return the limits for this graph."""
        tasks = sum(nodes.size)
        goal = max(1, min(cap, -(-tasks // slabs)))
        return cls(max(slabs, -(-tasks // cap)), goal, max(1, goal // 8), min(cap, max(FEW_TIES, 2 * goal)), cap)

    def share(self, openers: int) -> int:
        """Return how many of a stage's openers one piece should have."""
        return max(1, -(-openers // self.slabs))


class Stages:
    """The pieces of a graph while they grow.

    After :meth:`grow`, ``stage`` and ``area`` hold the stage and the area of each node, and ``placement`` the placement
    of each piece, at the first node of the piece's list.
    """

    def __init__(self, nodes: Nodes, limits: Limits) -> None:
        count = len(nodes.inputs)
        self.nodes = nodes
        self.limits = limits
        self.stage = [-1] * count  # of a node; -1: has none yet
        self.area = areas(nodes)  # of a node: where most of its data is
        self._now = 0  # the stage that grows
        self._share = 1  # of the openers of this stage that a piece should have
        self._missing = [len(needs) for needs in nodes.inputs]  # inputs that have no stage yet
        self._weight = [1.0 / len(users) if users else 1.0 for users in nodes.users]
        self._wide = wide_nodes(nodes, limits)
        self._prelude = prelude(nodes, self._wide)
        self._many_areas = any(self.area)
        # Union-find over nodes. What follows is per unit, at the node that leads it.
        self._parent = list(range(count))
        self.size = list(nodes.size)
        self.openers = [0] * count
        self.placement = list(nodes.placement)
        self.anchor = [-1] * count  # leader of the lower piece that draws it most
        self.waits = [count] * count  # first node that would have joined it with other units
        self._ready: list[int] = []
        self._later: list[int] = []  # nodes that do not follow in this stage
        self._packed = False  # units of this stage are pieces now: they only grow

    # -- the order of things -----------------------------------------------------------------------------------------

    def grow(self) -> list[list[int]]:
        """Return the pieces, each as its nodes in dask's order."""
        roots = [node for node, needs in enumerate(self.nodes.inputs) if not needs]
        openers = [node for node in roots if node in self._prelude] if self._prelude else roots
        while openers:
            self._share = self.limits.share(len(openers))
            self._grow_units(openers)
            for piece in Packing(self, self._share if self._now == 0 else len(openers)).run(openers):
                self._unite(piece)
            self._grow_pieces()
            openers, self._later = sorted(self._later), []
            if self._prelude:
                openers = sorted(openers + [node for node in roots if node not in self._prelude])
                self._prelude = set()
            self._now += 1
        return self._pieces()

    def _grow_units(self, openers: list[int]) -> None:
        for node in openers:
            self.openers[node] = 1
            if needs := self.nodes.inputs[node]:
                self.anchor[node] = self._strongest(node, needs)[0]
            self._settle(node)
            self._follow()

    def _grow_pieces(self) -> None:
        """Try again those that could not follow: what they waited for may be in one piece now."""
        self._ready, self._later = sorted(self._later, reverse=True), []
        self._packed = True
        self._follow()
        self._packed = False

    def _follow(self) -> None:
        """Let nodes that are ready join units, until none is left."""
        ready, parent, size = self._ready, self._parent, self.size
        while ready:
            node = ready.pop()
            unit = self._unit_for(node)
            if unit is None:
                self._later.append(node)
            else:
                parent[node] = unit
                size[unit] += size[node]
                self._settle(node)

    def _settle(self, node: int) -> None:
        self.stage[node] = self._now
        missing = self._missing
        for user in reversed(self.nodes.users[node]):
            missing[user] -= 1
            if not missing[user]:
                self._ready.append(user)

    # -- which unit a node follows -----------------------------------------------------------------------------------

    def _unit_for(self, node: int) -> int | None:
        """Return the leader of the unit that this node is to join, or None where it must wait for the next stage."""
        if self._prelude and node not in self._prelude:
            return None
        needs, stage, now = self.nodes.inputs[node], self.stage, self._now
        here = [need for need in needs if stage[need] == now]
        if len(here) < len(needs) and self._is_drawn_down(node):
            return None
        units = sorted(set(map(self._find, here)))
        if not all(self._admits(unit, node) for unit in units):
            return None
        if len(units) == 1:
            return units[0] if self._has_room(units[0], node, here) else None
        if self._packed or (self._wide and not self._wide.isdisjoint(here)):
            return None
        return self._united(units, node)

    def _is_drawn_down(self, node: int) -> bool:
        needs, stage, now = self.nodes.inputs[node], self.stage, self._now
        here = sum(self._weight[need] for need in needs if stage[need] == now)
        return self._strongest(node, [need for need in needs if stage[need] != now])[1] > DRAWN * here

    def _strongest(self, node: int, needs: list[int]) -> tuple[int, float]:
        """Return the unit or piece with most of these inputs, by weight, and that weight; in the node's area if any."""
        if self._many_areas:
            needs = [need for need in needs if self.area[need] == self.area[node]] or needs
        pull: dict[int, float] = {}
        for need in needs:
            unit = self._find(need)
            pull[unit] = pull.get(unit, 0.0) + self._weight[need]
        return max(pull.items(), key=lambda item: (item[1], -item[0]))

    def _admits(self, unit: int, node: int) -> bool:
        if self.area[unit] != self.area[node]:
            return False
        own, theirs = self.nodes.placement[node], self.placement[unit]
        if own == theirs:
            return True
        if not self.nodes.placements.admits(theirs, own):
            return False
        return all(self.area[need] in (ANYWHERE, self.area[unit]) for need in self.nodes.inputs[node])

    def _has_room(self, unit: int, node: int, here: list[int]) -> bool:
        size = self.size[unit] + self.size[node]
        if size <= self.limits.unit:
            return True
        # The only user of all its inputs could not run beside them anyway.
        users = self.nodes.users
        return size <= self.limits.cap and all(len(users[need]) == 1 for need in here)

    def _united(self, units: list[int], node: int) -> int | None:
        """Join units that have an input of ``node``, where that leaves them small enough."""
        alike = len({self.placement[unit] for unit in units}) == 1
        size = sum(self.size[unit] for unit in units) + self.size[node]
        openers = sum(self.openers[unit] for unit in units)
        small = size <= self.limits.least or (size <= self.limits.unit and openers <= 2 * self._share)
        if alike and small:
            return self._unite(units)
        for unit in units:
            self.waits[unit] = min(self.waits[unit], node)
        return None

    def _find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def _unite(self, units: list[int]) -> int:
        leader, *others = units
        for unit in others:
            self._parent[unit] = leader
            self.size[leader] += self.size[unit]
            self.openers[leader] += self.openers[unit]
        return leader

    def units(self, openers: list[int]) -> list[int]:
        """Return the units that these nodes opened, in that order."""
        return list(dict.fromkeys(map(self._find, openers)))

    def _pieces(self) -> list[list[int]]:
        pieces: dict[int, list[int]] = {}
        for node in range(len(self.stage)):
            pieces.setdefault(self._find(node), []).append(node)
        return list(pieces.values())


class Packing:
    """Puts the units of one stage into batches that become pieces, of about equal size."""

    def __init__(self, stages: Stages, share: int) -> None:
        self.stages = stages
        self.limits = stages.limits
        self.goal = self.limits.goal
        self.share = share  # how many openers a piece should have

    def run(self, openers: list[int]) -> Iterator[list[int]]:
        """Yield the batches of units, neighbours together."""
        of, units = self.stages, self.stages.units(openers)
        volume = sum(of.size[unit] for unit in units)
        self.goal = max(self.limits.least, min(self.limits.goal, -(-volume // self.limits.slabs)))
        units.sort(key=lambda unit: (of.placement[unit], of.area[unit], of.anchor[unit]))  # else in dask's order
        for _, alike in groupby(units, key=lambda unit: (of.placement[unit], of.area[unit])):
            yield from self._batches(alike)

    def _batches(self, units: Iterable[int]) -> Iterator[list[int]]:
        """Fill batches with parts, each to its goal; they also end where the anchor changes, if half full."""
        batch = _Batch()
        for part in self._parts(units):
            if batch.units and not self._goes_with(batch, part):
                yield batch.units
                batch = _Batch()
            batch.add(part)
        yield batch.units

    def _goes_with(self, batch: _Batch, part: _Batch) -> bool:
        if batch.size >= self.goal or batch.openers >= self.share:
            return False
        anchor = self.stages.anchor
        if anchor[batch.units[-1]] != anchor[part.units[0]] and 2 * batch.size >= self.goal:
            return False
        return self._fits(batch.size + part.size, batch.openers + part.openers)

    def _fits(self, size: int, openers: int) -> bool:
        return size <= min(self.limits.cap, LOOSE * self.goal) and openers <= LOOSE * self.share

    def _parts(self, units: Iterable[int]) -> Iterator[_Batch]:
        """Yield units that one node waits for together: whole where that fits in a piece, else in even parts."""
        anchor, waits = self.stages.anchor, self.stages.waits
        for _, same in groupby(units, key=lambda unit: (anchor[unit], waits[unit])):
            group = self._batch(same)
            if self._fits(group.size, group.openers):
                yield group
            else:
                yield from self._even_parts(group)

    def _even_parts(self, group: _Batch) -> Iterator[_Batch]:
        count = max(-(-group.size // self.goal), -(-group.openers // self.share))
        part, done, parts = _Batch(), 0, 1
        for unit in group.units:
            one = self._batch([unit])
            if part.units and (done * count >= group.size * parts or part.size + one.size > self.limits.cap):
                yield part
                part, parts = _Batch(), parts + 1
            part.add(one)
            done += one.size
        yield part

    def _batch(self, units: Iterable[int]) -> _Batch:
        batch = _Batch(list(units))
        batch.size = sum(self.stages.size[unit] for unit in batch.units)
        batch.openers = sum(self.stages.openers[unit] for unit in batch.units)
        return batch


@dataclass(slots=True)
class _Batch:
    units: list[int] = field(default_factory=list)
    size: int = 0
    openers: int = 0

    def add(self, more: _Batch) -> None:
        self.units += more.units
        self.size += more.size
        self.openers += more.openers


def wide_nodes(nodes: Nodes, limits: Limits) -> set[int]:
    """Return the nodes whose users are too many for one unit, and are tied together by little else.

    Where most roots are like that (a matrix product), none of the roots is wide: they are the data.
    """
    roots = sum(not needs for needs in nodes.inputs)
    few = max(FEW_TIES, 2 * limits.share(roots))
    many = max(2 * FEW_TIES, limits.unit)
    wide = set()
    for node, users in enumerate(nodes.users):
        if len(users) > few:
            ties = sum(len(nodes.inputs[user]) > 1 for user in users)
            if ties > few or len(users) > many:
                wide.add(node)
    wide_roots = {node for node in wide if not nodes.inputs[node]}
    return wide - wide_roots if len(wide_roots) * FEW_TIES > roots else wide


def prelude(nodes: Nodes, wide: set[int]) -> set[int]:
    """Return the wide nodes that need few others, with those: they go before everything else.

    So they tie nothing together, and the data itself is read where it is used.
    """
    found: set[int] = set()
    for node in wide:
        found |= _few_ancestors(nodes, node)
    return found


def _few_ancestors(nodes: Nodes, node: int) -> set[int]:
    """Return the node and all that it needs, or nothing where those are more than a few."""
    found, todo = {node}, [node]
    while todo and len(found) <= FEW_TIES:
        more = set(nodes.inputs[todo.pop()]) - found
        found |= more
        todo += more
    return set() if todo or len(found) > FEW_TIES else found
