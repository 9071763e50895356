"""Bugs that are put in on purpose: the histories must find each of them, by their own rules alone.

The cores' self-checks are off here, so that a bug is found by what it does: a wrong value, a key that never comes, a
message that makes no sense, something left behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from random import Random
from typing import Any

import pytest

from daskfed.hub import events as hub_ev
from daskfed.hub.core import HubCore
from daskfed.hub.dispatch import Dispatcher, SiteState
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import BlockState, Ledger
from daskfed.hub.recovery import Recovery
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.link import Envelope, Link
from daskfed.messages import BlockRecalled, CloseSite, Key, RecallBlock, ReleaseKeys, RunBlock
from daskfed.site import events as site_ev
from daskfed.site.core import SiteCore
from daskfed.site.records import BlockState as SiteBlock
from tests.simulation.federation import Broken, Cores, Simulation

SEEDS = range(400)  # every bug is found among these; test_histories shows that they are clean without
BLUNDERS = (TypeError, AttributeError, NameError)  # not what a bug does, but what a badly written one here would


# -- bugs of a site's core ---------------------------------------------------------------------------------------------


class ImportNotAwaited(SiteCore):
    """A block is handed to the scheduler before its inputs have arrived."""

    def _queue_if_complete(self, block: SiteBlock) -> None:
        block.missing.clear()
        super()._queue_if_complete(block)


class RecallGrantedTooLate(SiteCore):
    """A block that was started is given back, and runs on."""

    def _recall_block(self, message: RecallBlock) -> None:
        if (block := self._attempt(message)) is not None:
            self._tell(BlockRecalled(block.spec.id, block.attempt, given=True))


class FailedFetchForgotten(SiteCore):
    """A fetch that failed is neither tried again nor reported."""

    def _fetch_failed(self, event: site_ev.FetchFailed) -> None:
        self.imports.discharge(event.key)


class ImportsOwnedByTheirBlocks(SiteCore):
    """What was imported for a block goes with it, as if it were the block's own; the hub counts on it."""

    def _unlink_inputs(self, block: SiteBlock) -> None:
        for key in block.spec.inputs:
            if (state := self.keys.get(key)) is not None and state.source:
                state.hub = False
        super()._unlink_inputs(block)


class LossNotReported(SiteCore):
    """What a lost worker had counts as being there."""

    def _keys_forgotten(self, event: site_ev.KeysForgotten) -> None:
        pass


class CrossingReportsForgotten(SiteCore):
    """A release takes what was made after the hub sent it as well."""

    def _release_keys(self, message: ReleaseKeys) -> None:
        super()._release_keys(replace(message, seen=None))


class BytesKeptForEver(SiteCore):
    """The agent's memory keeps every import."""

    def handle(self, event: site_ev.Event, now: float) -> list[site_ev.Command]:
        return [command for command in super().handle(event, now) if not isinstance(command, site_ev.DropBytes)]


# -- bugs of the hub's core --------------------------------------------------------------------------------------------


def with_ledger(ledger: type[Ledger]) -> type[HubCore]:
    """Return a hub core that keeps its books in another way."""

    class Changed(HubCore):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.ledger.__class__ = ledger

    return Changed


def with_dispatcher(dispatcher: type[Dispatcher]) -> type[HubCore]:
    """Return a hub core that dispatches in another way."""

    class Changed(HubCore):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.dispatcher.__class__ = dispatcher

    return Changed


def with_recovery(recovery: type[Recovery]) -> type[HubCore]:
    """Return a hub core that starts anew in another way."""

    class Changed(HubCore):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.recovery.__class__ = recovery

    return Changed


class AttemptsNotChecked(HubCore):
    """A report of any attempt counts as one of the present attempt."""

    def _attempt(self, site: SiteState, message: Any) -> BlockState | None:
        block = self.ledger.blocks.get(message.block)
        return block if block is not None and block.phase in (BlockPhase.PLACED, BlockPhase.RECALLING) else None


class CrashedSiteRemembered(HubCore):
    """What a crashed site had in memory still counts as being there."""

    def _site_left(self, event: hub_ev.SiteLeft) -> None:
        holders = {state.key: dict(state.holders) for state in self.ledger.keys.values()}
        super()._site_left(event)
        for state in self.ledger.keys.values():
            if state.phase is KeyPhase.HELD:
                state.holders = holders[state.key]


class BlockSentTwice(HubCore):
    """Now and then a block goes to a second site as well."""

    _rng = Random(0)

    def handle(self, event: hub_ev.Event, now: float) -> list[hub_ev.Command]:
        commands = super().handle(event, now)
        return [each for command in commands for each in (command, *self._elsewhere_too(command))]

    def _elsewhere_too(self, command: hub_ev.Command) -> Iterable[hub_ev.Command]:
        if isinstance(command, hub_ev.TellSite) and isinstance(command.message, RunBlock):
            others = [name for name in self.sites if name != command.site]
            if others and not command.message.imports and self._rng.random() < 0.1:
                yield replace(command, site=self._rng.choice(others))


class ReleaseOvertaken(HubCore):
    """What is released because of an event leaves after all else: a new import of the key overtakes the release."""

    def handle(self, event: hub_ev.Event, now: float) -> list[hub_ev.Command]:
        return sorted(super().handle(event, now), key=_is_release)


def _is_release(command: hub_ev.Command) -> bool:
    return isinstance(command, hub_ev.TellSite) and isinstance(command.message, ReleaseKeys)


