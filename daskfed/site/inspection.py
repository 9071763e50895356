"""The invariants of a site's core, verified after each event in tests, and what it says of a key. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from daskfed.messages import Key
from daskfed.site.records import BlockState, KeyState
from daskfed.site.states import BlockPhase, KeyPhase

if TYPE_CHECKING:
    from daskfed.site.core import SiteCore

COMING = (KeyPhase.WANTED, KeyPhase.FETCHING)
BROUGHT = (KeyPhase.WANTED, KeyPhase.FETCHING, KeyPhase.LANDING)
ALIVE = (BlockPhase.WAITING, BlockPhase.QUEUED, BlockPhase.SUBMITTED, BlockPhase.DONE)


class _About(NamedTuple):
    """Names a key or block in a message; reading the story is left until the message is needed."""

    core: SiteCore
    name: object
    phase: KeyPhase | BlockPhase

    def __str__(self) -> str:
        return f"{self.name!r} ({self.phase.value}; {self.core.story(self.name)})"


def check(core: SiteCore) -> None:
    """Verify every invariant; raises AssertionError naming the first that is broken."""
    for state in core.keys.values():
        _check_key(core, state)
    for block in core.blocks.values():
        _check_block(core, block)
    if not core.closed:
        _check_books(core)


def explain(core: SiteCore, key: Key) -> dict[str, Any]:
    """Return what the site knows of a key: its ``phase``, what happened to it, and the blocks that make or use it."""
    state = core.keys.get(key)
    if state is None:
        return {"phase": KeyPhase.ABSENT.value, "story": core.story(key), "blocks": {}}
    names = sorted({*state.makers, *state.made_by, *state.users} & core.blocks.keys())
    blocks = {name: _of_block(core.blocks[name]) for name in names}
    return {"phase": state.phase.value, "story": core.story(key), "blocks": blocks}


def _of_block(block: BlockState) -> dict[str, Any]:
    facts = {"missing": list(block.missing), "open": list(block.open), "kept": list(block.kept)}
    return {"phase": block.phase.value, "attempt": block.attempt.n, **facts}


def _check_books(core: SiteCore) -> None:
    wanted, fetching, landing = (_keys_in(core, phase) for phase in BROUGHT)
    core.imports.check(wanted, landing)
    assert fetching <= core.imports.inflight, "a key is fetching without a fetch"
    queued = [block.spec.constraint.priority for block in core.blocks.values() if block.phase is BlockPhase.QUEUED]
    assert not (queued and core.runway.has_room(max(queued))), "blocks queue though the scheduler runs low"


def _keys_in(core: SiteCore, phase: KeyPhase) -> set[Key]:
    return {key for key, state in core.keys.items() if state.phase is phase}


def _check_key(core: SiteCore, state: KeyState) -> None:
    about = _About(core, state.key, state.phase)
    assert state.phase is not KeyPhase.ABSENT, f"{about} is absent and not forgotten"
    assert state.hub or state.makers or state.made_by or state.users, f"{about} is here without a reason"
    if state.announce:
        assert state.hub, f"{about} is to be announced to nobody"
        assert state.phase not in (KeyPhase.HELD, KeyPhase.FAILED), f"{about} was not announced"
    for name in state.makers:
        assert state.key in core.blocks[name].open, f"{about}: its maker {name} does not have it open"
    for name in state.made_by:
        assert state.key in core.blocks[name].kept, f"{about}: {name} does not know that it made it"
    for name in state.users:
        block = core.blocks[name]
        assert block.phase is not BlockPhase.DONE, f"{about}: its user {name} is {block.phase.value}"
        assert state.key in block.spec.inputs, f"{about}: its user {name} does not need it"


def _check_block(core: SiteCore, block: BlockState) -> None:
    name, phase = block.spec.id, block.phase
    about = _About(core, name, phase)
    assert phase in ALIVE, f"{about} ended and was not forgotten"
    assert (phase is BlockPhase.SUBMITTED) == (name in core.runway.pending), f"{about} is not counted rightly"
    assert (phase is BlockPhase.WAITING) == bool(block.missing), f"{about} waits for {block.missing}"
    for key in block.kept:
        assert name in core.keys[key].made_by, f"{about} keeps {key!r}, which it did not make"
    if phase is BlockPhase.DONE:
        assert block.kept and not block.open, f"{about} is not done"
    else:
        for key in block.spec.inputs:
            state = core.keys[key]
            assert (state.phase in COMING) == (key in block.missing), f"{about} counts its input {key!r} wrongly"
            assert name in state.users, f"{about}: its input {key!r} does not know it"
    if phase is BlockPhase.SUBMITTED:
        assert all(name in core.keys[key].makers for key in block.open), f"{about} does not make its outputs"
