"""Failed keys are made again: those that are asked for, what they failed from, and what failed from them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from daskfed.hub.events import Outcome
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import AT_SITE, BlockState, Ledger
from daskfed.hub.states import BlockPhase, KeyPhase
from daskfed.messages import Key


def retry_keys(ledger: Ledger, keys: Iterable[Key]) -> None:
    """Make failed keys pending again and have their blocks run; a key that did not fail is left alone."""
    states = _failed_with(ledger, keys)
    for state in states:
        for site in state.failed_at:
            ledger.release_at(site, state.key)
        state.failed_at.clear()
        state.cancelled = False
        ledger.move_key(state, "retry")
        ledger.tell(state.wanted_by, Outcome.RETRIED, state.key)
        ledger.inputs_missing(state)
    for block in _blocks(ledger, (name for state in states for name in state.consumers)):
        if block.phase in AT_SITE and block.pending:
            ledger.take_back(block)  # it was told of the failure
    for block in _blocks(ledger, (str(state.producer) for state in states)):
        if block.phase is BlockPhase.DONE:
            ledger.move_block(block, "needed again")
            ledger.link_inputs(block)
    ledger.settle([state.key for state in states])


def revive_cancelled(ledger: Ledger, keys: Iterable[Key]) -> None:
    """Make keys again that count as failed since they were cancelled: somebody asks for them after all."""
    known = ((key, ledger.keys.peek(key)) for key in keys)
    retry_keys(ledger, [key for key, state in known if state is not None and state.cancelled])


def _blocks(ledger: Ledger, names: Iterable[str]) -> list[BlockState]:
    return [ledger.blocks[name] for name in dict.fromkeys(names)]


def _failed_with(ledger: Ledger, keys: Iterable[Key]) -> list[KeyState]:
    """Return the failed keys among ``keys`` behind all those that failed with them, as far as blocks make them."""
    asked = dict.fromkeys(keys)
    found: dict[Key, KeyState] = {}
    stack: list[Key] = list(asked)
    while stack:
        state = ledger.keys.get(stack.pop())
        if state is None or state.key in found or state.phase is not KeyPhase.FAILED:
            continue
        if (block := ledger.blocks.get(state.producer or "")) is None:
            continue
        found[state.key] = state
        stack += [key for key in block.spec.inputs if block.spec.needs(state.key, key)]
        for user in _blocks(ledger, (*state.consumers, *state.heirs)):
            stack += [out.key for out in ledger.produced_by(user) if user.spec.needs(out.key, state.key)]
    return sorted(found.values(), key=lambda state: state.key in asked)  # who asked waits for that
