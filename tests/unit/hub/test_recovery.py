"""A hub that starts anew waits for those who were there, takes in what they tell, and loses nothing that they want."""

from __future__ import annotations

from daskfed.hub import events as ev
from daskfed.hub.arrivals import EPOCH_BITS
from daskfed.hub.core import HubCore
from daskfed.hub.recovery import Awaited
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import (
    Attempt,
    BlockSpec,
    CancelBlock,
    HeldBlock,
    Import,
    KeysMade,
    MadeKey,
    Message,
    ReportHoldings,
    RunBlock,
    SiteHoldings,
)
from tests.unit.hub.builders import (
    Commands,
    Stage,
    block,
    forget,
    forget_block,
    hello,
    keys,
    lost_for_good,
    release,
    status,
    told,
    told_failed,
)

EPOCH = 2


class Anew(Stage):
    """A hub in its second epoch that awaits sites and the client ``c``."""

    def __init__(self, *sites: str, clients: str = "c") -> None:
        self.core = HubCore(EPOCH, awaited=Awaited(frozenset(sites), dict.fromkeys(clients.split(), "ann")))
        self.now = 100.0

    def back(self, *blocks: BlockSpec, wanted: str = "", kept: str = "", client: str = "c") -> Commands:
        """A client is back, with blocks that it submitted in this order."""
        numbered = tuple((spec, (1 << EPOCH_BITS) + n) for n, spec in enumerate(blocks))
        return self(ev.ClientBack(client, "ann", numbered, keys(wanted), keys(kept)))

    def holds(self, site: str, held: str = "", *blocks: HeldBlock, placed: str = "") -> Commands:
        """A site is back and says what it holds and works at."""
        made = tuple(MadeKey(key, 8) for key in keys(held))
        told = SiteHoldings(made, (), keys(placed), (), blocks, 0)
        return self(ev.SiteJoined(hello(site)), ev.FromSite(site, told), ev.FromSite(site, status()))


def working(name: str, outputs: str, kept: str = "", n: int = 1) -> HeldBlock:
    return HeldBlock(name, Attempt(1, n), keys(outputs), keys(kept))


def sent(commands: Commands, kind: type[Message]) -> list[Message]:
    return [each.message for each in commands if isinstance(each, ev.TellSite) and isinstance(each.message, kind)]


def test_a_block_that_a_site_works_at_goes_on_there() -> None:
    stage = Anew("north")
    assert stage.back(block("b", "x"), wanted="x") == []
    assert sent(stage.holds("north", "", working("b", "x")), RunBlock) == []
    assert stage.block("b").phase is BlockPhase.PLACED and stage.attempt("b") == Attempt(1, 1)
    assert stage.says("north", KeysMade("b", Attempt(1, 1), (MadeKey("x", 8),))) == [told("x")]


def test_of_a_block_that_goes_on_all_is_left_as_far_as_the_new_hub_knows() -> None:
    stage = Anew("north")
    stage.back(block("b", "x", ntasks=10, prefixes=(("f", 10),)), wanted="x")
    stage.holds("north", "", working("b", "x"))
    assert stage.core.sites["north"].left_s(stage.now) == 1.0


def test_what_a_site_holds_is_not_made_again() -> None:
    stage = Anew("north")
    stage.back(block("b", "x y"), wanted="x y")
    assert stage.holds("north", "x y", working("b", "", "x y")) == [told("x y")]
    assert stage.block("b").phase is BlockPhase.DONE


def test_a_block_that_names_a_worker_that_is_not_there_any_more_fails() -> None:
    stage = Anew("north")
    stage.holds("north")
    back = ev.ClientBack("c", "ann", ((block("b", "x"), 1),), ("x",), refused=(("b", "no worker 'w'"),))
    commands = stage(back)
    assert [each.outcome for each in commands if isinstance(each, ev.TellClient)] == [ev.Outcome.FAILED]
    assert [each.kind for each in commands if isinstance(each, ev.FailKeys)] == ["UnknownWorkerError"]
    assert sent(commands, RunBlock) == []


def test_nothing_is_placed_before_all_are_back() -> None:
    stage = Anew("north", "south")
    stage.back(block("b", "x"), wanted="x")
    assert stage.holds("north") == []
    (order,) = sent(stage.holds("south"), RunBlock)
    assert isinstance(order, RunBlock) and order.attempt == Attempt(EPOCH, 1)


