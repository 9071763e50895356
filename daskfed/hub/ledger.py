"""What the hub knows of keys and blocks, and who is interested in what. Pure.

A key is *needed* while a client wants it or an unfinished block takes it as an input. It *lives* while it is needed or
a finished block, some of whose outputs live, took it: then it is retired, its value is gone, but it can be made again.
A block lives while one of the keys that it is the producer of lives, as their recipe. Everything else follows: when the
need of a key ends, its value is released wherever it is; when the last that was made from it ends, so does the key, its
producer is cancelled or forgotten if nothing else of it lives, and so on up the graph. When a key that is needed is
lost, its producer runs again for the outputs that are missing, and so on up the graph as far as values are missing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from daskfed.errors import IllegalTransition
from daskfed.hub.events import (
    AskForData,
    Command,
    DropCopies,
    FailKeys,
    ForgetBlock,
    ForgetKeys,
    Outcome,
    TellClient,
    TellSite,
)
from daskfed.hub.keytable import KeyState, KeyTable, Rest, alone, rest
from daskfed.hub.states import BlockPhase, KeyPhase, next_block_phase, next_key_phase
from daskfed.hub.suspicion import Suspicion
from daskfed.messages import Attempt, BlockKind, BlockSpec, CancelBlock, HeldBlock, Key, ReleaseKeys, StopKeys

STORY_LENGTH = 2000  # moves kept for explanations and errors
MOST_FORMER = 2**14  # keys that ended lately and whose owner is still known
FIRST_REST_S = 0.1  # a block whose second attempt failed rests so long, and twice as long after each further one
LONGEST_REST_S = 5.0

AT_SITE = (BlockPhase.PLACED, BlockPhase.RECALLING)

Order: TypeAlias = tuple[bool, int, int]
"""Blocks are placed in this order: (no whole graph, -priority, arrival); arrivals grow, also with the hub's epoch."""


@dataclass(slots=True)
class BlockState:
    """One block."""

    spec: BlockSpec
    order: Order
    phase: BlockPhase = BlockPhase.WAITING
    attempt: Attempt = Attempt(0, 0)
    site: str | None = None  # where it is or was placed
    missing: int = 0  # inputs that are still pending
    open_outputs: set[Key] = field(default_factory=set)  # asked for in this attempt and not reported yet
    live: int = 0  # outputs that it is the producer of and that still live
    pending: int = 0  # those of them that are still to be made
    troubles: dict[str, int] = field(default_factory=dict)  # what ended attempts, no fault of its tasks -> how many
    rests_until: float = 0.0  # not to be placed again before, since it failed more than once
    expected_s: float = 0.0  # estimated seconds of one thread
    started: bool = False  # its tasks are with the site's scheduler
    wait: bool = False  # wait where no site meets its constraint
    suspects: dict[Key, Suspicion] = field(default_factory=dict)  # outputs that may have killed workers or sites

    @property
    def failures(self) -> int:
        """How many attempts ended through no fault of its tasks."""
        return sum(self.troubles.values())


@dataclass(slots=True)
class Crossing:
    """What a site was told that it may not have heard yet when it said what it holds."""

    released: set[Key] = field(default_factory=set)
    cancelled: dict[str, Attempt] = field(default_factory=dict)  # block -> its last attempt that was cancelled there

    def ends(self, held: HeldBlock) -> bool:
        """Say whether a site that holds this has been told to end it and to release what it made."""
        return held.block in self.cancelled and held.attempt <= self.cancelled[held.block]


