"""Near which data each node of a graph should be: the area that most of its inputs are in.

Areas spread from the nodes that are bound to sites. So what reduces the data of one site stays with it, and where the
data of two sites meets, the tasks that are better off at one of them are told apart from those that belong at the
other. How large results are is not known when a graph is cut; every key counts as one, shared by its users.
"""

from __future__ import annotations

from daskfed.client.contraction import ANYWHERE, Nodes, ready_order


def areas(nodes: Nodes) -> list[int]:
    """Return the area of each node; ANYWHERE where nothing that it needs is bound to a place."""
    area = list(nodes.area)
    if any(area):
        for node in ready_order(nodes.inputs, nodes.users):
            if area[node] == ANYWHERE:
                area[node] = _of_most(nodes, area, node)
    return area


def _of_most(nodes: Nodes, area: list[int], node: int) -> int:
    weight: dict[int, float] = {}
    for need in nodes.inputs[node]:
        if area[need] != ANYWHERE:
            weight[area[need]] = weight.get(area[need], 0.0) + 1.0 / len(nodes.users[need])
    return min(weight, key=lambda one: (-weight[one], one), default=ANYWHERE)
