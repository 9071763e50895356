"""The hub's decisions: one event and the time in, a list of commands out. No sockets, no clock, no randomness.

The ledger holds keys, blocks and who is interested in them; the dispatcher decides where ready blocks go. This module
is the switchboard between the two and the outside; the order in every step is: take in, release, place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from daskfed.hub import events as ev
from daskfed.hub import inspection
from daskfed.hub.arrivals import Arrivals
from daskfed.hub.cancelling import cancel_for, cancel_keys, give_up
from daskfed.hub.desertion import Desertion
from daskfed.hub.dispatch import Dispatcher, SiteState, unmet
from daskfed.hub.homes import Homes
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import AT_SITE, BlockState, Ledger
from daskfed.hub.placement import LowestCost, Policy
from daskfed.hub.poison import Poison
from daskfed.hub.recovery import DATA, Awaited, Recovery, is_promise
from daskfed.hub.retrying import retry_keys, revive_cancelled
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import (
    Attempt,
    BlockLost,
    BlockRecalled,
    BlockStarted,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    KeysStopped,
    Learned,
    Message,
    SiteHoldings,
    SiteStatus,
)

MAX_FAILURES = 40  # attempts of one block that end through no fault of its tasks
MAX_ALIKE = 10  # of them, that end for the same reason


class HubCore:
    """The federation's state, and what follows from each event.

    ``epoch`` goes up each time the hub starts; ``policy`` chooses sites (default: lowest estimated time to finish);
    ``awaited`` are those who were there before the hub started anew.
    """

    def __init__(self, epoch: int = 0, policy: Policy | None = None, awaited: Awaited | None = None) -> None:
        self.ledger = Ledger(epoch)
        self.arrivals = Arrivals(self.ledger)
        self.dispatcher = Dispatcher(self.ledger, policy or LowestCost())
        self.desertion = Desertion(self.ledger, self.dispatcher)
        self.poison = Poison(self.ledger)
        self.clients: dict[str, str] = {}  # client -> owner
        self.homes = Homes(self.ledger, self.dispatcher, self.clients)
        self.recovery = Recovery(self.ledger, self.dispatcher, self.arrivals, awaited)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            ev.ClientJoined: self._client_joined,
            ev.ClientLeft: self._client_left,
            ev.ClientBack: self._client_back,
            ev.BlocksSubmitted: self._blocks_submitted,
            ev.KeysDesired: self._keys_desired,
            ev.KeysReleased: self._keys_released,
            ev.KeysCancelled: self._keys_cancelled,
            ev.KeysRetried: self._keys_retried,
            ev.KeysScattered: self._keys_scattered,
            ev.CopiesGone: self._copies_gone,
            ev.KeysNeeded: self._keys_needed,
            ev.SiteJoined: self._site_joined,
            ev.SiteReach: self._site_reach,
            ev.SiteServes: self._site_serves,
            ev.SiteLeft: self._site_left,
            ev.FromSite: self._from_site,
            ev.Tick: self._tick,
        }
        self._from_site_handlers: dict[type[Message], Callable[[SiteState, Any], None]] = {
            SiteStatus: self._site_status,
            SiteHoldings: self._site_holdings,
            BlockStarted: self._block_started,
            BlockRecalled: self._block_recalled,
            KeysMade: self._keys_made,
            KeysFailed: self._keys_failed,
            KeysStopped: self._keys_stopped,
            BlockLost: self._block_lost,
            KeyImported: self._key_imported,
            ImportFailed: self._import_failed,
            KeysLost: self._keys_lost,
            Learned: self._learned,
        }

    @property
    def sites(self) -> dict[str, SiteState]:
        """The sites, by name."""
        return self.dispatcher.sites

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take in one event at time ``now`` (seconds, any origin) and return what is to be done, in order.

        Raises IllegalTransition where an event asks for a move that the tables do not have: always a bug.
        """
        self.ledger.now = now
        self._handlers[type(event)](event)
        if self.recovery.may_place(now):
            self.dispatcher.place()
        else:
            self.dispatcher.update()
        self.ledger.keys.put_to_rest()
        return self.ledger.flush()

    def check(self) -> None:
        """Verify every invariant; raises AssertionError naming the first that is broken."""
        inspection.check(self.ledger, self.dispatcher)

    # -- clients -----------------------------------------------------------------------------------------------------

    def _client_joined(self, event: ev.ClientJoined) -> None:
        self.clients[event.client] = event.owner

    def _client_left(self, event: ev.ClientLeft) -> None:
        self.clients.pop(event.client, None)
        self.homes.forget(event.client)
        keys = list(self.ledger.wants.get(event.client, ()))
        self.ledger.unwant(event.client, keys)
        self.ledger.keeper_left(event.client)
        self.ledger.settle(keys)
        self.recovery.client_back(event.client, self.ledger.now)

    def _client_back(self, event: ev.ClientBack) -> None:
        self.clients[event.client] = event.owner
        wanted = dict.fromkeys(event.wanted)
        stale = [key for key in self.ledger.wants.get(event.client, ()) if key not in wanted]
        added, revived = self.arrivals.brought_back(event.client, event.blocks)
        if event.client not in self.recovery.clients:
            self._number_anew(added)
        self.recovery.shield(added)
        self._want(event.client, event.wanted)
        for key in event.kept:
            if not self.recovery.settled:
                self._promise(key, event.owner)
            if (state := self.ledger.keys.get(key)) is not None:
                self.ledger.keep(state, event.client)
                if self.recovery.settled and is_promise(state):  # it may have missed that it was asked for it
                    give_up(self.ledger, state)
            else:
                self.ledger.command(ev.DropCopies(event.client, (key,)))
        self.ledger.unwant(event.client, stale)
        self._link(added)
        self._fail_refused(event.refused)
        self.ledger.settle([*stale, *revived, *(key for block in added for key in block.spec.outputs)])
        self.recovery.client_back(event.client, self.ledger.now)

    def _number_anew(self, blocks: Iterable[BlockState]) -> None:
        """Begin with attempts that were never made: this hub may have had these blocks placed, and forgotten them."""
        for block in blocks:
            block.attempt = Attempt(self.ledger.epoch, self.ledger.attempts)

    def _blocks_submitted(self, event: ev.BlocksSubmitted) -> None:
        named = (key for spec in event.blocks for key in (*spec.inputs, *spec.outputs))
        revive_cancelled(self.ledger, (*named, *event.wanted))
        added = self.arrivals.submitted(event.client, event.blocks, event.wait)
        self._want(event.client, event.wanted)
        self._link(added)
        self._fail_refused(event.refused)
        self.ledger.settle([key for block in added for key in block.spec.outputs])

    def _fail_refused(self, refused: Iterable[tuple[str, str]]) -> None:
        for name, why in refused:
            if (block := self.ledger.blocks.get(name)) is not None:
                self.ledger.fail_block(block, "UnknownWorkerError", f"{block.spec.label or name}: {why}")

    def _want(self, client: str, keys: Iterable[Key]) -> None:
        for key in keys:
            if not self.recovery.settled:
                self._promise(key, self.clients.get(client, ""))
            if key in self.ledger.keys:
                self.ledger.want(client, key)
            else:
                self.ledger.tell((client,), ev.Outcome.LOST, key, "lost dependencies")

    def _link(self, added: list[BlockState]) -> None:
        """Link new blocks to their inputs, and then refuse those that cannot run.

        In this order, as an input that a refused block shares with others would else seem to be needed by nobody.
        """
        self._link_or_refuse(added)
        self.ledger.rest_idle(added)

    def _link_or_refuse(self, added: list[BlockState]) -> None:
        refused: list[tuple[BlockState, list[Key], str | None]] = []
        for block in added:
            if not self.recovery.settled:
                self._promise_inputs(block)
            lost = [key for key in block.spec.inputs if key not in self.ledger.keys]
            problem = self._unmet(block)
            if lost or problem:
                refused.append((block, lost, problem))
            else:
                self.ledger.link_inputs(block)
        for block, lost, problem in refused:
            if block.spec.id in self.ledger.blocks:
                self._refuse(block, lost, problem)
        self.recovery.give_up(self.arrivals.straighten(added))

    def _promise_inputs(self, block: BlockState) -> None:
        for key in block.spec.inputs:
            self._promise(key, block.spec.owner)

    def _promise(self, key: Key, owner: str) -> None:
        """Note a key that somebody who is not back yet may know."""
        if key not in self.ledger.keys:
            self.ledger.keys[key] = KeyState(key, owner, shielded=True)

    def _unmet(self, block: BlockState) -> str | None:
        hellos = [site.hello for site in self.sites.values()]
        return unmet(block.spec.constraint, hellos) if hellos and not block.wait else None

    def _refuse(self, block: BlockState, lost: list[Key], problem: str | None) -> None:
        if lost:
            own = [state.key for state in self.ledger.produced_by(block)]
            cancel_keys(self.ledger, own, f"lost dependencies: {lost[:3]}")
        else:
            self.ledger.fail_block(block, "UnknownSiteError", f"{block.spec.label or block.spec.id}: {problem}")

    def _keys_desired(self, event: ev.KeysDesired) -> None:
        revive_cancelled(self.ledger, event.keys)
        for key in event.keys:
            if key not in self.ledger.keys:
                owner = self.clients.get(event.client, "")
                self.ledger.keys[key] = KeyState(key, owner)  # a promise: its graph is still on the way
            self.ledger.want(event.client, key)

    def _keys_released(self, event: ev.KeysReleased) -> None:
        self.ledger.unwant(event.client, event.keys)
        self.ledger.settle(event.keys)

    def _keys_cancelled(self, event: ev.KeysCancelled) -> None:
        cancel_for(self.ledger, event.client, event.keys, event.force, event.reason, event.msg)

    def _keys_retried(self, event: ev.KeysRetried) -> None:
        retry_keys(self.ledger, event.keys)

    def _keys_scattered(self, event: ev.KeysScattered) -> None:
        for key, nbytes in event.keys:
            state = self.ledger.keys.get(key)
            if state is None and event.again:
                self.ledger.release_at(event.site, key)
                continue
            if state is None:
                state = self.ledger.keys[key] = KeyState(key, self.clients.get(event.client, ""))
            if event.kept:
                self.ledger.keep(state, event.client)
            if event.replicas > 1:
                state.replicas = event.replicas
                self.dispatcher.replicated[key] = None
            state.importing.pop(event.site, None)
            self.ledger.key_made(state, event.site, nbytes, DATA)
            if event.client not in state.wanted_by and not event.again:
                self.ledger.want(event.client, key)
            if event.site not in self.sites:  # it left while the data was under way
                self.ledger.lose_key_at(state, event.site)
        if event.again:
            self.ledger.settle([key for key, _ in event.keys])

    def _copies_gone(self, event: ev.CopiesGone) -> None:
        self.ledger.keeper_left(event.client, event.keys)

    def _keys_needed(self, event: ev.KeysNeeded) -> None:
        if (site := self.sites.get(event.site)) is not None:
            for key in event.keys:
                self.dispatcher.bring_key(key, site)

    # -- sites -------------------------------------------------------------------------------------------------------

    def _site_joined(self, event: ev.SiteJoined) -> None:
        hello = event.hello
        self.dispatcher.add_site(hello)
        self.ledger.reports[hello.site] = 0
        self.poison.site_joined(hello)
        self.homes.find()

    def _site_reach(self, event: ev.SiteReach) -> None:
        if (site := self.sites.get(event.site)) is not None:
            site.away = event.away

    def _site_serves(self, event: ev.SiteServes) -> None:
        if event.site in self.sites:
            self.dispatcher.share_site(event.site, event.serves)

    def _site_left(self, event: ev.SiteLeft) -> None:
        site = self.sites.get(event.site)
        if site is None or site.hello.incarnation != event.incarnation:
            return
        blocks = [self.ledger.blocks[name] for name in site.blocks]
        self.poison.site_lost(site)
        for block in blocks:
            self.ledger.return_block(block, "site lost")
        self.dispatcher.update()
        self.dispatcher.remove_site(event.site)
        del self.ledger.reports[event.site]
        for state in list(self.ledger.keys.at(event.site)):
            state.importing.pop(event.site, None)
            self.ledger.lose_key_at(state, event.site)
        self.homes.find()
        self.recovery.site_gone(event.site, self.ledger.now)

    def _from_site(self, event: ev.FromSite) -> None:
        site = self.sites.get(event.site)
        if site is not None:
            self.ledger.reports[event.site] += isinstance(event.message, (KeysMade, KeysFailed))
            self._from_site_handlers[type(event.message)](site, event.message)

    def _site_status(self, site: SiteState, message: SiteStatus) -> None:
        site.status = message
        self._tick()

    def _site_holdings(self, site: SiteState, message: SiteHoldings) -> None:
        self.recovery.take_holdings(site, message, self.ledger.now)

    def _tick(self, event: ev.Tick | None = None) -> None:
        self.recovery.tick(self.ledger.now)
        if not self.recovery.may_place(self.ledger.now):
            return
        self.desertion.tick()
        self.dispatcher.place()
        self.dispatcher.balance()
        self.dispatcher.hand_over()
        self.dispatcher.replicate()
        for block in self.dispatcher.stranded():
            self._strand(block)

    def _strand(self, block: BlockState) -> None:
        constraint = block.spec.constraint
        problem = unmet(constraint, [site.hello for site in self.sites.values()]) or f"no site meets {constraint}"
        waited = f"waited {block.spec.patience_s:g} s (daskfed.client.site-timeout)"
        self.ledger.fail_block(block, "UnknownSiteError", f"{block.spec.label or block.spec.id}: {problem}; {waited}")

    def _learned(self, site: SiteState, message: Learned) -> None:
        for prefix, count, seconds in message.durations:
            self.dispatcher.functions.learn_duration(prefix, count, seconds)
        for prefix, count, nbytes in message.sizes:
            self.dispatcher.functions.learn_size(prefix, count, nbytes)
        self.dispatcher.relearn()

    # -- blocks at sites ---------------------------------------------------------------------------------------------

    def _attempt(self, site: SiteState, message: Any) -> BlockState | None:
        """Return the block that a report is about, or None where the report is of an attempt that ended."""
        block = self.ledger.blocks.get(message.block)
        if block is not None and block.phase in AT_SITE and block.attempt == message.attempt:
            return block
        self.ledger.command(ev.DropReport(site.name, message.block, message.attempt))
        return None

    def _block_started(self, site: SiteState, message: BlockStarted) -> None:
        if (block := self._attempt(site, message)) is not None:
            block.started = True

    def _block_recalled(self, site: SiteState, message: BlockRecalled) -> None:
        block = self._attempt(site, message)
        if block is None:
            return
        if message.given:
            self.ledger.return_block(block, "given back")
        elif block.phase is BlockPhase.RECALLING:
            self.ledger.move_block(block, "too late")
            block.started = True
            self.dispatcher.recall_ended(block)

    def _keys_made(self, site: SiteState, message: KeysMade) -> None:
        block = self._attempt(site, message)
        if block is None:
            return
        for made in message.keys:
            block.open_outputs.discard(made.key)
            resting = self.ledger.keys.at_rest(made.key)
            if resting is not None and self.ledger.resting_key_made(made.key, resting, block, site.name, made.nbytes):
                continue
            state = self.ledger.keys.get(made.key)
            if state is None or state.phase is KeyPhase.RETIRED:
                self.ledger.release_at(site.name, made.key)
            else:
                asked_for = site.name in state.importing
                state.importing.pop(site.name, None)
                self.ledger.key_made(state, site.name, made.nbytes, block.spec.id)
                if asked_for:  # then the site keeps it, whatever becomes of the block
                    state.holders[site.name] += (DATA,)
        self.ledger.finish_if_done(block)
        self.ledger.settle([made.key for made in message.keys])

    def _keys_failed(self, site: SiteState, message: KeysFailed) -> None:
        block = self._attempt(site, message)
        if block is None:
            return
        again = self._to_try_again(site, block, message)
        for key in message.keys:
            block.open_outputs.discard(key)
            state = self.ledger.keys.get(key)
            if state is None or _exists_elsewhere(state, site.name) or key in again:
                if state is None or site.name not in state.importing:  # else the site forgets the failure by itself
                    self.ledger.release_at(site.name, key)
            else:
                state.add("failed_at", site.name)
                self.ledger.key_failed(state)
        self.ledger.finish_if_done(block)

    def _keys_stopped(self, site: SiteState, message: KeysStopped) -> None:
        if (block := self._attempt(site, message)) is not None:
            block.open_outputs.difference_update(message.keys)
            self.ledger.finish_if_done(block)

    def _to_try_again(self, site: SiteState, block: BlockState, message: KeysFailed) -> Collection[Key]:
        """Return the outputs that failed since workers died, and may be innocent."""
        if message.blame is None:
            return ()
        return self.poison.workers_died(site, block, message.keys, message.blame)

    def _block_lost(self, site: SiteState, message: BlockLost) -> None:
        if (block := self._attempt(site, message)) is not None:
            self._bring_failures_anew(block, site.name)
            self._again(block, message.reason)
        elif message.block not in self.ledger.blocks or message.attempt.epoch < self.ledger.epoch:
            # what it made was learnt from the site, and perhaps when its client was not back yet
            made = [key for key, known in self.ledger.keys.peeks() if site.name in known.holders]
            self.ledger.disclaim(message.block, made, site.name)

    def _bring_failures_anew(self, block: BlockState, site: str) -> None:
        """A scheduler does not know the keys of a graph that it could not open: it needs their errors as imports."""
        failed = [state for key in block.spec.inputs if (state := self.ledger.keys[key]).phase is KeyPhase.FAILED]
        for state in failed:
            if state.failed_at.pop(site, True) is None:
                self.ledger.release_at(site, state.key)

    def _again(self, block: BlockState, reason: str, blameless: bool = False) -> None:
        self.ledger.take_back(block, "" if blameless else reason)
        if block.failures >= MAX_FAILURES or block.troubles.get(reason, 0) >= MAX_ALIKE:
            why = f"{block.spec.label or block.spec.id}: given up after {block.failures} attempts: {reason}"
            self.ledger.fail_block(block, "TransferError", why)

    # -- keys at sites -----------------------------------------------------------------------------------------------

    def _key_imported(self, site: SiteState, message: KeyImported) -> None:
        if message.source:
            link = (message.source, site.name, message.nbytes, message.seconds, message.relayed)
            self.dispatcher.links.learn(*link)
        site.copying.discard(message.key)
        state = self.ledger.keys.get(message.key)
        if state is None or site.leaving or state.importing.get(site.name) != message.number:
            return
        state.importing.pop(site.name, None)
        self.ledger.key_made(state, site.name, state.nbytes or message.nbytes, DATA)
        self._hand_off(state)

    def _hand_off(self, state: KeyState) -> None:
        """A draining site need not hold what another site has."""
        leaving = [name for name in state.holders if (s := self.sites.get(name)) is not None and s.draining]
        for name in leaving[: len(state.holders) - 1]:
            del state.holders[name]
            state.failed_at.pop(name, None)
            self.ledger.release_at(name, state.key)

    def _import_failed(self, site: SiteState, message: ImportFailed) -> None:
        site.copying.discard(message.key)
        state = self.ledger.keys.get(message.key)
        if state is None or state.importing.get(site.name) != message.number:
            return
        state.importing.pop(site.name, None)
        self.ledger.release_at(site.name, message.key)
        source_lost = message.source not in state.holders
        for name in [name for name in site.blocks if name in state.consumers]:
            why = f"{message.key!r} could not be brought in: {message.reason}"
            self._again(self.ledger.blocks[name], why, blameless=source_lost)

    def _keys_lost(self, site: SiteState, message: KeysLost) -> None:
        for key in message.keys:
            if (state := self.ledger.keys.get(key)) is not None:
                told_anew = site.name in state.failed_at  # of the failure
                put_anew = DATA in state.holders.get(site.name, ()) and site.name not in state.importing
                if told_anew or put_anew:  # it may have been, while this was on its way
                    self.ledger.release_at(site.name, key)
                self.ledger.lose_key_at(state, site.name)

    # -- answers -----------------------------------------------------------------------------------------------------

    def explain(self, key: Key) -> dict[str, Any]:
        """Return why a key waits, or where and why it ran: its phase, sites, block, and what stands in its way."""
        return inspection.explain(self.ledger, self.dispatcher, key)


def _exists_elsewhere(state: KeyState, site: str) -> bool:
    """Whether the failure of a key at ``site`` is of no interest: it is held elsewhere, or its value is not needed."""
    return state.phase is KeyPhase.RETIRED or (state.phase is KeyPhase.HELD and site not in state.holders)