def test_the_patience_with_those_who_do_not_come_ends() -> None:
    stage = Anew("north", "south")
    stage.back(block("b", "x"), wanted="x")
    stage.holds("north")
    assert stage.later(9) == []
    assert len(sent(stage.later(2), RunBlock)) == 1


def test_what_nobody_knows_is_kept_until_the_client_is_back() -> None:
    stage = Anew("north")
    assert stage.holds("north", "x z", working("b", "y", "x z")) == []
    assert stage.later(60) == []
    commands = stage.back(block("b", "x y z"), wanted="x y")
    assert sent(commands, ReportHoldings) == [ReportHoldings()]
    told_again = SiteHoldings(tuple(MadeKey(key, 8) for key in "xz"), (), (), (), (working("b", "y", "x z"),), 0)
    assert stage.says("north", told_again) == [release("north", "z"), told("x"), forget("z")]
    assert stage.block("b").phase is BlockPhase.PLACED


def test_what_a_client_no_longer_wants_is_stopped_and_released() -> None:
    stage = Anew("north")
    stage.back()
    commands = stage.holds("north", "x", working("b", "y", "x"))
    assert sent(commands, CancelBlock) == [CancelBlock("b", Attempt(1, 1))]
    assert stage.empty


def test_what_a_site_holds_of_a_block_that_was_cancelled_since_it_was_asked_is_not_counted_on() -> None:
    stage = Anew("north", clients="c d")
    stage.back(block("b", "x"), wanted="x")
    stage.holds("north", "z", working("b", "x"), placed="z")
    assert sent(stage.back(client="d"), ReportHoldings) == [ReportHoldings()]
    stage.drop("x")
    assert sent(stage.later(11), CancelBlock) == [CancelBlock("b", Attempt(1, 1))]
    again = block("again", "x")
    stage.submit(again, wanted="x")
    commands = stage.says("north", SiteHoldings((MadeKey("x", 8),), (), (), (), (working("b", "", "x"),), 0))
    assert not [each for each in commands if isinstance(each, ev.TellClient)]
    assert stage.block("again").phase is BlockPhase.PLACED


def test_what_was_coming_to_a_site_and_was_released_since_it_was_asked_is_not_counted_on() -> None:
    stage = Anew("north", "south", clients="c d e")
    stage.back(wanted="x")
    stage.holds("south", "x", placed="x")
    coming = SiteHoldings((MadeKey("y", 8),), (), ("y",), (Import("x", "south", 8, number=3),), (), 0)
    stage(ev.SiteJoined(hello("north")), ev.FromSite("north", coming), ev.FromSite("north", status()))
    assert list(stage.key("x").importing) == ["north"]
    assert sent(stage.back(client="d"), ReportHoldings) == [ReportHoldings()]
    stage.desire("x", client="d")
    assert stage.drop("x", client="d") == [release("north", "x")]
    stage.says("north", coming)
    assert not stage.key("x").importing and list(stage.key("x").holders) == ["south"]


def test_what_is_released_because_of_what_a_site_reports_is_not_counted_on_for_the_same_report() -> None:
    stage = Anew("north", "south", clients="c d e")
    stage.back(block("b", "y", "x"), wanted="y")
    coming = (Import("x", "south", 8, number=3),)
    first = SiteHoldings((MadeKey("z", 8),), (), ("z",), coming, (), 0)
    stage(ev.SiteJoined(hello("north")), ev.FromSite("north", first), ev.FromSite("north", status()))
    assert list(stage.key("x").importing) == ["north"]
    assert sent(stage.back(client="d"), ReportHoldings) == [ReportHoldings()]
    again = SiteHoldings((MadeKey("y", 8), MadeKey("z", 8)), (), ("y", "z"), coming, (), 0)
    assert release("north", "x") in stage.says("north", again)  # what was to be made from it exists
    assert not stage.key("x").importing


def test_a_site_that_was_asked_for_a_key_once_more_since_it_reported_answers_the_last_request() -> None:
    stage = Anew("north", "south")
    stage.holds("south", "x", placed="x")
    stage.holds("north")
    stage.back(block("b", "y", "x", sites=("north",)), wanted="y")
    stage.says("south", SiteHoldings((MadeKey("x", 8),), (), ("x",), (), (), 0))
    stage.later(11)
    number = stage.key("x").importing["north"]
    stage.says("north", SiteHoldings((), (), (), (Import("x", "south", 8, number=number - 1),), (), 0))
    assert stage.key("x").importing == {"north": number}