class ConsumerNotCounted(Ledger):
    """The last input of a block is not kept for it."""

    def link_inputs(self, block: BlockState) -> None:
        super().link_inputs(block)
        for key in block.spec.inputs[-1:]:
            self.keys[key].consumers.pop(block.spec.id, None)


class ReplicaNotReleased(Ledger):
    """The hub forgets where else a key is."""

    def release_at(self, site: str, key: Key) -> None:
        if site == next(iter(self.keys[key].holders), site) if key in self.keys else True:
            super().release_at(site, key)

    def _drop_replicas(self, state: KeyState) -> None:
        for site in list(state.holders)[1:]:
            del state.holders[site]


class LineageOneLevelShort(Ledger):
    """What makes a lost key runs again, but not what makes its inputs, should those be gone too."""

    def demand(self, state: KeyState) -> None:
        block = self.blocks.get(state.producer or "")
        if block is not None and block.phase is BlockPhase.DONE:
            self.move_block(block, "needed again")
            self._link(block)
        else:
            super().demand(state)


class RerunCountedTwice(Ledger):
    """A key that is made once more counts as two inputs of those who wait for it."""

    def _remake(self, state: KeyState) -> None:
        self.__dict__.setdefault("remade", set()).add(state.key)
        super()._remake(state)

    def _input_exists(self, state: KeyState) -> None:
        super()._input_exists(state)
        if state.key in self.__dict__.get("remade", ()):
            super()._input_exists(state)


class PlacesBeforeResync(Recovery):
    """A hub that started anew places blocks though sites that may be at work at them are not back."""

    def may_place(self, now: float) -> bool:
        return True


class ReleasesBeforeResync(Recovery):
    """A hub that started anew takes what nobody wants yet for what nobody will want."""

    def tick(self, now: float) -> None:
        self.sites.clear()
        self.clients.clear()
        super().tick(now)


class SleepersForgotten(Recovery):
    """A client that sleeps while the hub starts anew loses its lease as soon as the sites are back."""

    def tick(self, now: float) -> None:
        if not self.sites:
            self.clients.clear()
        super().tick(now)


class LeavesWithItsKeys(Dispatcher):
    """A site that drains is let go while only it holds some keys."""

    def _hand_over(self, site: SiteState) -> None:
        site.leaving = True
        self.ledger.command(hub_ev.TellSite(site.name, CloseSite("drained")))


# -- bugs of the link --------------------------------------------------------------------------------------------------


class NoDedupe(Link[Any]):
    """What arrives is delivered, in whatever order and however often."""

    def _deliver(self, envelope: Envelope) -> list[Any]:
        self._received = max(self._received, envelope.seq + len(envelope.items))
        return list(envelope.items)


class NotSentAgain(Link[Any]):
    """What was lost stays lost."""

    def _queue_again(self) -> None:
        self._resend_at = inf


BUGS = {
    "import not awaited": Cores(site=ImportNotAwaited),
    "recall granted for a started block": Cores(site=RecallGrantedTooLate),
    "failed fetch forgotten": Cores(site=FailedFetchForgotten),
    "import treated as owned": Cores(site=ImportsOwnedByTheirBlocks),
    "lost worker not reported": Cores(site=LossNotReported),
    "release takes what crossed it": Cores(site=CrossingReportsForgotten),
    "bytes of imports kept": Cores(site=BytesKeptForEver),
    "block sent twice": Cores(hub=BlockSentTwice),
    "release overtaken by re-import": Cores(hub=ReleaseOvertaken),
    "consumer of an input not counted": Cores(hub=with_ledger(ConsumerNotCounted)),
    "replica not released": Cores(hub=with_ledger(ReplicaNotReleased)),
    "draining site lets keys go": Cores(hub=with_dispatcher(LeavesWithItsKeys)),
    "attempts not checked": Cores(hub=AttemptsNotChecked),
    "crashed site's holdings not forgotten": Cores(hub=CrashedSiteRemembered),
    "lineage one level short": Cores(hub=with_ledger(LineageOneLevelShort)),
    "re-run counted twice": Cores(hub=with_ledger(RerunCountedTwice)),
    "places before resync": Cores(hub=with_recovery(PlacesBeforeResync)),
    "releases before resync": Cores(hub=with_recovery(ReleasesBeforeResync)),
    "sleeping client forgotten": Cores(hub=with_recovery(SleepersForgotten)),
    "link delivers twice and out of order": Cores(link=NoDedupe),
    "link does not send again": Cores(link=NotSentAgain),
}


def first_broken(cores: Cores, seeds: range = SEEDS) -> tuple[int, Broken] | None:
    """Return the first seed whose history breaks a rule, and which."""
    for seed in seeds:
        try:
            Simulation(seed, cores).run()
        except Broken as broken:
            return seed, broken
    return None


@pytest.mark.parametrize("name", BUGS)
def test_histories_find(name: str) -> None:
    found = first_broken(replace(BUGS[name], check_every=0))
    assert found is not None, f"{name}: not found in {len(SEEDS)} histories"
    seed, broken = found
    assert not isinstance(broken.__cause__, BLUNDERS), f"{name} is badly written: {broken}"
    assert f"replay it: python -m tests.simulation.replay {seed}" in str(broken)


def test_without_a_bug_the_same_histories_are_clean() -> None:
    assert first_broken(Cores(check_every=0), SEEDS[:50]) is None
