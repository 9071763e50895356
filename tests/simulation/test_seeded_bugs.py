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
from daskfed.hub.ledger import BlockState, KeyState, Ledger
from daskfed.link import Envelope, Link
from daskfed.messages import BlockRecalled, CloseSite, Key, RecallBlock, ReleaseKeys, RunBlock
from daskfed.site import events as site_ev
from daskfed.site.core import SiteCore
from daskfed.site.records import BlockState as SiteBlock
from tests.simulation.federation import Broken, Cores, Simulation

SEEDS = range(100)


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


class BytesKeptForEver(SiteCore):
    """The agent's memory keeps every import."""

    def handle(self, event: site_ev.Event, now: float) -> list[site_ev.Command]:
        return [command for command in super().handle(event, now) if not isinstance(command, site_ev.DropBytes)]


# -- bugs of the hub's core --------------------------------------------------------------------------------------------


def with_ledger(ledger: type[Ledger]) -> type[HubCore]:
    """Return a hub core that keeps its books in another way."""

    class Changed(HubCore):
        def __init__(self, epoch: int = 0) -> None:
            super().__init__(epoch)
            self.ledger.__class__ = ledger

    return Changed


def with_dispatcher(dispatcher: type[Dispatcher]) -> type[HubCore]:
    """Return a hub core that dispatches in another way."""

    class Changed(HubCore):
        def __init__(self, epoch: int = 0) -> None:
            super().__init__(epoch)
            self.dispatcher.__class__ = dispatcher

    return Changed


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
    "bytes of imports kept": Cores(site=BytesKeptForEver),
    "block sent twice": Cores(hub=BlockSentTwice),
    "release overtaken by re-import": Cores(hub=ReleaseOvertaken),
    "consumer of an input not counted": Cores(hub=with_ledger(ConsumerNotCounted)),
    "replica not released": Cores(hub=with_ledger(ReplicaNotReleased)),
    "draining site lets keys go": Cores(hub=with_dispatcher(LeavesWithItsKeys)),
    "link delivers twice and out of order": Cores(link=NoDedupe),
    "link does not send again": Cores(link=NotSentAgain),
}


def first_broken(cores: Cores) -> tuple[int, str] | None:
    """Return the first seed whose history breaks a rule, and which."""
    for seed in SEEDS:
        try:
            Simulation(seed, cores).run()
        except Broken as broken:
            return seed, str(broken)
    return None


@pytest.mark.parametrize("name", BUGS)
def test_histories_find(name: str) -> None:
    found = first_broken(replace(BUGS[name], check_every=0))
    assert found is not None, f"{name}: not found in {len(SEEDS)} histories"
    assert f"replay it: python -m tests.simulation.replay {found[0]}" in found[1]


def test_without_a_bug_the_same_histories_are_clean() -> None:
    assert first_broken(Cores(check_every=0)) is None
