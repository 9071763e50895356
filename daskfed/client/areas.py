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
        order = ready_order(nodes.inputs, nodes.users)
        for node in order:
            if area[node] == ANYWHERE:
                area[node] = _of_most(nodes, area, node)
        for node in order:
            _move_parts(nodes, area, node)
    return area


def _of_most(nodes: Nodes, area: list[int], node: int) -> int:
    weight: dict[int, float] = {}
    for need in nodes.inputs[node]:
        if area[need] != ANYWHERE:
            weight[area[need]] = weight.get(area[need], 0.0) + 1.0 / len(nodes.users[need])
    return min(weight, key=lambda one: (-weight[one], one), default=ANYWHERE)


def _move_parts(nodes: Nodes, area: list[int], node: int) -> None:
    """Let a result that is only taken to parts (a shuffle's split) travel whole where all parts would go anyway."""
    parts = nodes.users[node]
    if len(parts) < 2 or not all(nodes.is_part[part] and nodes.area[part] == ANYWHERE for part in parts):
        return
    goals = {area[user] for part in parts for user in nodes.users[part]}
    if len(goals) == 1 and ANYWHERE not in goals:
        for part in parts:
            area[part] = next(iter(goals))
