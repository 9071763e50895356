"""A site's decisions: one event and the time in, a list of commands out. No sockets, no clock, no randomness.

A key is here because the hub asked for it (``hub``), because a block that was given to the scheduler makes it
(``makers``) or made it (``made_by``), or because an unfinished block needs it (``users``); when the last of these
reasons goes, the key is released. A block waits until all its inputs are with the scheduler, queues by priority, and is
submitted as soon as the scheduler runs low; until then it can be recalled.

What the hub may rely on: each import is answered by one KeyImported or ImportFailed, unless it is released first; if
its value cannot be opened here, it fails whatever uses it, and the answer comes when it is no longer here; each output
of an attempt is reported once; a block that is cancelled or lost takes everything with it that it made, unless there is
another reason to have it here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from daskfed.errors import IllegalTransition
from daskfed.messages import (
    Attempt,
    BlockLost,
    BlockRecalled,
    BlockStarted,
    CancelBlock,
    CloseSite,
    CopyKeys,
    HeldBlock,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    KeysStopped,
    MadeKey,
    RecallBlock,
    ReleaseKeys,
    ReportHoldings,
    RunBlock,
    SiteHoldings,
    StopKeys,
)
from daskfed.site import events as ev
from daskfed.site import inspection
from daskfed.site.budget import ImportQueue, Runway
from daskfed.site.records import BlockState, KeyState
from daskfed.site.states import (
    AT_SCHEDULER,
    COMING,
    LOSSES,
    RECALLABLE,
    UNFINISHED,
    BlockPhase,
    KeyPhase,
    next_block_phase,
    next_key_phase,
)

IMPORT_BUDGET = 256 * 2**20  # bytes of imports that may be on their way or in the agent's memory at once
FETCH_TRIES = 3  # of an import from one source, before the hub is told that it failed
STORY_LENGTH = 2000  # moves kept for errors


class SiteCore:
    """One site: its keys and blocks, and what follows from each event.

    ``import_budget`` bounds the bytes of imports that are on their way or in the agent's memory.
    """

    def __init__(self, import_budget: int = IMPORT_BUDGET) -> None:
        self.keys: dict[Key, KeyState] = {}
        self.blocks: dict[str, BlockState] = {}
        self.imports = ImportQueue(import_budget)
        self.runway = Runway()
        self.closed = False
        self.stories: deque[tuple[object, str]] = deque(maxlen=STORY_LENGTH)
        self._queue: list[tuple[tuple[int, int], str, Attempt]] = []
        self._arrivals = 0
        self._reports = 0  # KeysMade and KeysFailed that were told so far
        self._out: list[ev.Command] = []
        self._releases: list[Key] = []
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            RunBlock: self._run_block,
            RecallBlock: self._recall_block,
            CancelBlock: self._cancel_block,
            StopKeys: self._stop_keys,
            ReleaseKeys: self._release_keys,
            CopyKeys: self._copy_keys,
            ReportHoldings: self._report_holdings,
            CloseSite: self._close_site,
            ev.KeysReady: self._keys_ready,
            ev.KeysErred: self._keys_erred,
            ev.KeysForgotten: self._keys_forgotten,
            ev.KeysMissing: self._keys_missing,
            ev.KeysScattered: self._keys_scattered,
            ev.Load: self._load,
            ev.Fetched: self._fetched,
            ev.FetchFailed: self._fetch_failed,
        }

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take in one event at time ``now`` (seconds, any origin) and return what is to be done, in order.

        Raises IllegalTransition where an event asks for a move that the tables do not have: always a bug.
        """
        if not self.closed:
            self._handlers[type(event)](event)
            self._start_fetches()
            self._submit_queued()
        self._flush_releases()
        out, self._out = self._out, []
        return out

    def holdings(self) -> SiteHoldings:
        """Return what the site holds and works at, as the hub would have to know it."""
        known = [state for state in self.keys.values() if state.hub or state.made_by]
        held = [state for state in known if state.phase is KeyPhase.HELD]
        failed = [state for state in known if state.phase is KeyPhase.FAILED and not state.unopened]
        coming = [state for state in self.keys.values() if state.announce or state.unopened]  # never to be answered
        return SiteHoldings(
            held=tuple(MadeKey(state.key, state.nbytes) for state in held),
            failed=tuple(state.key for state in failed),
            placed=tuple(state.key for state in (*held, *failed) if state.hub),
            coming=tuple(Import(s.key, s.source, s.nbytes, number=s.number) for s in coming),
            blocks=tuple(
                HeldBlock(name, block.attempt, tuple(block.open), tuple(block.kept))
                for name, block in self.blocks.items()
            ),
            reports=self._reports,
        )

    def _report_holdings(self, message: ReportHoldings) -> None:
        self._tell(self.holdings())

    def story(self, name: object) -> list[str]:
        """Return the recent moves of a key or block, oldest first."""
        return [move for subject, move in self.stories if subject == name]

    def holds(self, key: Key) -> bool:
        """Say whether the site has a key in memory, as far as it knows."""
        state = self.keys.get(key)
        return state is not None and state.phase is KeyPhase.HELD

    # -- moves and commands ------------------------------------------------------------------------------------------

    def _move_key(self, state: KeyState, move: str) -> None:
        try:
            state.phase = next_key_phase(state.phase, move, state.key)
        except IllegalTransition as exc:
            raise IllegalTransition(f"{exc}; its story: {self.story(state.key)}") from None
        self.stories.append((state.key, move))

    def _move_block(self, block: BlockState, move: str) -> None:
        try:
            block.phase = next_block_phase(block.phase, move, block.spec.id)
        except IllegalTransition as exc:
            raise IllegalTransition(f"{exc}; its story: {self.story(block.spec.id)}") from None
        self.stories.append((block.spec.id, move))

    def _command(self, command: ev.Command) -> None:
        if isinstance(command, ev.SubmitBlock | ev.SubmitImport):  # the scheduler must see what came before it first
            self._flush_releases()
        self._out.append(command)

    def _flush_releases(self) -> None:
        if self._releases:
            self._out.append(ev.ReleaseAtScheduler(tuple(self._releases)))
            self._releases = []

    def _tell(self, message: Any) -> None:
        self._command(ev.TellHub(message))

    # -- blocks from the hub -----------------------------------------------------------------------------------------

    def _run_block(self, message: RunBlock) -> None:
        spec = message.block
        kept: dict[Key, None] = {}
        if (old := self.blocks.get(spec.id)) is not None:
            if old.attempt >= message.attempt:
                return
            if old.phase is BlockPhase.DONE:
                kept = old.kept
            else:
                self._end_block(old, "cancel")
        self._arrivals += 1
        order = (-spec.constraint.priority, self._arrivals)
        outputs = dict.fromkeys(message.only or spec.outputs)
        block = BlockState(spec, message.attempt, message.expected_s, order, open=outputs, kept=kept)
        self.blocks[spec.id] = block
        for each in message.imports:
            self._bring(each)
        self._link_inputs(block)

    def _link_inputs(self, block: BlockState) -> None:
        absent = [key for key in block.spec.inputs if key not in self.keys]
        for key in block.spec.inputs:
            if (state := self.keys.get(key)) is not None:
                state.users.add(block.spec.id)
                if state.phase in COMING:
                    block.missing.add(key)
        if absent:
            self._tell(KeysLost(tuple(absent)))
            self._lose_block(block, f"its input {absent[0]!r} is not here")
        else:
            self._queue_if_complete(block)

    def _queue_if_complete(self, block: BlockState) -> None:
        if not block.missing:
            self._move_block(block, "inputs here")
            heapq.heappush(self._queue, (block.order, block.spec.id, block.attempt))

    def _recall_block(self, message: RecallBlock) -> None:
        block = self._attempt(message)
        if block is None:
            return
        given = block.phase in RECALLABLE
        if given:
            self._end_block(block, "step back" if block.kept else "recall")
        self._tell(BlockRecalled(message.block, message.attempt, given))

    def _cancel_block(self, message: CancelBlock) -> None:
        if (block := self._attempt(message)) is not None:
            self._end_block(block, "cancel")

    def _stop_keys(self, message: StopKeys) -> None:
        block = self._attempt(message)
        if block is None or not (stopped := [key for key in message.keys if key in block.open]):
            return
        for key in stopped:
            del block.open[key]
            if (state := self.keys.get(key)) is not None:
                state.makers.discard(block.spec.id)
                self._settle(state)
        self._tell(KeysStopped(message.block, message.attempt, tuple(stopped)))
        if block.phase is BlockPhase.SUBMITTED:
            self._finish_if_done(block)
        elif not block.open:
            self._end_block(block, "step back")
            self._forget_if_released(self.blocks[message.block])

    def _attempt(self, message: RecallBlock | CancelBlock | StopKeys) -> BlockState | None:
        """Return the block that the hub means, or None where it means an attempt that is over."""
        block = self.blocks.get(message.block)
        return block if block is not None and block.attempt == message.attempt else None

    # -- the end of a block ------------------------------------------------------------------------------------------

    def _lose_block(self, block: BlockState, reason: str) -> None:
        if block.phase in UNFINISHED:
            self._tell(BlockLost(block.spec.id, block.attempt, reason))
            self._end_block(block, "lose")

    def _end_block(self, block: BlockState, move: str) -> None:
        """End a block and release whatever it was to make; unless it only steps back, also what it made."""
        if block.phase in RECALLABLE:
            self._command(ev.ForgetPayload(block.spec.id, block.attempt))
        self._move_block(block, move)
        name = block.spec.id
        del self.blocks[name]
        self.runway.end(name)
        if move == "step back":  # an earlier attempt made these, and the hub still counts on them
            self.blocks[name] = replace(block, missing=set(), open={})
        else:
            self._release_made(block)
        for key in block.open:
            if (state := self.keys.get(key)) is not None:
                state.makers.discard(name)
                self._settle(state)
        self._unlink_inputs(block)

    def _release_made(self, block: BlockState) -> None:
        """Release what a cancelled or lost block made here; the hub forgets by itself what was not a failure."""
        failures = []
        for key in list(block.kept):
            state = self.keys[key]
            state.made_by.pop(block.spec.id, None)
            if state.phase is KeyPhase.FAILED and not self._needed(state):
                failures.append(key)
            self._settle(state)
        if failures:
            self._tell(KeysLost(tuple(failures)))

    def _unlink_inputs(self, block: BlockState) -> None:
        for key in block.spec.inputs:
            if (state := self.keys.get(key)) is not None:
                state.users.discard(block.spec.id)
                self._settle(state)

    # -- keys from the hub -------------------------------------------------------------------------------------------

    def _release_keys(self, message: ReleaseKeys) -> None:
        for key in message.keys:
            if (state := self.keys.get(key)) is not None:
                state.hub = state.announce = False
                self._disown(state, message.seen)
                self._settle(state)

    def _disown(self, state: KeyState, seen: int | None = None) -> None:
        """Note that a key need not be here for the blocks whose report of it was among the first ``seen`` ones."""
        for name, report in sorted(state.made_by.items()):
            if seen is None or report <= seen:
                del state.made_by[name]
                self.blocks[name].kept.pop(state.key, None)
                self._forget_if_released(self.blocks[name])

    def _copy_keys(self, message: CopyKeys) -> None:
        for each in message.imports:
            self._bring(each)

    def _bring(self, wanted: Import) -> None:
        """See to it that a key gets here, and is reported when it is."""
        state = self.keys.setdefault(wanted.key, KeyState(wanted.key))
        if wanted.failed:
            self._bring_error(state)
            return
        state.hub = True
        state.source, state.number, state.tries, state.unopened = wanted.source, wanted.number, 0, False
        state.announce = True
        if state.phase is KeyPhase.HELD:
            self._announce(state)
        elif state.phase in (KeyPhase.ABSENT, KeyPhase.FAILED):
            if state.phase is KeyPhase.FAILED:
                self._releases.append(state.key)
                self._move_key(state, "release")
                self._lose_users(state, "it failed here, and exists elsewhere now")
            self._move_key(state, "import")
            state.nbytes = wanted.nbytes
            self.imports.want(state.key, wanted.nbytes)

    def _bring_error(self, state: KeyState) -> None:
        if state.phase is KeyPhase.MAKING:  # what comes of that will do as well
            return
        state.hub = True
        if state.phase in COMING:
            self.imports.unwant(state.key)
            state.announce = False
            self._move_key(state, "release")
        if state.phase is KeyPhase.ABSENT:
            self._move_key(state, "import error")
            self._command(ev.SubmitImport(state.key, "", failed=True))
            self._arrived(state)

    def _close_site(self, message: CloseSite) -> None:
        self._releases.extend(state.key for state in self.keys.values() if state.phase in AT_SCHEDULER)
        self.keys.clear()
        self.blocks.clear()
        self.closed = True
        self._command(ev.StopSite(message.reason))

    # -- imports -----------------------------------------------------------------------------------------------------

    def _start_fetches(self) -> None:
        for key in self.imports.startable():
            state = self.keys[key]
            self._move_key(state, "fetch")
            if key not in self.imports.inflight:
                self._fetch(state)

    def _fetch(self, state: KeyState) -> None:
        self.imports.inflight.add(state.key)
        self._command(ev.Fetch(state.key, state.source, state.nbytes))

    def _fetched(self, event: ev.Fetched) -> None:
        self.imports.inflight.discard(event.key)
        state = self.keys.get(event.key)
        if state is None or state.phase is not KeyPhase.FETCHING:
            self.imports.discharge(event.key)
            self._command(ev.DropBytes(event.key))
            return
        self._move_key(state, "fetched")
        state.arrival = event
        self.imports.charge(event.key, event.nbytes)
        self._command(ev.SubmitImport(event.key, event.source))
        self._arrived(state)

    def _fetch_failed(self, event: ev.FetchFailed) -> None:
        self.imports.inflight.discard(event.key)
        state = self.keys.get(event.key)
        if state is None or state.phase is not KeyPhase.FETCHING:
            self.imports.discharge(event.key)
        elif state.source != event.source:  # the hub has named another source meanwhile
            self._fetch(state)
        elif not event.missing and state.tries < FETCH_TRIES - 1:
            state.tries += 1
            self._fetch(state)
        else:
            self.imports.discharge(event.key)
            self._lose_key(state, event.reason)

    def _arrived(self, state: KeyState) -> None:
        """The scheduler knows this key from now on: blocks that need it may follow."""
        for name in sorted(state.users):
            block = self.blocks[name]
            if state.key in block.missing:
                block.missing.discard(state.key)
                self._queue_if_complete(block)

    def _announce(self, state: KeyState) -> None:
        """Tell the hub that a key it asked for is held, and how it came."""
        state.announce = False
        came, state.arrival = state.arrival, None
        if came is None:
            self._tell(KeyImported(state.key, "", state.nbytes, 0.0, False, state.number))
        else:
            self._tell(KeyImported(state.key, came.source, came.nbytes, came.seconds, came.relayed, state.number))

    # -- submitting --------------------------------------------------------------------------------------------------

    def _load(self, event: ev.Load) -> None:
        self.runway.report(event.unfinished, event.threads, event.submitted)

    def _submit_queued(self) -> None:
        while self._queue and self.runway.has_room(-self._queue[0][0][0]):
            _, name, attempt = heapq.heappop(self._queue)
            block = self.blocks.get(name)
            if block is not None and block.phase is BlockPhase.QUEUED and block.attempt == attempt:
                self._submit(block)

    def _submit(self, block: BlockState) -> None:
        self._move_block(block, "submit")
        self.runway.submit(block.spec, block.expected_s)
        outputs = tuple(block.open)
        made = [self._make(key, block) for key in outputs]
        self._command(ev.SubmitBlock(block.spec.id, block.attempt, outputs))
        self._tell(BlockStarted(block.spec.id, block.attempt))
        for state in made:
            self._arrived(state)
        self._finish_if_done(block)

    def _make(self, key: Key, block: BlockState) -> KeyState:
        """Note that a block makes this key, which may be here or on its way already: then the two are joined."""
        state = self.keys.setdefault(key, KeyState(key))
        if state.phase is KeyPhase.FAILED and not state.makers:
            if state.unopened:
                self._answer_unopened(state)
            self._releases.append(key)  # the scheduler would answer with the old error
            self._move_key(state, "make")
            state.hub = False  # it was the error that the hub wanted here,
            self._disown(state)  # and that other blocks reported
        elif state.phase is KeyPhase.ABSENT or state.phase in COMING:
            self.imports.unwant(key)
            self._move_key(state, "make")
        state.makers.add(block.spec.id)
        state.unopened = False
        return state

    # -- reports of the scheduler ------------------------------------------------------------------------------------

    def _keys_ready(self, event: ev.KeysReady) -> None:
        reports: dict[str, list[MadeKey]] = {}
        touched = []
        for made in event.keys:
            state = self.keys.get(made.key)
            if state is not None and state.phase in (KeyPhase.LANDING, KeyPhase.MAKING, KeyPhase.HELD):
                self._key_ready(state, made.nbytes)
                touched.append(state)
                for name in self._close_output(state):
                    reports.setdefault(name, []).append(MadeKey(state.key, state.nbytes))
        for name, keys in reports.items():
            self._report(name, [made.key for made in keys])
            self._tell(KeysMade(name, self.blocks[name].attempt, tuple(keys)))
        self._after_report(reports, touched)

    def _key_ready(self, state: KeyState, nbytes: int) -> None:
        if state.phase is KeyPhase.LANDING:
            self._landed(state)
        if state.phase is not KeyPhase.HELD:
            self._move_key(state, "ready")
        state.nbytes = nbytes or state.nbytes
        if state.announce:
            self._announce(state)

    def _keys_erred(self, event: ev.KeysErred) -> None:
        states = [state for key in event.keys if (state := self.keys.get(key)) and state.phase in AT_SCHEDULER]
        lost = AT_SCHEDULER if event.transfer else {KeyPhase.HELD}  # what had failed by itself has that error no more
        for state in states:
            if state.phase in lost:
                self._lose_key(state, "it was lost and could not be brought in or made again")
        reports: dict[str, list[Key]] = {}
        failed = [state for state in states if state.phase is not KeyPhase.ABSENT]
        for state in failed:
            self._key_failed(state)
            for name in self._close_output(state):
                reports.setdefault(name, []).append(state.key)
        for name, keys in reports.items():
            self._report(name, keys)
            self._tell(KeysFailed(name, self.blocks[name].attempt, tuple(keys), event.blame))
        self._after_report(reports, failed)

    def _key_failed(self, state: KeyState) -> None:
        landing = state.phase is KeyPhase.LANDING
        if landing:
            state.unopened = True
            self._landed(state)
        if state.phase is not KeyPhase.FAILED:
            self._move_key(state, "erred")
        if state.announce and not landing:
            reason = "a block at this site was to make it, and failed"
            self._tell(ImportFailed(state.key, state.source, reason, state.number))
        state.announce = False

    def _landed(self, state: KeyState) -> None:
        self.imports.discharge(state.key)
        self._command(ev.DropBytes(state.key))

    def _answer_unopened(self, state: KeyState) -> None:
        """What failed here since it could not be opened ends: the hub, which was told nothing, counts on it no more."""
        state.unopened = False
        self._tell(ImportFailed(state.key, state.source, "its value could not be opened here", state.number))

    def _close_output(self, state: KeyState) -> list[str]:
        """Return the blocks that are to report this key, noting that they do."""
        names = sorted(state.makers)
        for name in names:
            self.blocks[name].open.pop(state.key, None)
        state.makers.clear()
        return names

    def _report(self, name: str, keys: Iterable[Key]) -> None:
        """Number a report, and note that the hub may count on its keys from now on."""
        self._reports += 1
        for key in keys:
            self.blocks[name].kept[key] = None
            self.keys[key].made_by[name] = self._reports

    def _after_report(self, blocks: Iterable[str], keys: Iterable[KeyState]) -> None:
        for name in blocks:
            self._finish_if_done(self.blocks[name])
        for state in keys:
            self._settle(state)

    def _finish_if_done(self, block: BlockState) -> None:
        if not block.open:
            self._move_block(block, "finish")
            self.runway.end(block.spec.id)
            self._unlink_inputs(block)
            self._forget_if_released(block)

    def _forget_if_released(self, block: BlockState) -> None:
        if block.phase is BlockPhase.DONE and not block.kept:
            self._move_block(block, "released")
            del self.blocks[block.spec.id]

    def _keys_forgotten(self, event: ev.KeysForgotten) -> None:
        for key in event.keys:
            state = self.keys.get(key)
            if state is not None and state.phase in AT_SCHEDULER:
                self._lose_key(state, "the site's scheduler has lost it")

    def _keys_missing(self, event: ev.KeysMissing) -> None:
        """Give up keys that a worker took along and that do not come again; the hub has them made anew.

        Of others it is told once more: who asks for a key that is not here was sent by a hub which thinks it is.
        """
        for key in event.keys:
            if self.holds(key):
                self._lose_key(self.keys[key], "its worker is lost, and no other has it")
            elif key not in self.keys or self.keys[key].phase is not KeyPhase.FAILED:
                self._tell(KeysLost((key,)))

    def _keys_scattered(self, event: ev.KeysScattered) -> None:
        for made in event.keys:
            state = self.keys.setdefault(made.key, KeyState(made.key))
            if state.phase is KeyPhase.ABSENT:
                self._move_key(state, "scattered")
            state.nbytes = made.nbytes
            state.hub = True

    # -- the end of a key --------------------------------------------------------------------------------------------

    def _lose_key(self, state: KeyState, reason: str) -> None:
        """A key is not here against the site's will: tell the hub, and give back the blocks that cannot go on."""
        if state.unopened:
            self._answer_unopened(state)
        elif state.announce:
            self._tell(ImportFailed(state.key, state.source, reason, state.number))
        elif state.hub or state.made_by:
            self._tell(KeysLost((state.key,)))
        self._remove_key(state, LOSSES[state.phase])
        self._lose_users(state, reason)

    def _lose_users(self, state: KeyState, reason: str) -> None:
        for name in sorted(state.users | state.makers):
            if name in self.blocks:
                self._lose_block(self.blocks[name], f"{state.key!r}: {reason}")

    def _settle(self, state: KeyState) -> None:
        """Release a key that there is no reason to have here any more."""
        if not self._needed(state) and self.keys.get(state.key) is state:
            self._remove_key(state, "release")

    def _needed(self, state: KeyState) -> bool:
        return bool(state.hub or state.makers or state.made_by or state.users)

    def _remove_key(self, state: KeyState, move: str) -> None:
        if state.phase is KeyPhase.WANTED:
            self.imports.unwant(state.key)
        if state.phase is KeyPhase.LANDING:
            self._landed(state)
        if state.phase in AT_SCHEDULER:
            self._releases.append(state.key)
        self._move_key(state, move)
        del self.keys[state.key]
        self._disown(state)

    def check(self) -> None:
        """Verify every invariant; raises AssertionError naming the first that is broken."""
        assert not (self._out or self._releases), "commands were left behind"
        inspection.check(self)
