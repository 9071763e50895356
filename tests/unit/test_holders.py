"""Which workers hold which keys, by groups and by key."""

from __future__ import annotations

from daskfed.holders import by_key, of_all

NORTH, SOUTH = "fed://north/1", "fed://south/1"


def test_answers_of_sites_become_one() -> None:
    told = [([NORTH], ["a", "b", "other's"]), ([NORTH, "fed://north/2"], ["c"]), ([SOUTH], ["b", "d"])]
    holders = of_all(told, ["a", "b", "c", "d", "e"])
    assert sum(len(keys) for _, keys in holders) == 5
    assert by_key(holders) == {
        "a": (NORTH,), "b": (NORTH, SOUTH), "c": (NORTH, "fed://north/2"), "d": (SOUTH,), "e": ()
    }  # fmt: skip


def test_nobody_is_asked() -> None:
    assert by_key(of_all([], [])) == {} and by_key(of_all([], [("x", 1)])) == {("x", 1): ()}
