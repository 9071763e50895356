"""Keys rest as one record as long as no more is to be said of them than of others, and nobody sees a difference."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from daskfed.hub.keytable import NOTHING, KeyState, KeyTable, Rest, rest, rest_of
from daskfed.hub.states import KeyPhase

HELD = {"phase": KeyPhase.HELD, "nbytes": 28, "holders": {"north": ("b",)}}


def plain(**more: Any) -> KeyState:
    return KeyState("x", "ann", **{"producer": "b", "wanted_by": {"c": None}, **more})


def told(state: KeyState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in fields(state)}


@pytest.mark.parametrize("more", [{}, {"wanted_by": {}}, HELD])
def test_all_of_a_state_comes_back(more: dict[str, Any]) -> None:
    state = plain(**more)
    resting = rest_of(state)
    assert resting is not None and told(resting.state("x")) == told(state)
    assert (resting.holders, resting.wanted_by) == (state.holders, state.wanted_by)
    assert resting.present_at("north") is state.present_at("north") and not resting.present_at("south")
    assert resting is rest_of(plain(**more))  # all keys of which this is so share it


@pytest.mark.parametrize(
    "more",
    [
        {"producer": None}, {"keeper": "c"}, {"phase": KeyPhase.FAILED}, {"phase": KeyPhase.RETIRED},
        {"importing": {"s": 1}}, {"failed_at": {"s": None}}, {"consumers": {"d": None}}, {"heirs": {"d": None}},
        {"shielded": True}, {"replicas": 2}, {"lost_at": "north"}, {"cancelled": True}, {"nbytes": 8},
        {"wanted_by": {"c": None, "d": None}}, {**HELD, "holders": {"north": ("data",)}},
        {**HELD, "holders": {"north": ("b", "data")}}, {**HELD, "holders": {"north": ("b",), "south": ("data",)}},
    ],
)  # fmt: skip
def test_of_whom_there_is_more_to_say_stays_awake(more: dict[str, Any]) -> None:
    assert rest_of(plain(**more)) is None


def test_who_is_looked_up_has_a_state_of_its_own_until_the_event_is_over() -> None:
    table = KeyTable()
    for key in "xyz":
        table.lay(key, rest("ann", "b"))
    table["x"].wanted_by["c"] = None
    table["y"].add("consumers", "d")
    assert table["x"] is table["x"] and table.peek("z") is table.at_rest("z") is rest("ann", "b")
    table.put_to_rest()
    assert table.at_rest("x") is rest("ann", "b", client="c") and table.at_rest("y") is None
    assert table["y"].consumers == {"d": None} and table["z"].consumers is NOTHING and table["z"].wanted_by == {}
    del table["z"]
    table.put_to_rest()  # of one that ended meanwhile there is nothing to put to rest
    assert "z" not in table and table.get("z") is table.peek("z") is None and list(table) == ["x", "y"]


def test_the_keys_of_a_site() -> None:
    table = KeyTable()
    table.lay("held", rest("ann", "b", KeyPhase.HELD, "c", "north", 8))
    table.lay("elsewhere", rest("ann", "b", KeyPhase.HELD, "c", "south", 8))
    table.lay("pending", rest("ann", "b"))
    table["coming"] = KeyState("coming", "ann", importing={"north": 1})
    assert [state.key for state in table.at("north")] == ["held", "coming"]
    assert type(table.peek("elsewhere")) is Rest and {key for key, _ in table.peeks()} == set(table)
