"""Who is next where several wait for one site: owners share alike, and an owner's calls and graphs do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from daskfed.hub import events as ev
from daskfed.hub.fairness import LEAST_S, Flow, Shares
from daskfed.messages import BlockKind, BlockSpec, RunBlock
from tests.unit.hub.builders import Commands, Stage, block

SECOND = (("f", 10),)  # prefixes of a block that is expected to take a second


def long(name: str, owner: str = "ann", kind: BlockKind = BlockKind.GRAPH, **constraint: Any) -> BlockSpec:
    """Return a block of an owner, which is expected to take a second."""
    made = block(name, f"x{name}", ntasks=10, prefixes=SECOND, kind=kind, **constraint)
    return replace(made, owner=owner, client="c" if owner == "ann" else owner)


def sent(commands: Commands) -> list[str]:
    """Return the blocks that are sent."""
    told = [each.message for each in commands if isinstance(each, ev.TellSite)]
    return [order.block.id for order in told if isinstance(order, RunBlock)]


class One:
    """A hub with one site of one thread, at which blocks run one after the other."""

    def __init__(self) -> None:
        self.stage = Stage("north")
        self.stage(ev.ClientJoined("bob", "bob"))
        self.there: list[str] = []

    def submit(self, *blocks: BlockSpec) -> None:
        wanted = tuple(key for spec in blocks for key in spec.outputs)
        self.there += sent(self.stage(ev.BlocksSubmitted(blocks[0].client, blocks, wanted, False)))

    def run_all(self) -> list[str]:
        """Finish blocks in the order in which they came to the site, and return that order."""
        ran = []
        while self.there:
            ran.append(name := self.there.pop(0))
            self.stage.now += 1.0
            self.there += sent(self.stage.made(name, f"x{name}"))
        return ran


def test_two_users_take_turns_whoever_came_first() -> None:
    one = One()
    one.submit(*(long(f"a{n}") for n in range(6)))
    one.submit(*(long(f"b{n}", owner="bob") for n in range(3)))
    assert one.run_all() == ["a0", "a1", "a2", "b0", "a3", "b1", "a4", "b2", "a5"]


def test_a_graph_does_not_wait_for_all_the_calls_that_came_before() -> None:
    one = One()
    one.submit(*(long(f"call{n}", kind=BlockKind.CALLS) for n in range(6)))
    one.submit(long("graph0"), long("graph1"))
    assert one.run_all() == ["call0", "call1", "call2", "graph0", "call3", "graph1", "call4", "call5"]


def test_who_has_calls_and_graphs_gets_no_more_than_who_has_one_of_them() -> None:
    one = One()
    one.submit(*(long(f"c{n}", kind=BlockKind.CALLS) for n in range(6)), *(long(f"g{n}") for n in range(6)))
    one.submit(*(long(f"b{n}", owner="bob") for n in range(6)))
    ran = one.run_all()
    first = ran[2:12]  # after those that were there when bob came
    assert sum(name.startswith("b") for name in first) == 5


def test_priority_goes_before_shares() -> None:
    one = One()
    one.submit(*(long(f"a{n}", priority=1) for n in range(4)))
    one.submit(*(long(f"b{n}", owner="bob") for n in range(2)))
    assert one.run_all() == ["a0", "a1", "a2", "a3", "b0", "b1"]


def test_of_one_flow_the_order_stays() -> None:
    one = One()
    one.submit(*(long(f"a{n}") for n in range(5)))
    assert one.run_all() == ["a0", "a1", "a2", "a3", "a4"]


class TestShares:
    ANN, BOB, CALLS = Flow("ann", False), Flow("bob", False), Flow("ann", True)

    def test_who_begins_to_wait_is_level_with_who_has_had_the_least(self) -> None:
        shares = Shares()
        shares.update({self.ANN})
        shares.sent(self.ANN, 10.0)
        shares.update({self.ANN, self.BOB})
        assert shares.turn(self.BOB)[0] == shares.turn(self.ANN)[0] == 10.0

    def test_nobody_saves_up_while_not_waiting(self) -> None:
        shares = Shares()
        shares.update({self.ANN, self.BOB})
        shares.update({self.ANN})
        shares.sent(self.ANN, 5.0)
        shares.update({self.ANN, self.BOB})
        assert shares.turn(self.BOB)[0] == 5.0

    def test_the_owner_counts_before_what_it_is(self) -> None:
        shares = Shares()
        shares.update({self.ANN, self.BOB, self.CALLS})
        shares.sent(self.CALLS, 0.0)
        assert sorted((self.ANN, self.BOB, self.CALLS), key=shares.turn)[0] is self.BOB
        shares.sent(self.BOB, 2 * LEAST_S)
        assert sorted((self.ANN, self.BOB, self.CALLS), key=shares.turn) == [self.ANN, self.CALLS, self.BOB]
