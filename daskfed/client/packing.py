"""Packing the units of one stage into pieces of even size.

A *unit* is what grew together in a stage (see :mod:`daskfed.client.staging`). Units that go into one piece agree in
their placement and in where their data is. They stay in dask's order, next to those that were drawn to the same lower
piece, and units that one later node waits for stay together where they fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from daskfed.client.contraction import Nodes

LOOSE = 1.25  # how much larger than its goal a piece may become, rather than dividing what belongs together
SMALLEST_LIMIT = 8  # units may always have this many tasks, however small the graph


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
        return cls(max(slabs, -(-tasks // cap)), goal, max(1, goal // 8), min(cap, max(SMALLEST_LIMIT, 2 * goal)), cap)

    def share(self, openers: int) -> int:
        """Return how many of a stage's openers one piece should have."""
        return max(1, -(-openers // self.slabs))


class Units:
    """What is known of each unit, at the node that leads it; every node starts as a unit of its own."""

    def __init__(self, nodes: Nodes, area: list[int]) -> None:
        count = len(nodes.inputs)
        self.size = list(nodes.size)  # in tasks
        self.openers = [0] * count  # how many nodes opened it
        self.placement = list(nodes.placement)
        self.area = area
        self.mix = [0] * count  # areas that its first inputs come from, one bit each
        self.anchor = [-1] * count  # leader of the lower piece that draws it most; -1: none does
        self.waits = [count] * count  # first node that would have joined it with other units
        self._parent = list(range(count))

    def leader(self, node: int) -> int:
        """Return the node that leads the unit of this node."""
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def add(self, unit: int, node: int) -> None:
        """Put a node that leads nothing else into a unit."""
        self._parent[node] = unit
        self.size[unit] += self.size[node]

    def unite(self, units: list[int]) -> int:
        """Make one unit of several and return its leader, the first of them."""
        leader, *others = units
        for unit in others:
            self._parent[unit] = leader
            self.size[leader] += self.size[unit]
            self.openers[leader] += self.openers[unit]
        return leader


class Packing:
    """Puts the units of one stage into batches that become pieces, of about equal size."""

    def __init__(self, units: Units, limits: Limits, share: int) -> None:
        self.of = units
        self.limits = limits
        self.goal = limits.goal
        self.share = share  # how many openers a piece should have

    def run(self, units: list[int]) -> Iterator[list[int]]:
        """Yield the units of one stage in batches, neighbours together."""
        volume = sum(self.of.size[unit] for unit in units)
        self.goal = max(self.limits.least, min(self.limits.goal, -(-volume // self.limits.slabs)))
        in_order = sorted(units, key=lambda unit: (*self._kind(unit), self.of.anchor[unit]))  # else in dask's order
        for _, alike in groupby(in_order, key=self._kind):
            yield from self._batches(alike)

    def _kind(self, unit: int) -> tuple[int, int, int]:
        """Return what all units of a piece must have in common."""
        return self.of.placement[unit], self.of.area[unit], self.of.mix[unit]

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
        anchor = self.of.anchor
        if anchor[batch.units[-1]] != anchor[part.units[0]] and 2 * batch.size >= self.goal:
            return False
        return self._fits(batch.size + part.size, batch.openers + part.openers)

    def _fits(self, size: int, openers: int) -> bool:
        return size <= min(self.limits.cap, LOOSE * self.goal) and openers <= LOOSE * self.share

    def _parts(self, units: Iterable[int]) -> Iterator[_Batch]:
        """Yield units that one node waits for together: whole where that fits in a piece, else in even parts."""
        anchor, waits = self.of.anchor, self.of.waits
        for _, same in groupby(units, key=lambda unit: (anchor[unit], waits[unit])):
            group = self._batch(same)
            if self._fits(group.size, group.openers):
                yield group
            else:
                yield from self._even_parts(group)

    def _even_parts(self, group: _Batch) -> Iterator[_Batch]:
        """Divide a group into as few parts of even size as fit in a piece; only a single unit may be too large."""
        count = max(-(-group.size // self.goal), -(-group.openers // self.share))
        part, done, parts = _Batch(), 0, 1
        for unit in group.units:
            size, openers = self.of.size[unit], self.of.openers[unit]
            full = done * count >= group.size * parts
            if part.units and (full or not self._fits(part.size + size, part.openers + openers)):
                yield part
                part, parts = _Batch(), parts + 1
            part.add(_Batch([unit], size, openers))
            done += size
        yield part

    def _batch(self, units: Iterable[int]) -> _Batch:
        batch = _Batch(list(units))
        batch.size = sum(self.of.size[unit] for unit in batch.units)
        batch.openers = sum(self.of.openers[unit] for unit in batch.units)
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
