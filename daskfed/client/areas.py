"""Near which data each node of a graph should be: the area that most of its inputs are in.

Areas spread from the nodes that are bound to sites. So what reduces the data of one site stays with it, and where the
data of two sites meets, the tasks that are better off at one of them are told apart from those that belong at the
other. How large results are is not known when a graph is cut; every key counts as one, shared by its users.

One case needs a look ahead. A shuffle splits each partition (a result that is only taken to parts) and gathers the
parts anew, and what comes out is no smaller than what went in: an index is spelt out, a column of hashes added. So
where all that comes out is needed in another area, the partitions should travel before they are split.
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
        for node in reversed(order):
            _look_ahead(nodes, area, node)
    return area


def _of_most(nodes: Nodes, area: list[int], node: int) -> int:
    weight: dict[int, float] = {}
    for need in nodes.inputs[node]:
        if area[need] != ANYWHERE:
            weight[area[need]] = weight.get(area[need], 0.0) + 1.0 / len(nodes.users[need])
    return min(weight, key=lambda one: (-weight[one], one), default=ANYWHERE)


def _look_ahead(nodes: Nodes, area: list[int], node: int) -> None:
    """Move what shuffles to where its results are needed, if they all are in one area."""
    users = nodes.users[node]
    if _gathers(nodes, node) or _selects(nodes, node):
        moved, goals = [node], {area[user] for user in users}
    elif len(users) > 1 and all(nodes.is_part[user] for user in users):
        moved, goals = [node, *users], {area[user] for part in users for user in nodes.users[part]}
    else:
        return
    if len(goals) == 1 and ANYWHERE not in goals and not any(nodes.area[one] for one in moved):
        for one in moved:
            area[one] = next(iter(goals))


def _gathers(nodes: Nodes, node: int) -> bool:
    needs = nodes.inputs[node]
    return len(needs) > 1 and all(nodes.is_part[need] for need in needs)


def _selects(nodes: Nodes, node: int) -> bool:
    """Whether a node drops the column that a shuffle went by."""
    if not nodes.is_part[node]:
        return False
    whole = nodes.inputs[node][0]
    return len(nodes.users[whole]) == 1 and _gathers(nodes, whole)
