"""A site's decisions: one event and the time in, a list of commands out. No sockets, no clock, no randomness.

A key is here because the hub asked for it or knows of it (``hub``), because a block that was given to the scheduler
makes it (``makers``), or because an unfinished block needs it (``users``); when the last of these reasons goes, the key
is released. A block waits until all its inputs are with the scheduler, queues by priority, and is submitted as soon as
the scheduler runs low; until then it can be recalled.

What the hub may rely on: each import is answered by one KeyImported or ImportFailed unless it is released first; each
output of an attempt is reported once; a block that is cancelled or lost takes everything with it that it made, and
those of its outputs that the hub had been told of are reported as lost.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from daskfed.errors import IllegalTransition
from daskfed.messages import (
    Attempt,
    BlockLost,
    BlockRecalled,
    BlockSpec,
    BlockStarted,
    CancelBlock,
    CloseSite,
    CopyKeys,
    Import,
    ImportFailed,
    Key,
    KeyImported,
    KeysFailed,
    KeysLost,
    KeysMade,
    MadeKey,
    RecallBlock,
    ReleaseKeys,
    RunBlock,
)
from daskfed.site import events as ev
from daskfed.site.budget import ImportQueue, Runway
from daskfed.site.states import (
    AT_SCHEDULER,
    COMING,
    RECALLABLE,
    UNFINISHED,
    BlockPhase,
    KeyPhase,
    next_block_phase,
    next_key_phase,
)

IMPORT_BUDGET = 256 * 2**20  # bytes of imports that may be on their way or in the agent's memory at once
STORY_LENGTH = 2000  # moves kept for errors


@dataclass(slots=True)
class KeyState:
    """One key at this site."""

    key: Key
    phase: KeyPhase = KeyPhase.ABSENT
    nbytes: int = 0  # as the hub or the scheduler said; 0 if unknown
    source: str = ""  # site to import it from
    hub: bool = False  # the hub asked for it, or was told that it is here
    announce: bool = False  # the hub waits for a KeyImported
    arrival: ev.Fetched | None = None  # how it was fetched
    makers: set[str] = field(default_factory=set)  # submitted blocks that are to report it
    made_by: set[str] = field(default_factory=set)  # blocks that have reported it
    users: set[str] = field(default_factory=set)  # unfinished blocks that need it


@dataclass(slots=True)
class BlockState:
    """One block at this site."""

    spec: BlockSpec
    attempt: Attempt
    expected_s: float
    order: tuple[int, int]  # blocks are submitted in this order: (-priority, arrival)
    phase: BlockPhase = BlockPhase.WAITING
    missing: set[Key] = field(default_factory=set)  # inputs that are still to be fetched
    open: set[Key] = field(default_factory=set)  # outputs that were not reported yet
    kept: set[Key] = field(default_factory=set)  # outputs that were reported and are still here


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
        self._out: list[ev.Command] = []
        self._releases: list[Key] = []
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            RunBlock: self._run_block,
            RecallBlock: self._recall_block,
            CancelBlock: self._cancel_block,
            ReleaseKeys: self._release_keys,
            CopyKeys: self._copy_keys,
            CloseSite: self._close_site,
            ev.KeysReady: self._keys_ready,
            ev.KeysErred: self._keys_erred,
            ev.KeysForgotten: self._keys_forgotten,
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
        kept: set[Key] = set()
        if (old := self.blocks.get(spec.id)) is not None:
            if old.attempt >= message.attempt:
                return
            if old.phase is BlockPhase.DONE:
                kept = old.kept
            else:
                self._end_block(old, "cancel")
        self._arrivals += 1
        order = (-spec.constraint.priority, self._arrivals)
        block = BlockState(spec, message.attempt, message.expected_s, order, open=set(spec.outputs), kept=kept)
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
            self._move_block(block, "recall")
            self._command(ev.ForgetPayload(block.spec.id, block.attempt))
            self._forget_block(block)
        self._tell(BlockRecalled(message.block, message.attempt, given))

    def _cancel_block(self, message: CancelBlock) -> None:
        if (block := self._attempt(message)) is not None:
            self._end_block(block, "cancel")

    def _attempt(self, message: RecallBlock | CancelBlock) -> BlockState | None:
        """Return the block that the hub means, or None where it means an attempt that is over."""
        block = self.blocks.get(message.block)
        return block if block is not None and block.attempt == message.attempt else None

    # -- the end of a block ------------------------------------------------------------------------------------------

    def _lose_block(self, block: BlockState, reason: str) -> None:
        if block.phase in UNFINISHED:
            self._tell(BlockLost(block.spec.id, block.attempt, reason))
            self._end_block(block, "lose")

    def _end_block(self, block: BlockState, move: str) -> None:
        """End a block and release whatever it made or was to make."""
        if block.phase in RECALLABLE:
            self._command(ev.ForgetPayload(block.spec.id, block.attempt))
        self._move_block(block, move)
        lost = [key for key in block.spec.outputs if key in block.kept]
        self._forget_block(block)
        for key in lost:
            state = self.keys[key]
            state.hub = state.announce = False
            self._settle(state)
        if lost:
            self._tell(KeysLost(tuple(lost)))

    def _forget_block(self, block: BlockState) -> None:
        """Take a block out of all books but its reported outputs, which stay for the hub."""
        name = block.spec.id
        del self.blocks[name]
        self.runway.end(name)
        for key in block.kept:
            self.keys[key].made_by.discard(name)
        for key in block.open:
            if (state := self.keys.get(key)) is not None and name in state.makers:
                state.makers.discard(name)
                self._settle(state)
        self._unlink_inputs(block)

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
                self._settle(state)

    def _copy_keys(self, message: CopyKeys) -> None:
        for each in message.imports:
            self._bring(each)

    def _bring(self, wanted: Import) -> None:
        """See to it that a key gets here, and is reported when it is."""
        state = self.keys.setdefault(wanted.key, KeyState(wanted.key))
        state.hub = True
        if wanted.failed:
            self._bring_error(state)
            return
        state.source = wanted.source
        state.announce = True
        if state.phase is KeyPhase.HELD:
            self._announce(state)
        elif state.phase in (KeyPhase.ABSENT, KeyPhase.FAILED):
            if state.phase is KeyPhase.FAILED:
                self._releases.append(state.key)
            self._move_key(state, "import")
            state.nbytes = wanted.nbytes
            self.imports.want(state.key, wanted.nbytes)

    def _bring_error(self, state: KeyState) -> None:
        if state.phase is KeyPhase.ABSENT or state.phase in COMING:
            self.imports.unwant(state.key)
            state.announce = False
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
        else:
            self.imports.discharge(event.key)
            self._lose_key(state, "fetch failed", event.reason)

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
            self._tell(KeyImported(state.key, "", state.nbytes, 0.0, False))
        else:
            self._tell(KeyImported(state.key, came.source, came.nbytes, came.seconds, came.relayed))

    # -- submitting --------------------------------------------------------------------------------------------------

    def _load(self, event: ev.Load) -> None:
        self.runway.report(event.unfinished, event.threads, event.submitted)

    def _submit_queued(self) -> None:
        while self._queue and self.runway.has_room():
            _, name, attempt = heapq.heappop(self._queue)
            block = self.blocks.get(name)
            if block is not None and block.phase is BlockPhase.QUEUED and block.attempt == attempt:
                self._submit(block)

    def _submit(self, block: BlockState) -> None:
        self._move_block(block, "submit")
        self.runway.submit(block.spec, block.expected_s)
        made = [self._make(key, block) for key in block.spec.outputs]
        self._command(ev.SubmitBlock(block.spec.id, block.attempt, block.spec.outputs))
        self._tell(BlockStarted(block.spec.id, block.attempt))
        for state in made:
            self._arrived(state)
        self._finish_if_done(block)

    def _make(self, key: Key, block: BlockState) -> KeyState:
        """Note that a block makes this key, which may be here or on its way already: then the two are joined."""
        state = self.keys.setdefault(key, KeyState(key))
        if state.phase is KeyPhase.FAILED and not state.makers:
            self._releases.append(key)  # the scheduler would answer with the old error
            self._move_key(state, "make")
        elif state.phase is KeyPhase.ABSENT or state.phase in COMING:
            self.imports.unwant(key)
            self._move_key(state, "make")
        state.makers.add(block.spec.id)
        return state

    # -- reports of the scheduler ------------------------------------------------------------------------------------

    def _keys_ready(self, event: ev.KeysReady) -> None:
        reports: dict[str, list[MadeKey]] = {}
        touched = []
        for made in event.keys:
            state = self.keys.get(made.key)
            if state is not None and state.phase in AT_SCHEDULER:
                self._key_ready(state, made.nbytes)
                touched.append(state)
                for name in self._close_output(state):
                    reports.setdefault(name, []).append(MadeKey(state.key, state.nbytes))
        for name, keys in reports.items():
            self._tell(KeysMade(name, self.blocks[name].attempt, tuple(keys)))
        self._after_report(reports, touched)

    def _key_ready(self, state: KeyState, nbytes: int) -> None:
        if state.phase is KeyPhase.LANDING:
            self.imports.discharge(state.key)
            self._command(ev.DropBytes(state.key))
        if state.phase is not KeyPhase.HELD:
            self._move_key(state, "ready")
        state.nbytes = nbytes or state.nbytes
        if state.announce:
            self._announce(state)

    def _keys_erred(self, event: ev.KeysErred) -> None:
        reports: dict[str, list[Key]] = {}
        touched = []
        for key in event.keys:
            state = self.keys.get(key)
            if state is None or state.phase in COMING:
                continue
            if state.phase in (KeyPhase.LANDING, KeyPhase.HELD):
                self._lose_key(state, "lost", "it was lost and could not be brought in or made again")
                continue
            self._key_failed(state)
            touched.append(state)
            for name in self._close_output(state):
                reports.setdefault(name, []).append(key)
        for name, keys in reports.items():
            self._tell(KeysFailed(name, self.blocks[name].attempt, tuple(keys)))
        self._after_report(reports, touched)

    def _key_failed(self, state: KeyState) -> None:
        if state.phase is KeyPhase.MAKING:
            self._move_key(state, "erred")
        if state.announce:
            state.announce = False
            self._tell(ImportFailed(state.key, state.source, "a block at this site was to make it, and failed"))

    def _close_output(self, state: KeyState) -> list[str]:
        """Return the blocks that are to report this key, noting that they do."""
        names = sorted(state.makers)
        for name in names:
            self.blocks[name].open.discard(state.key)
            self.blocks[name].kept.add(state.key)
            state.made_by.add(name)
            state.hub = True
        state.makers.clear()
        return names

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
            if state is not None and state.phase in (KeyPhase.LANDING, KeyPhase.MAKING, KeyPhase.HELD):
                self._lose_key(state, "lost", "the site's scheduler has lost it")

    def _keys_scattered(self, event: ev.KeysScattered) -> None:
        for made in event.keys:
            state = self.keys.setdefault(made.key, KeyState(made.key))
            if state.phase is KeyPhase.ABSENT:
                self._move_key(state, "scattered")
            state.nbytes = made.nbytes
            state.hub = True

    # -- the end of a key --------------------------------------------------------------------------------------------

    def _lose_key(self, state: KeyState, move: str, reason: str) -> None:
        """A key is not here against the site's will: tell the hub, and give back the blocks that cannot go on."""
        if state.announce:
            self._tell(ImportFailed(state.key, state.source, reason))
        elif state.hub:
            self._tell(KeysLost((state.key,)))
        self._remove_key(state, move)
        for name in sorted(state.users | state.makers):
            if name in self.blocks:
                self._lose_block(self.blocks[name], f"{state.key!r}: {reason}")

    def _settle(self, state: KeyState) -> None:
        """Release a key that there is no reason to have here any more."""
        if not (state.hub or state.makers or state.users) and self.keys.get(state.key) is state:
            self._remove_key(state, "release")

    def _remove_key(self, state: KeyState, move: str) -> None:
        if state.phase is KeyPhase.WANTED:
            self.imports.unwant(state.key)
        if state.phase is KeyPhase.LANDING:
            self.imports.discharge(state.key)
            self._command(ev.DropBytes(state.key))
        if state.phase in AT_SCHEDULER:
            self._releases.append(state.key)
        self._move_key(state, move)
        del self.keys[state.key]
        for name in state.made_by:
            self.blocks[name].kept.discard(state.key)
            self._forget_if_released(self.blocks[name])

    # -- checking ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify every invariant; raises AssertionError naming the first that is broken."""
        phases: dict[KeyPhase, set[Key]] = {phase: set() for phase in KeyPhase}
        for key, state in self.keys.items():
            phases[state.phase].add(key)
            self._check_key(state)
        for block in self.blocks.values():
            self._check_block(block)
        if not self.closed:
            self.imports.check(phases[KeyPhase.WANTED], phases[KeyPhase.LANDING])
            assert phases[KeyPhase.FETCHING] <= self.imports.inflight, "a key is fetching without a fetch"
            queued = any(block.phase is BlockPhase.QUEUED for block in self.blocks.values())
            assert not (queued and self.runway.has_room()), "blocks queue though the scheduler runs low"
        assert not (self._out or self._releases), "commands were left behind"

    def _check_key(self, state: KeyState) -> None:
        about = f"key {state.key!r} ({state.phase.value}; {self.story(state.key)})"
        assert state.phase is not KeyPhase.ABSENT, f"{about} is absent and not forgotten"
        assert state.hub or state.makers or state.users, f"{about} is here without a reason"
        assert not state.announce or state.hub, f"{about} is to be announced to nobody"
        assert not state.announce or state.phase not in (KeyPhase.HELD, KeyPhase.FAILED), f"{about} was not announced"
        for name in state.makers:
            assert state.key in self.blocks[name].open, f"{about}: its maker {name} does not have it open"
        for name in state.made_by:
            assert state.key in self.blocks[name].kept, f"{about}: {name} does not know that it made it"
        for name in state.users:
            block = self.blocks[name]
            assert block.phase in UNFINISHED, f"{about}: its user {name} is {block.phase.value}"
            assert state.key in block.spec.inputs, f"{about}: its user {name} does not need it"

    def _check_block(self, block: BlockState) -> None:
        about = f"block {block.spec.id} ({block.phase.value}; {self.story(block.spec.id)})"
        name, phase = block.spec.id, block.phase
        assert phase in UNFINISHED or phase is BlockPhase.DONE, f"{about} ended and was not forgotten"
        assert (phase is BlockPhase.SUBMITTED) == (name in self.runway.pending), f"{about} is not counted rightly"
        assert (phase is BlockPhase.WAITING) == bool(block.missing), f"{about} waits for {block.missing}"
        assert all(name in self.keys[key].made_by for key in block.kept), f"{about} keeps what it did not make"
        if phase is BlockPhase.DONE:
            assert block.kept and not block.open, f"{about} is not done"
        else:
            coming = {key for key in block.spec.inputs if self.keys[key].phase in COMING}
            assert coming == block.missing, f"{about} misses {block.missing}, but {coming} are coming"
            assert all(name in self.keys[key].users for key in block.spec.inputs), f"{about}: an input has no user"
        if phase is BlockPhase.SUBMITTED:
            assert all(name in self.keys[key].makers for key in block.open), f"{about} does not make its outputs"
