"""What is said against tasks that may have killed workers or sites, and the verdicts. Pure; see :mod:`.suspicion`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from daskfed.hub.dispatch import SiteState
from daskfed.hub.ledger import BlockState, Ledger
from daskfed.hub.suspicion import GIVEN_UP, Suspicion, is_convicted
from daskfed.messages import Key, SiteHello

MOST_DEATHS = 100  # of sites that are remembered, in case those turn out to be alive

Charge = tuple[str, tuple[Key, ...]]
"""A block that ran when a site died, and the outputs that it was making."""


class Poison:
    """The suspicions against outputs of blocks."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._charges: dict[tuple[str, str], list[Charge]] = {}  # (site, incarnation) that was lost -> who was there

    def site_lost(self, site: SiteState) -> None:
        """A site is lost: one of the blocks that ran there may have killed it."""
        blocks = [block for name in site.blocks if (block := self.ledger.blocks[name]).started]
        charges = [(block.spec.id, tuple(block.open_outputs)) for block in blocks]
        self._charge(charges, 1)
        self._charges[site.name, site.hello.incarnation] = charges
        while len(self._charges) > MOST_DEATHS:
            del self._charges[next(iter(self._charges))]
        for block in blocks:
            self._judge(block, site.name)

    def _judge(self, block: BlockState, site: str) -> None:
        key = next(iter(block.open_outputs))
        if is_convicted(block.suspects[key], alone=len(block.open_outputs) == 1):
            why = f"{key!r}: {block.suspects[key].deaths} sites died while they made it, the last was {site!r}"
            self.ledger.fail_keys([self.ledger.keys[key]], "KilledSite", why)

    def site_joined(self, hello: SiteHello) -> None:
        """A site is there: if it is one that was lost, it was only away, and nothing has killed it."""
        self._charge(self._charges.pop((hello.site, hello.incarnation), ()), -1)

    def _charge(self, charges: Iterable[Charge], deaths: int) -> None:
        for name, keys in charges:
            if (block := self.ledger.blocks.get(name)) is not None:
                for key in keys:
                    block.suspects[key] = block.suspects.get(key, Suspicion(0)).more(deaths)

    def workers_died(self, site: SiteState, block: BlockState, keys: tuple[Key, ...], blame: Key) -> Collection[Key]:
        """A site's scheduler gave up ``blame``, and outputs with it; return those that are to be tried again, alone."""
        alone = len(block.open_outputs) == 1 and (block.spec.id in site.trials or len(site.blocks) == 1)
        for key in keys:
            block.suspects[key] = block.suspects.get(key, Suspicion(0)).more(GIVEN_UP, blame)
        verdict = block.suspects[keys[0]]
        if not is_convicted(verdict, alone):
            return keys
        pending = [state for state in self.ledger.pending_of(block) if state.key not in keys]
        likewise = [state for state in pending if _is_blamed(block, state.key, blame)]
        why = f"{blame!r}, which it needs or is, kills workers: {verdict.deaths} or more died of it"
        if likewise:
            self.ledger.fail_keys(likewise, "KilledSite", why)
        return ()


def _is_blamed(block: BlockState, key: Key, blame: Key) -> bool:
    """Whether an output of a block failed for the same task."""
    return key in block.suspects and block.suspects[key].blame == blame
