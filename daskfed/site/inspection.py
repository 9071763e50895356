"""The invariants of a site's core, verified after each event in tests. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daskfed.messages import Key
from daskfed.site.records import BlockState, KeyState
from daskfed.site.states import COMING, UNFINISHED, BlockPhase, KeyPhase

if TYPE_CHECKING:
    from daskfed.site.core import SiteCore


def check(core: SiteCore) -> None:
    """Verify every invariant; raises AssertionError naming the first that is broken."""
    for state in core.keys.values():
        _check_key(core, state)
    for block in core.blocks.values():
        _check_block(core, block)
    if not core.closed:
        _check_books(core)


def _check_books(core: SiteCore) -> None:
    phases: dict[KeyPhase, set[Key]] = {phase: set() for phase in KeyPhase}
    for key, state in core.keys.items():
        phases[state.phase].add(key)
    core.imports.check(phases[KeyPhase.WANTED], phases[KeyPhase.LANDING])
    assert phases[KeyPhase.FETCHING] <= core.imports.inflight, "a key is fetching without a fetch"
    queued = any(block.phase is BlockPhase.QUEUED for block in core.blocks.values())
    assert not (queued and core.runway.has_room()), "blocks queue though the scheduler runs low"


def _check_key(core: SiteCore, state: KeyState) -> None:
    about = f"key {state.key!r} ({state.phase.value}; {core.story(state.key)})"
    assert state.phase is not KeyPhase.ABSENT, f"{about} is absent and not forgotten"
    assert state.hub or state.makers or state.made_by or state.users, f"{about} is here without a reason"
    assert not state.announce or state.hub, f"{about} is to be announced to nobody"
    assert not state.announce or state.phase not in (KeyPhase.HELD, KeyPhase.FAILED), f"{about} was not announced"
    for name in state.makers:
        assert state.key in core.blocks[name].open, f"{about}: its maker {name} does not have it open"
    for name in state.made_by:
        assert state.key in core.blocks[name].kept, f"{about}: {name} does not know that it made it"
    for name in state.users:
        block = core.blocks[name]
        assert block.phase in UNFINISHED, f"{about}: its user {name} is {block.phase.value}"
        assert state.key in block.spec.inputs, f"{about}: its user {name} does not need it"


def _check_block(core: SiteCore, block: BlockState) -> None:
    about = f"block {block.spec.id} ({block.phase.value}; {core.story(block.spec.id)})"
    name, phase = block.spec.id, block.phase
    assert phase in UNFINISHED or phase is BlockPhase.DONE, f"{about} ended and was not forgotten"
    assert (phase is BlockPhase.SUBMITTED) == (name in core.runway.pending), f"{about} is not counted rightly"
    assert (phase is BlockPhase.WAITING) == bool(block.missing), f"{about} waits for {block.missing}"
    assert all(name in core.keys[key].made_by for key in block.kept), f"{about} keeps what it did not make"
    if phase is BlockPhase.DONE:
        assert block.kept and not block.open, f"{about} is not done"
    else:
        coming = {key for key in block.spec.inputs if core.keys[key].phase in COMING}
        assert coming == block.missing, f"{about} misses {block.missing}, but {coming} are coming"
        assert all(name in core.keys[key].users for key in block.spec.inputs), f"{about}: an input has no user"
    if phase is BlockPhase.SUBMITTED:
        assert all(name in core.keys[key].makers for key in block.open), f"{about} does not make its outputs"
