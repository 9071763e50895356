"""After the hub started anew: whom it waits for, and how it takes in what clients and sites tell it. Pure.

A hub that starts anew knows from its journal which sites and clients there were. Sites go on with their work meanwhile
and then say what they hold (:class:`~daskfed.messages.SiteHoldings`), clients what they want and how it is made
(:class:`~daskfed.hub.events.ClientBack`). Until all are back, or the patience with them ends, no block is placed and no
key is lost; until then nothing is released either that an absent client may want. A client that sleeps is waited for
in this second way only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from daskfed.hub.arrivals import Arrivals
from daskfed.hub.cancelling import give_up
from daskfed.hub.dispatch import Dispatcher, SiteState
from daskfed.hub.events import TellSite
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import BlockState, Crossing, Ledger
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import HeldBlock, Key, ReportHoldings, SiteHoldings

DATA = "data"  # why a site holds a key that no block made there
PATIENCE_S = 10.0  # with sites, and with clients that were connected, before work is placed anew
LEASE_S = 3600.0  # with clients, before what they wanted is released


@dataclass(frozen=True, slots=True)
class Awaited:
    """Who was there before the hub started anew, and how long they are waited for."""

    sites: frozenset[str] = frozenset()  # names
    clients: Mapping[str, str] = field(default_factory=dict)  # id -> user
    patience_s: float = PATIENCE_S  # with sites and clients, before work is placed without them
    lease_s: float = LEASE_S  # with clients, before what they wanted is released


class Recovery:
    """Whom the hub waits for, and since when."""

    def __init__(
        self, ledger: Ledger, dispatcher: Dispatcher, arrivals: Arrivals, awaited: Awaited | None = None
    ) -> None:
        awaited = awaited or Awaited()
        self.ledger = ledger
        self.arrivals = arrivals
        self.dispatcher = dispatcher
        self.sites = set(awaited.sites)
        self.clients = dict(awaited.clients)
        self.asked: set[str] = set()  # sites that are to report their holdings anew
        self._asked_at = 0.0
        self._patience_s = awaited.patience_s
        self._lease_s = awaited.lease_s
        self._started: float | None = None
        self._settled = not (self.sites or self.clients)
        ledger.patient = not self._settled

    # -- waiting -----------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether nobody is waited for: what is unknown now does not exist."""
        return self._settled

    @property
    def sites_told(self) -> bool:
        """Whether all sites that were there before are back, or had time enough for it."""
        return not self.sites

    @property
    def waits_for_clients(self) -> bool:
        """Whether a client may still come back that wants what nobody here knows."""
        return bool(self.clients)

    def may_place(self, now: float) -> bool:
        """Say whether work may be placed: whoever may be at it already has told, or had time enough to do so."""
        if self._settled and not self.asked:
            return True
        return not self.asked and (now - self._since(now) >= self._patience_s or not (self.sites or self.clients))

    def _since(self, now: float) -> float:
        if self._started is None:
            self._started = now
        return self._started

    def tick(self, now: float) -> None:
        """See who need not be waited for any more."""
        if self._settled:
            return
        waited = now - self._since(now)
        if waited >= self._patience_s:
            self.sites.clear()
        if waited >= self._lease_s:
            self.clients.clear()
        if now - self._asked_at >= self._patience_s:
            self.asked.clear()  # an answer that comes later still is one from before what was released meanwhile
        if not (self.sites or self.clients):
            self._ask_sites(now)
            if not self.asked:
                self._settle()

    def site_gone(self, name: str, now: float) -> None:
        """A site that was to report will not."""
        self.asked.discard(name)
        self.ledger.crossing.pop(name, None)
        self.tick(now)

    def _settle(self) -> None:
        """Everybody is back, or will not come: what nobody makes is lost, and what nobody knows is released."""
        self._settled, self.ledger.patient = True, False
        shielded = [state for state in self.ledger.keys.values() if state.shielded]
        for state in shielded:
            state.shielded = False
        self.ledger.settle([state.key for state in shielded])
        self.arrivals.prefer_sound()
        self.arrivals.straighten(list(self.ledger.blocks.values()))
        self.ledger.rest_idle(())
        self.give_up(list(self.ledger.keys.values()))

    def give_up(self, states: Iterable[KeyState]) -> None:
        """End those of these keys that nobody makes and nobody will bring."""
        for state in [state for state in states if is_promise(state)]:
            if state.key in self.ledger.keys and is_promise(state):
                give_up(self.ledger, state)

    def _ask_sites(self, now: float) -> None:
        for site in self.dispatcher.sites.values():
            if site.unclaimed and site.name not in self.ledger.crossing:
                site.unclaimed = False
                self.ledger.crossing[site.name] = Crossing()
                self.asked.add(site.name)
                self._asked_at = now
                self.ledger.command(TellSite(site.name, ReportHoldings()))

    # -- clients -----------------------------------------------------------------------------------------------------

    def shield(self, blocks: Iterable[BlockState]) -> None:
        """Keep the outputs of blocks that a client brought back, even if it does not want them: others may."""
        if self._settled:
            return
        for block in blocks:
            for state in self.ledger.produced_by(block):
                state.shielded = True

    def client_back(self, client: str, now: float) -> None:
        """A client has told all that it knows."""
        if self.clients.pop(client, None) is not None:
            self._ask_sites(now)
            self.tick(now)

    # -- sites -------------------------------------------------------------------------------------------------------

    def take_holdings(self, site: SiteState, told: SiteHoldings, now: float) -> None:
        """Take in what a site holds and works at; what nobody needs is released, unless clients are awaited."""
        ledger = self.ledger
        ledger.reports[site.name] = told.reports
        self.dispatcher.imports = max([self.dispatcher.imports, *(each.number for each in told.coming)])
        crossing = ledger.crossing.setdefault(site.name, Crossing())  # with what it is told while this is taken in
        current = [block for block in told.blocks if not crossing.ends(block)]
        blocks = [block for block in current if self._take_block(site, block)]
        claims = _claims(told.placed, blocks)
        nbytes = {made.key: made.nbytes for made in told.held}
        for key in dict.fromkeys((*nbytes, *told.failed)):
            if key in claims and key not in crossing.released:
                self._take_key(site, key, nbytes.get(key), claims[key])
        for each in told.coming:
            if each.key not in crossing.released:
                self._take_coming(site, each.key, each.number)
        for block in blocks:
            self._adopt(site, block)
        del ledger.crossing[site.name]
        self.asked.discard(site.name)
        self.sites.discard(site.name)
        self.tick(now)

    def _take_block(self, site: SiteState, held: HeldBlock) -> bool:
        """Say whether a site may go on with a block; one that is made elsewhere, or that nobody needs, is stopped."""
        if not held.open or _is_at(site, held, self.ledger):
            return True
        block = self.ledger.blocks.get(held.block)
        if block is None and self.waits_for_clients:
            site.unclaimed = True
            return True
        if block is not None and _may_adopt(block, held):
            return True
        self._stop(site, held)
        return False

    def _stop(self, site: SiteState, held: HeldBlock) -> None:
        self.ledger.cancel_at(site.name, held.block, held.attempt)
        self.ledger.disclaim(held.block, held.kept, site.name)

    def _take_key(self, site: SiteState, key: Key, nbytes: int | None, claims: tuple[str, ...]) -> None:
        state = self.ledger.keys.get(key)
        if state is None and self.waits_for_clients:
            site.unclaimed = True
        elif state is None or not (state.needed or state.shielded):
            self.ledger.release_at(site.name, key)
        elif nbytes is None:
            self._take_failure(site, state)
        elif site.name in state.holders:
            state.holders[site.name] = tuple(dict.fromkeys((*state.holders[site.name], *claims)))
        else:
            state.importing.pop(site.name, None)
            for claim in claims:
                self.ledger.key_made(state, site.name, nbytes, claim)
            self.ledger.settle([key])

    def _take_failure(self, site: SiteState, state: KeyState) -> None:
        if state.phase is KeyPhase.HELD:
            self.ledger.release_at(site.name, state.key)
        else:
            state.add("failed_at", site.name)
            self.ledger.key_failed(state)

    def _take_coming(self, site: SiteState, key: Key, number: int) -> None:
        state = self.ledger.keys.get(key)
        if state is None and self.waits_for_clients:
            site.unclaimed = True
        elif state is None or not (state.needed or state.shielded):
            self.ledger.release_at(site.name, key)
            if state is not None:
                state.importing.pop(site.name, None)
        elif site.name not in state.holders:  # it may have been asked for once more while this was on its way
            state.add("importing", site.name, max(number, state.importing.get(site.name, 0)))

    def _adopt(self, site: SiteState, held: HeldBlock) -> None:
        block = self.ledger.blocks.get(held.block)
        if block is None or not held.open or _is_at(site, held, self.ledger):
            return
        if _may_adopt(block, held):
            self.dispatcher.adopt(block, site, held.attempt, held.open)
        else:  # what it was to make came from elsewhere meanwhile
            self._stop(site, held)


def _is_at(site: SiteState, held: HeldBlock, ledger: Ledger) -> bool:
    """Whether the hub knows that this site works at this attempt."""
    return held.block in site.blocks and ledger.blocks[held.block].attempt == held.attempt


def _may_adopt(block: BlockState, held: HeldBlock) -> bool:
    """Whether a block can go on where a site works at it: an attempt that this hub knows of has been taken back."""
    return block.phase in (BlockPhase.WAITING, BlockPhase.READY) and held.attempt > block.attempt


def _claims(placed: Iterable[Key], blocks: Iterable[HeldBlock]) -> dict[Key, tuple[str, ...]]:
    """Return why each key is at a site: the blocks that made it there, or ``data`` where it was placed there."""
    found: dict[Key, tuple[str, ...]] = {key: (DATA,) for key in placed}
    for block in blocks:
        for key in block.kept:
            found[key] = (*found.get(key, ()), block.block)
    return found


def is_promise(state: KeyState) -> bool:
    """Whether a key is expected though no block makes it."""
    return state.phase is KeyPhase.PENDING and state.producer is None