def test_a_key_that_a_site_has_for_two_blocks_stays_when_one_of_them_ends() -> None:
    """One made it before the hub started anew, for a client that comes late; the other has joined it since."""
    stage = Anew("north", clients="c d")
    stage.holds("north", "x", working("old", "", "x"))
    stage.submit(block("b", "x y"), wanted="x y", client="c")
    stage.later(11)
    stage.made("b", "x")
    stage.back(block("old", "x"), wanted="x", client="d")
    told_again = (working("old", "", "x"), HeldBlock("b", Attempt(EPOCH, 1), ("y",), ("x",)))
    stage.says("north", SiteHoldings((MadeKey("x", 8),), (), (), (), told_again, 1))
    assert sent(stage.drop("x y", client="c"), CancelBlock) == [CancelBlock("b", Attempt(EPOCH, 1))]
    assert stage.key("x").holders == {"north": ("old",)}


def test_the_lease_of_a_client_that_never_comes_ends() -> None:
    stage = Anew("north")
    stage.holds("north", "x", placed="x")
    assert stage.later(3599) == []
    (question,) = sent(stage.later(2), ReportHoldings)
    assert stage.says("north", SiteHoldings((MadeKey("x", 8),), (), ("x",), (), (), 0)) == [release("north", "x")]


def test_scattered_data_that_is_nowhere_is_brought_by_its_keeper() -> None:
    stage = Anew("north")
    stage.back(wanted="x", kept="x")
    assert stage.holds("north") == [ev.AskForData("c", ("x",))]
    assert stage(ev.KeysScattered("c", "north", (("x", 8),), kept=True, again=True)) == [told("x")]


def test_scattered_data_that_nobody_has_is_lost() -> None:
    stage = Anew("north", clients="c d")
    stage.back(wanted="x")
    stage.holds("north")
    (lost,) = [each for each in stage.back(client="d") if isinstance(each, ev.TellClient)]
    assert (lost.outcome, lost.keys) == (ev.Outcome.CANCELLED, ("x",))
    assert "nobody knows them any more" in lost.reason


def test_a_keeper_that_does_not_have_the_copy_says_so() -> None:
    stage = Stage("north")
    stage(ev.KeysScattered("c", "north", (("x", 8),), kept=True))
    assert stage.leave("north") == [ev.AskForData("c", ("x",))]
    assert stage(ev.CopiesGone("c", ("x", "unknown"))) == [lost_for_good("x", "north"), told_failed("x")]
    assert stage.drop("x") and stage.empty and not stage.core.ledger.kept


def test_replicas_are_made_and_replaced() -> None:
    stage = Stage("north", "south", "west")
    stage(ev.KeysScattered("c", "north", (("x", 8),), replicas=2))
    stage.later(1)
    assert list(stage.key("x").importing) == ["south"]
    stage(ev.KeysScattered("c", "south", (("x", 8),)))
    assert stage.leave("north") == []
    stage.later(1)
    assert list(stage.key("x").holders) == ["south"] and list(stage.key("x").importing) == ["west"]
    stage.drop("x")
    assert stage.empty
    stage.later(1)
    assert not stage.core.dispatcher.replicated


def test_a_key_that_is_held_keeps_its_phase_while_a_client_is_away() -> None:
    stage = Anew("north")
    stage.back(block("b", "x"), wanted="x")
    stage.holds("north", "x", working("b", "", "x"))
    assert stage.key("x").phase is KeyPhase.HELD
    assert stage.leave("north") == [] and stage.key("x").phase is KeyPhase.PENDING


def test_a_key_is_made_by_a_later_block_where_what_the_first_needs_cannot_be_made_any_more() -> None:
    stage = Anew("north")
    stage.back(block("old", "m", "gone"), block("new", "m"), block("use", "x", "m"), wanted="x")
    commands = stage.holds("north", "gone")  # whoever made it has been told to forget how
    assert stage.key("m").producer == "new"
    assert [each.block.id for each in sent(commands, RunBlock) if isinstance(each, RunBlock)] == ["new"]
    assert forget_block("old") in commands and forget("gone") in commands
