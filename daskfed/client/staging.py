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
* the unit would grow too large.

What very many nodes use and little is needed for (a task that opens a file) goes before everything else, as a
*prelude*: so it does not tie the data together that it is used with.
"""

from __future__ import annotations

from daskfed.client.areas import areas
from daskfed.client.contraction import ANYWHERE, Nodes
from daskfed.client.packing import Limits, Packing, Units

DRAWN = 2.0  # a lower piece draws a node away from its unit where it has this many times the weight
FEW_TIES = 8  # an input that ties no more nodes than this is never wide


class Stages:
    """The pieces of a graph while they grow."""

    def __init__(self, nodes: Nodes, limits: Limits) -> None:
        self.nodes = nodes
        self.limits = limits
        self.area = areas(nodes)
        self.units = Units(nodes, self.area)
        self.stage = [-1] * len(nodes.inputs)  # of a node; -1: has none yet
        self._now = 0  # the stage that grows
        self._share = 1  # how many of this stage's openers a piece should have
        self._missing = [len(needs) for needs in nodes.inputs]  # inputs that have no stage yet
        self._weight = [1.0 / len(users) if users else 1.0 for users in nodes.users]
        self._prelude = prelude(nodes, wide_nodes(nodes, limits))
        self._bound = any(nodes.placement) or any(self.area)
        self._ready: list[int] = []
        self._later: list[int] = []  # nodes that do not follow in this stage
        self._packed = False  # the units of this stage are pieces now: they only grow

    # -- the order of things -----------------------------------------------------------------------------------------

    def grow(self) -> list[list[int]]:
        """Return the pieces, each as its nodes in dask's order."""
        roots = [node for node, needs in enumerate(self.nodes.inputs) if not needs]
        openers = [node for node in roots if node in self._prelude] or roots
        while openers:
            self._grow_units(openers)
            self._pack(openers)
            self._grow_pieces()
            openers, self._later = sorted(self._later), []
            if self._prelude:
                openers = sorted(openers + [node for node in roots if node not in self._prelude])
                self._prelude = set()
            self._now += 1
        return self._pieces()

    def placement(self, piece: list[int]) -> int:
        """Return the number of the placement of a grown piece."""
        return self.units.placement[self.units.leader(piece[0])]

    def _grow_units(self, openers: list[int]) -> None:
        self._share = self.limits.share(len(openers))
        for node in openers:
            self.units.openers[node] = 1
            if needs := self.nodes.inputs[node]:
                self.units.anchor[node] = self._strongest(node, needs)[0]
                self.units.mix[node] = self._mix(needs)
            self._settle(node)
            self._follow()

    def _pack(self, openers: list[int]) -> None:
        reads = not self.nodes.inputs[openers[0]]  # what reads data is spread evenly, whatever follows it
        units = list(dict.fromkeys(map(self.units.leader, openers)))
        for piece in Packing(self.units, self.limits, self._share if reads else len(openers)).run(units):
            self.units.unite(piece)

    def _grow_pieces(self) -> None:
        """Try again those that could not follow: what they waited for may be in one piece now."""
        self._ready, self._later = sorted(self._later, reverse=True), []
        self._packed = True
        self._follow()
        self._packed = False

    def _follow(self) -> None:
        """Let nodes that are ready join units, until none is left."""
        while self._ready:
            node = self._ready.pop()
            unit = self._unit_for(node)
            if unit is None:
                self._later.append(node)
            else:
                self.units.add(unit, node)
                self._settle(node)

    def _settle(self, node: int) -> None:
        self.stage[node] = self._now
        missing = self._missing
        for user in reversed(self.nodes.users[node]):
            missing[user] -= 1
            if not missing[user]:
                self._ready.append(user)

    def _pieces(self) -> list[list[int]]:
        pieces: dict[int, list[int]] = {}
        for node in range(len(self.stage)):
            pieces.setdefault(self.units.leader(node), []).append(node)
        return list(pieces.values())

    # -- which unit a node follows -----------------------------------------------------------------------------------

    def _unit_for(self, node: int) -> int | None:
        """Return the leader of the unit that this node is to join, or None where it must wait for the next stage."""
        if self._prelude and node not in self._prelude:
            return None
        needs, stage, now = self.nodes.inputs[node], self.stage, self._now
        here = [need for need in needs if stage[need] == now]
        if len(here) < len(needs) and self._is_drawn_down(node):
            return None
        units = sorted(set(map(self.units.leader, here)))
        if self._bound and not all(self._admits(unit, node) for unit in units):
            return None
        if len(units) == 1:
            return units[0] if self._has_room(units[0], node, here) else None
        return None if self._packed else self._united(units, node)

    def _is_drawn_down(self, node: int) -> bool:
        needs, stage, now = self.nodes.inputs[node], self.stage, self._now
        here = sum(self._weight[need] for need in needs if stage[need] == now)
        return self._strongest(node, [need for need in needs if stage[need] != now])[1] > DRAWN * here

    def _strongest(self, node: int, needs: list[int]) -> tuple[int, float]:
        """Return the unit or piece with most of these inputs, by weight, and that weight; in the node's area if any."""
        if self._bound:
            needs = [need for need in needs if self.area[need] == self.area[node]] or needs
        pull: dict[int, float] = {}
        for need in needs:
            unit = self.units.leader(need)
            pull[unit] = pull.get(unit, 0.0) + self._weight[need]
        return max(pull.items(), key=lambda item: (item[1], -item[0]))

    def _mix(self, needs: list[int]) -> int:
        bits = 0
        if self._bound:
            for need in needs:
                bits |= 1 << self.area[need]
        return bits

    def _admits(self, unit: int, node: int) -> bool:
        if self.area[unit] != self.area[node]:
            return False
        own, theirs = self.nodes.placement[node], self.units.placement[unit]
        if own == theirs:
            return True
        if not self.nodes.placements.admits(theirs, own):
            return False
        return all(self.area[need] in (ANYWHERE, self.area[unit]) for need in self.nodes.inputs[node])

    def _has_room(self, unit: int, node: int, here: list[int]) -> bool:
        size = self.units.size[unit] + self.units.size[node]
        if size <= self.limits.unit:
            return True
        # The only user of all its inputs could not run beside them anyway.
        users = self.nodes.users
        return size <= self.limits.cap and all(len(users[need]) == 1 for need in here)

    def _united(self, units: list[int], node: int) -> int | None:
        """Join units that have an input of ``node``, where that leaves them small enough."""
        size, openers = self.units.size[node], 0
        for unit in units:
            size += self.units.size[unit]
            openers += self.units.openers[unit]
        small = size <= self.limits.least or (size <= self.limits.unit and openers <= 2 * self._share)
        if small and len({self.units.placement[unit] for unit in units}) == 1:
            return self.units.unite(units)
        for unit in units:
            self.units.waits[unit] = min(self.units.waits[unit], node)
        return None


def wide_nodes(nodes: Nodes, limits: Limits) -> set[int]:
    """Return the nodes whose users are too many for one unit.

    Where many roots are like that (a matrix product), none of the roots is wide: they are the data.
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
    """Return the wide nodes that need few others, with those."""
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
