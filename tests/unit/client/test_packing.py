"""Units of a stage are packed into pieces of even size, whatever their own sizes."""

from __future__ import annotations

import pytest

from daskfed.client.contraction import Nodes, Placements
from daskfed.client.packing import LOOSE, Limits, Packing, Units


def packed(sizes: list[int], slabs: int = 16) -> tuple[list[list[int]], int]:
    """Pack units of these sizes that one node waits for; return their sizes, piece by piece, and the goal of a piece."""
    none: list[list[int]] = [[] for _ in sizes]
    flat = [0] * len(sizes)
    nodes = Nodes([], sizes, none, none, [], flat, flat, Placements(), set())
    packing = Packing(Units(nodes, flat), Limits.of(nodes, slabs, cap=1000), share=1)
    batches = list(packing.run(list(range(len(sizes)))))
    assert sorted(unit for batch in batches for unit in batch) == list(range(len(sizes)))
    return [[sizes[unit] for unit in batch] for batch in batches], packing.goal


def test_units_of_one_size_give_pieces_of_one_size() -> None:
    assert [len(piece) for piece in packed([1] * 4000)[0]] == [250] * 16
    assert [len(piece) for piece in packed([5] * 20)[0]] == [1] * 20


@pytest.mark.parametrize("large", [400, 3000])
def test_only_a_single_unit_is_larger_than_a_piece_should_be(large: int) -> None:
    pieces, goal = packed([1] * 2000 + [large] + [1] * 2000)
    assert len(pieces) < 25 and [large] in pieces
    assert all(sum(piece) <= LOOSE * goal for piece in pieces if piece != [large])