class Ledger:
    """Keys, blocks, interest, and the commands that follow from their changes.

    ``out`` collects commands in order; :meth:`flush` returns and clears them, with messages to one receiver merged.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.now = 0.0  # seconds, as of the present event
        self.attempts = 0  # of the block that had most of them since the hub started
        self.crossing: dict[str, Crossing] = {}  # site that is to report its holdings -> what it was told since then
        self.patient = False  # somebody who is not back yet may bring what nobody can make
        self.keys = KeyTable()
        self.former: dict[Key, str] = {}  # key that ended lately -> its owner: what a site says of it may come later
        self.blocks: dict[str, BlockState] = {}
        self.wants: defaultdict[str, dict[Key, None]] = defaultdict(dict)  # client -> keys
        self.kept: defaultdict[str, dict[Key, None]] = defaultdict(dict)  # client -> keys of which it has a copy
        self.ready: list[BlockState] = []  # became ready since the dispatcher last looked
        self.unplaced: list[tuple[str, BlockState]] = []  # (site, block) that left its site since then
        self.reports: dict[str, int] = {}  # site -> KeysMade and KeysFailed of it that were taken in
        self.stories: deque[tuple[object, str]] = deque(maxlen=STORY_LENGTH)
        self._out: list[Command] = []
        self._tells: dict[tuple[str, Outcome, str, str | None], list[Key]] = {}
        self._releases: dict[str, list[Key]] = {}
        self._stops: dict[tuple[str, str, Attempt], list[Key]] = {}  # (site, block, attempt) -> not to be made
        self._forgotten: list[Key] = []
        self._demoted: list[BlockState] = []  # gave up being the producer of keys

    # -- moves -------------------------------------------------------------------------------------------------------

    def move_block(self, block: BlockState, move: str) -> None:
        """Make a legal move of a block; raises IllegalTransition with the block's story otherwise."""
        try:
            block.phase = next_block_phase(block.phase, move, block.spec.id)
        except IllegalTransition as exc:
            raise IllegalTransition(f"{exc}; its story: {self.story(block.spec.id)}") from None
        self.stories.append((block.spec.id, move))

    def move_key(self, key: KeyState, move: str) -> None:
        """Make a legal move of a key; raises IllegalTransition with the key's story otherwise."""
        before = key.phase
        try:
            key.phase = next_key_phase(before, move, key.key)
        except IllegalTransition as exc:
            raise IllegalTransition(f"{exc}; its story: {self.story(key.key)}") from None
        self.stories.append((key.key, move))
        if (producer := self.blocks.get(key.producer or "")) is not None:
            producer.pending += (key.phase is KeyPhase.PENDING) - (before is KeyPhase.PENDING)

    def story(self, name: object) -> list[str]:
        """Return the recent moves of a key or block, oldest first."""
        return [move for subject, move in self.stories if subject == name]

    # -- telling -----------------------------------------------------------------------------------------------------

    def tell(
        self, clients: Iterable[str], outcome: Outcome, key: Key, reason: str = "", msg: str | None = None
    ) -> None:
        """Tell clients how a key stands."""
        for client in clients:
            self._tells.setdefault((client, outcome, reason, msg), []).append(key)

    def command(self, command: Command) -> None:
        """Append a command after what was told and released so far."""
        self._merge()
        self._out.append(command)

    def release_at(self, site: str, key: Key) -> None:
        """Have a site release a key."""
        self._releases.setdefault(site, []).append(key)
        if site in self.crossing:
            self.crossing[site].released.add(key)

    def cancel_at(self, site: str, block: str, attempt: Attempt) -> None:
        """Have a site end an attempt and release what it made."""
        self.command(TellSite(site, CancelBlock(block, attempt)))
        if site in self.crossing:
            self.crossing[site].cancelled[block] = attempt

    def stop(self, state: KeyState) -> None:
        """Have the site that is making a key for a block, of which other outputs are needed, stop making it."""
        block = self.blocks.get(state.producer or "")
        if block is not None and block.phase in AT_SITE and state.key in block.open_outputs:
            self._stops.setdefault((str(block.site), block.spec.id, block.attempt), []).append(state.key)

    def flush(self) -> list[Command]:
        """Return the commands since the last flush, in order."""
        self._merge()
        self._send_stops()
        out, self._out = self._out, []
        return out

    def _send_stops(self) -> None:
        for (site, name, attempt), keys in self._stops.items():
            block = self.blocks.get(name)
            if block is not None and block.phase in AT_SITE and block.attempt == attempt:
                self._out.append(TellSite(site, StopKeys(name, attempt, tuple(keys))))
        self._stops = {}

    def _merge(self) -> None:
        for site, keys in self._releases.items():
            self._out.append(TellSite(site, ReleaseKeys(tuple(keys), self.reports.get(site, 0))))
        for (client, outcome, reason, msg), keys in self._tells.items():
            self._out.append(TellClient(client, outcome, tuple(keys), reason, msg))
        if self._forgotten:
            self._out.append(ForgetKeys(tuple(self._forgotten)))
        self._releases, self._tells, self._forgotten = {}, {}, []

    # -- making ------------------------------------------------------------------------------------------------------

    def add_block(self, spec: BlockSpec, order: Order, wait: bool) -> BlockState:
        """Register a block and become the producer of those of its outputs that nobody makes yet."""
        block = BlockState(spec, order, wait=wait)
        self.blocks[spec.id] = block
        new = rest(spec.owner, spec.id)
        for key in spec.outputs:
            state = self.keys.get(key)
            if state is None:
                self.keys.lay(key, new)
                block.live += 1
                block.pending += 1
                continue
            former = self.blocks.get(state.producer or "")
            if former is None and self.lacks_producer(state):
                self._make_producer(block, state)
            elif former is not None and order[-1] < former.order[-1]:
                self._give_up(former, state)
                self._make_producer(block, state)
        return block

    def revive_outputs(self, block: BlockState) -> list[Key]:
        """Know those outputs of a block again that were freed; their values are retired until somebody needs them."""
        freed = [key for key in block.spec.outputs if key not in self.keys]
        for key in freed:
            state = self.keys[key] = KeyState(key, block.spec.owner)
            self._make_producer(block, state)
            self.move_key(state, "retire")
        return freed

    def lacks_producer(self, state: KeyState) -> bool:
        """Whether no block makes a key that does not exist, and is to be made or may have to be."""
        if state.producer in self.blocks:
            return False
        return state.shielded or state.phase in (KeyPhase.PENDING, KeyPhase.RETIRED)

    def _make_producer(self, block: BlockState, state: KeyState) -> None:
        """Of the blocks that can make a key, the first that arrived is its producer: so no circle ever closes."""
        state.producer = block.spec.id
        state.owner = block.spec.owner  # others may have expected it
        block.live += 1
        block.pending += state.phase is KeyPhase.PENDING

    def orphan(self, state: KeyState) -> None:
        """No block makes a key any more; :meth:`rest_idle` sees to the one that did."""
        if (block := self.blocks.get(state.producer or "")) is not None:
            self._give_up(block, state)
            state.producer = None

    def hand_over(self, state: KeyState, maker: BlockState) -> None:
        """Have another block make a key from now on; :meth:`rest_idle` sees to the one that did."""
        self.orphan(state)
        self._make_producer(maker, state)
        if state.phase is KeyPhase.PENDING:
            self.demand(state)

    def _give_up(self, block: BlockState, state: KeyState) -> None:
        block.live -= 1
        block.pending -= state.phase is KeyPhase.PENDING
        self._demoted.append(block)

    def rest_idle(self, added: Iterable[BlockState]) -> None:
        """Once new blocks are linked: end those, new or demoted, that have nothing to make, or let them rest."""
        blocks, self._demoted = [*self._demoted, *added], []
        for block in blocks:
            if block.spec.id not in self.blocks:
                continue
            if self.patient and not block.live and block.phase not in AT_SITE:
                self._spare(block)
            else:
                self.settle(self._end_if_idle(block))

    def _spare(self, block: BlockState) -> None:
        """Keep a block of which others make everything: it may have to take over, once all are back."""
        self._demoted.append(block)
        if block.phase is not BlockPhase.DONE:
            self.settle(self._stand_down(block))

    def link_inputs(self, block: BlockState) -> None:
        """Count the block as a consumer of its inputs, have those made again that are gone, and see if it is ready."""
        for state in self._link(block):
            self.demand(state)

    def _link(self, block: BlockState) -> list[KeyState]:
        """Count the block as a consumer of its inputs and return those that must be made again for it."""
        revived = []
        block.missing = 0
        for key in block.spec.inputs:
            state = self.keys[key]
            state.heirs.pop(block.spec.id, None)
            state.add("consumers", block.spec.id)
            if state.phase is KeyPhase.RETIRED:
                self.move_key(state, "needed again")
                revived.append(state)
            block.missing += state.phase is KeyPhase.PENDING
        self._ready_if_complete(block)
        return revived

    def demand(self, state: KeyState) -> None:
        """See to it that a pending key is made, and first whatever is missing of what it is made from."""
        stack = [state]
        while stack:
            state = stack.pop()
            block = self.blocks.get(state.producer or "")
            if block is None and state.keeper is not None:
                self.command(AskForData(state.keeper, (state.key,)))
            elif block is None or (block.spec.stateful and block.phase is BlockPhase.DONE):
                self._lost_for_good(state)
            elif block.phase is BlockPhase.DONE:
                self.move_block(block, "needed again")
                stack.extend(self._link(block))

    def keep(self, state: KeyState, client: str) -> None:
        """A client keeps a copy of a key."""
        state.keeper = client
        self.kept[client][state.key] = None

    def keeper_left(self, client: str, keys: Iterable[Key] | None = None) -> None:
        """A client is gone with the copies that it kept, or has lost those of ``keys``."""
        kept = self.kept.get(client, {})
        for key in [key for key in (kept if keys is None else keys) if key in kept]:
            self._forget_copy(state := self.keys[key])
            if state.phase is KeyPhase.PENDING and state.producer is None:
                self._lost_for_good(state)

    def _drop_copy(self, state: KeyState) -> None:
        if state.keeper is None:
            return
        self.command(DropCopies(state.keeper, (state.key,)))
        self._forget_copy(state)

    def _forget_copy(self, state: KeyState) -> None:
        keeper, state.keeper = str(state.keeper), None
        del self.kept[keeper][state.key]
        if not self.kept[keeper]:
            del self.kept[keeper]

    def _lost_for_good(self, state: KeyState) -> None:
        if self.patient:
            return
        where = f"site {state.lost_at!r}" if state.lost_at else "its site"
        block = self.blocks.get(state.producer or "")
        advice = "create the actor again" if block else "scatter it with replicas=2, or keep its client connected"
        if block is not None and block.spec.kind is BlockKind.NESTED:
            advice = "have the task that submitted it run again"
        why = f"{state.key!r} was at {where}, which is gone, and cannot be computed again: {advice}"
        self.command(FailKeys((state.key,), "SiteLostError", why))
        self.key_failed(state)

    def _ready_if_complete(self, block: BlockState) -> None:
        if block.missing == 0 and block.phase is BlockPhase.WAITING:
            self.move_block(block, "inputs exist")
            self.ready.append(block)

    def key_made(self, state: KeyState, site: str, nbytes: int, claim: str) -> None:
        """A site holds this key now: tell who wants it and ready who needs it.

        ``claim`` says why it holds it: the id of the block that made it there, or ``"data"``.
        """
        was_pending = state.phase is KeyPhase.PENDING
        if state.phase is not KeyPhase.HELD:
            self.move_key(state, "made")
            self.tell(state.wanted_by, Outcome.IN_MEMORY, state.key)
            self._drop_failures(state, site)
            self._rest_producer(state)
        state.holders[site] = (*held, claim) if (held := state.holders.get(site)) else alone(claim)
        state.nbytes = nbytes
        if was_pending:
            self._input_exists(state)

    def resting_key_made(self, key: Key, resting: Rest, maker: BlockState, site: str, nbytes: int) -> bool:
        """A placed block has made a key that rests; returns False, and does nothing, unless it was to be made by it."""
        if resting.phase is not KeyPhase.PENDING or resting.producer != maker.spec.id:
            return False
        self.stories.append((key, "made"))
        maker.pending -= 1
        if resting.client is not None:
            self.tell((resting.client,), Outcome.IN_MEMORY, key)
        made = rest(resting.owner, resting.producer, KeyPhase.HELD, resting.client, site, nbytes)
        self.keys.lay(key, made)
        return True

    def _rest_producer(self, state: KeyState) -> None:
        """A key exists: a block that was to make it, and nothing else, need not run."""
        if (block := self.blocks.get(state.producer or "")) is not None:
            self.settle(self._end_if_idle(block))

    def _drop_failures(self, state: KeyState, maker: str) -> None:
        """A key that failed exists after all: sites that know of the failure are to forget it.

        Its maker, if it was told as well, may hear of it later still: it keeps the key, for one reason or the other.
        """
        told = maker in state.failed_at
        for site in state.failed_at:
            if site != maker:
                self.release_at(site, state.key)
        state.failed_at.clear()
        if told:
            state.add("failed_at", maker)

    def key_failed(self, state: KeyState) -> None:
        """The task of this key raised: tell who wants it; its consumers will fail from it in turn."""
        if state.phase is not KeyPhase.PENDING:
            return
        self.move_key(state, "failed")
        self.tell(state.wanted_by, Outcome.FAILED, state.key)
        self._input_exists(state)
        self._rest_producer(state)

    def _input_exists(self, state: KeyState) -> None:
        for name in state.consumers:
            block = self.blocks[name]
            block.missing -= 1
            self._ready_if_complete(block)

    def finish_if_done(self, block: BlockState) -> None:
        """End a block whose outputs are all settled; one that was lost meanwhile is made again."""
        if block.open_outputs:
            return
        self.move_block(block, "finished")
        block.open_outputs = set()  # the room of the former one
        self._leave_site(block)
        if block.pending:
            self.move_block(block, "needed again")
            self.link_inputs(block)
        else:
            self.settle(self._retired_inputs(block))

    def _retired_inputs(self, block: BlockState) -> list[Key]:
        """Note that a block needs its inputs no more, unless it has to run again."""
        for key in block.spec.inputs:
            state = self.keys[key]
            state.consumers.pop(block.spec.id, None)
            state.add("heirs", block.spec.id)
        return list(block.spec.inputs)

    def fail_block(self, block: BlockState, kind: str, reason: str) -> None:
        """Fail the open outputs of a block that cannot run, with an error of the hub's own."""
        self.fail_keys(self.pending_of(block), kind, reason)

    def fail_keys(self, states: Iterable[KeyState], kind: str, reason: str) -> None:
        """Fail keys that will not be made, with an error of the hub's own; ``kind`` names its class."""
        states = list(states)
        self.command(FailKeys(tuple(state.key for state in states), kind, reason))
        for state in states:
            self.key_failed(state)

    def pending_of(self, block: BlockState) -> list[KeyState]:
        """Return the outputs of a block that are still to be made."""
        return [state for state in self.produced_by(block) if state.phase is KeyPhase.PENDING]

    def produced_by(self, block: BlockState) -> list[KeyState]:
        """Return the outputs of a block that live and that no other block is the producer of."""
        states = [self.keys[key] for key in block.spec.outputs if key in self.keys]
        return [state for state in states if state.producer == block.spec.id]

    # -- losing ------------------------------------------------------------------------------------------------------

    def return_block(self, block: BlockState, move: str) -> None:
        """A placed block is back at the hub, to be placed again."""
        self.move_block(block, move)
        self._leave_site(block)
        if block.spec.kind is BlockKind.NESTED and move == "site lost":
            for state in self.pending_of(block):
                state.lost_at = str(block.site)
                self._lost_for_good(state)
        elif block.pending:
            self.link_inputs(block)
        else:
            self.settle(self._stand_down(block))

    def take_back(self, block: BlockState, trouble: str = "") -> None:
        """Stop the present attempt of a placed block, through no fault of its tasks, and place it again.

        Without a ``trouble``, or where what ended it is over, it need not rest before the next attempt.
        """
        self.cancel_at(str(block.site), block.spec.id, block.attempt)
        if trouble:
            block.troubles[trouble] = block.troubles.get(trouble, 0) + 1
        if block.failures > 1:
            block.rests_until = self.now + min(FIRST_REST_S * 2 ** (block.failures - 2), LONGEST_REST_S)
        self.return_block(block, "site lost")
        self.disclaim(block.spec.id, block.spec.outputs, str(block.site))

    def disclaim(self, block: str, keys: Iterable[Key], site: str) -> None:
        """A site released what it made for a cancelled attempt of a block, unless there is another reason for it."""
        for key in keys:
            state = self.keys.get(key)
            if state is None or block not in state.holders.get(site, ()):
                continue
            others = tuple(claim for claim in state.holders[site] if claim != block)
            if others:
                state.holders[site] = others
            else:
                if site in state.failed_at:
                    self.release_at(site, key)
                self.lose_key_at(state, site)

    def _leave_site(self, block: BlockState) -> None:
        if block.site is not None:
            self.unplaced.append((block.site, block))
        block.started = False

    def lose_key_at(self, state: KeyState, site: str) -> None:
        """A site no longer has this key; an import of it that is under way gets an answer of its own."""
        state.failed_at.pop(site, None)
        if site not in state.holders:
            return
        del state.holders[site]
        state.lost_at = site
        self._drop_references(state)
        if state.holders or state.phase is not KeyPhase.HELD:
            return
        self._remake(state)

    def _drop_references(self, state: KeyState) -> None:
        """Where an actor is gone, what other sites hold under its key is of no use."""
        block = self.blocks.get(state.producer or "")
        if block is None or not block.spec.stateful or block.spec.kind is BlockKind.NESTED:
            return
        if not any(state.producer in claims for claims in state.holders.values()):
            for site in state.holders:
                self.release_at(site, state.key)
            state.holders.clear()

    def _remake(self, state: KeyState) -> None:
        if not state.needed:
            self.settle(self._retire(state))
            return
        self.move_key(state, "lost")
        self.inputs_missing(state)
        self.demand(state)

    def inputs_missing(self, state: KeyState) -> None:
        """A key is not there any more: the blocks that need it have to wait."""
        for name in state.consumers:
            block = self.blocks[name]
            block.missing += 1
            if block.phase is BlockPhase.READY:
                self.move_block(block, "input lost")

    # -- interest ----------------------------------------------------------------------------------------------------

    def want(self, client: str, key: Key) -> None:
        """Count a client as wanting a key and tell it how the key stands, if that is known already."""
        resting = self.keys.at_rest(key)
        if resting is not None and resting.client is None and resting.phase is KeyPhase.PENDING:
            self.keys.lay(key, resting.wanted(client))
            self.wants[client][key] = None
            return
        state = self.keys[key]
        state.wanted_by[client] = None
        self.wants[client][state.key] = None  # and not ``key``: one copy of the name is enough
        if state.phase is KeyPhase.HELD:
            self.tell((client,), Outcome.IN_MEMORY, key)
        elif state.phase is KeyPhase.FAILED:
            self.tell((client,), Outcome.FAILED, key)
        elif state.phase is KeyPhase.RETIRED:
            self.move_key(state, "needed again")
            self.demand(state)

    def unwant(self, client: str, keys: Iterable[Key]) -> None:
        """A client no longer wants these keys."""
        wanted = self.wants[client]
        for key in keys:
            wanted.pop(key, None)
            if (resting := self.keys.at_rest(key)) is not None and resting.client in (client, None):
                self.keys.lay(key, resting.wanted(None))
            elif (state := self.keys.get(key)) is not None:
                state.wanted_by.pop(client, None)
        if not wanted:
            del self.wants[client]

    def settle(self, keys: Iterable[Key]) -> None:
        """Free those of ``keys`` that nobody needs any more, and whatever was needed only for them."""
        stack = list(keys)
        while stack:
            key = stack.pop()
            if (resting := self.keys.at_rest(key)) is not None and resting.client is not None:
                continue  # at one site
            state = self.keys.get(key)
            if state is None or state.consumers:
                continue
            if state.wanted_by:
                self._drop_replicas(state)
            elif state.shielded and state.phase is KeyPhase.HELD:
                continue
            elif state.heirs or state.shielded:
                stack.extend(self._retire(state))
            else:
                stack.extend(self._free(state))

    def _retire(self, state: KeyState) -> Iterable[Key]:
        """Nobody needs the value of a key, but what was made from it lives: release the value, keep the recipe."""
        self._release_everywhere(state)
        if state.phase not in (KeyPhase.PENDING, KeyPhase.HELD):  # the error of a failed key is kept: it is small
            return ()
        self.move_key(state, "retire")
        block = self.blocks.get(state.producer or "")
        return self._end_if_idle(block) if block is not None else ()

    def _release_everywhere(self, state: KeyState) -> None:
        for site in dict.fromkeys((*state.holders, *state.importing, *state.failed_at)):
            self.release_at(site, state.key)
        state.holders.clear()
        state.importing.clear()
        state.failed_at.clear()

    def _drop_replicas(self, state: KeyState) -> None:
        """Keep one copy of a key that is only wanted, not about to be used, or as many as were asked for.

        Also those at sites whose tasks want it: they hold it in the name ``site/client``.
        """
        sites = (*state.holders, *state.importing)
        tasks_at = {name.partition("/")[0] for name in state.wanted_by if "/" in name}
        for site in [name for name in sites[state.replicas :] if name not in tasks_at]:
            for places in (state.holders, state.importing, state.failed_at):
                places.pop(site, None)
            self.release_at(site, state.key)

    def _free(self, state: KeyState) -> Iterable[Key]:
        if state.phase is KeyPhase.PENDING:
            self.stop(state)
        self.move_key(state, "release")
        self._release_everywhere(state)
        del self.keys[state.key]
        self._forgotten.append(state.key)
        self._remember_owner(state)
        self._drop_copy(state)
        block = self.blocks.get(state.producer or "")
        if block is None:
            return ()
        block.live -= 1
        return self._end_if_idle(block)

    def _remember_owner(self, state: KeyState) -> None:
        self.former.pop(state.key, None)  # the order is that of their ends
        self.former[state.key] = state.owner
        if len(self.former) > MOST_FORMER:
            del self.former[next(iter(self.former))]

    def _end_if_idle(self, block: BlockState) -> Iterable[Key]:
        """End a block of which nothing lives; let one rest of which nothing is to be made. Return what it needed."""
        if block.live == 0:
            return self._forget(block) if block.phase is BlockPhase.DONE else self._cancel(block)
        if block.pending == 0 and block.phase in (BlockPhase.WAITING, BlockPhase.READY):
            return self._stand_down(block)
        return ()

    def _stand_down(self, block: BlockState) -> Iterable[Key]:
        self.move_block(block, "stand down")
        return self._retired_inputs(block)

    def _cancel(self, block: BlockState) -> Iterable[Key]:
        placed = block.phase in AT_SITE
        if placed:
            self.cancel_at(str(block.site), block.spec.id, block.attempt)
            self._leave_site(block)
        self.move_block(block, "cancel")
        self._drop(block)
        freed = list(self._unlinked(block))
        if placed:
            self.disclaim(block.spec.id, block.spec.outputs, str(block.site))
        return freed

    def _unlinked(self, block: BlockState) -> Iterable[Key]:
        for key in block.spec.inputs:
            if (state := self.keys.get(key)) is not None:
                state.consumers.pop(block.spec.id, None)
                state.heirs.pop(block.spec.id, None)
                yield key

    def _forget(self, block: BlockState) -> Iterable[Key]:
        self.move_block(block, "forget")
        self._drop(block)
        return list(self._unlinked(block))

    def _drop(self, block: BlockState) -> None:
        if self.blocks.pop(block.spec.id, None) is not None:
            self.command(ForgetBlock(block.spec.id, block.spec.client))
