"""The end of keys that somebody cancels, and of what depends on them. Pure.

Cancelling goes down the graph as far as blocks are unfinished. Of a block of many calls only those end that need what
was cancelled (``BlockSpec.uses`` says which do); the others go on, and for their sake a key that will never be made
counts as failed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from daskfed.hub.events import FailKeys, Outcome
from daskfed.hub.keytable import KeyState
from daskfed.hub.ledger import Ledger
from daskfed.hub.states import KeyPhase
from daskfed.messages import Key


def cancel_keys(
    ledger: Ledger, keys: Iterable[Key], reason: str, msg: str | None = None, client: str | None = None
) -> None:
    """End keys and all that depends on them, for every client; with ``client`` only what nobody else wants."""
    doomed = _doomed(ledger, keys, client)
    for state in doomed.values():
        ledger.tell(state.wanted_by, Outcome.CANCELLED, state.key, reason, msg)
        for each in list(state.wanted_by):
            ledger.unwant(each, (state.key,))
    ledger.settle(doomed)
    _spare_others(ledger, doomed)


def cancel_for(
    ledger: Ledger, client: str, keys: Iterable[Key], force: bool, reason: str, msg: str | None = None
) -> None:
    """A client cancels keys: what others want they keep, unless it uses ``force``.

    It is not told of these keys, as it knows, and may have submitted some of them again meanwhile.
    """
    known = [key for key in keys if key in ledger.keys]
    ledger.unwant(client, known)
    mine = [key for key in known if force or not ledger.keys[key].wanted_by]
    cancel_keys(ledger, mine, reason, msg, None if force else client)
    ledger.settle(known)


def give_up(ledger: Ledger, state: KeyState) -> None:
    """Nobody will submit what makes this key: have its keeper bring it, or end it and what depends on it."""
    if state.keeper is not None:
        ledger.demand(state)
    else:
        why = "lost dependencies: nobody knows them any more since the hub started anew"
        cancel_keys(ledger, [state.key], why)


def _doomed(ledger: Ledger, keys: Iterable[Key], client: str | None) -> dict[Key, KeyState]:
    """Return keys and what depends on them, as far as nobody but ``client``, where it is given, wants it."""
    found: dict[Key, KeyState] = {}
    stack = list(keys)
    while stack:
        state = ledger.keys.get(stack.pop())
        if state is None or state.key in found or not (client is None or state.wanted_by.keys() <= {client}):
            continue
        found[state.key] = state
        for block in [ledger.blocks[name] for name in state.consumers]:
            made = (output.key for output in ledger.produced_by(block))  # what another block makes as well goes on
            stack.extend(output for output in made if block.spec.needs(output, state.key))
    return found


def _spare_others(ledger: Ledger, doomed: Mapping[Key, KeyState]) -> None:
    """Cancelled keys may be inputs of blocks that go on: where what those still make does not need one, it fails."""
    alive = {key: state for key, state in doomed.items() if ledger.keys.get(key) is state}
    unmade = {key: state for key, state in alive.items() if state.phase is KeyPhase.PENDING}
    while needed := [key for key, state in unmade.items() if _is_needed(ledger, state, unmade)]:
        for key in needed:
            del unmade[key]
    for state in unmade.values():
        ledger.stop(state)
        ledger.command(FailKeys((state.key,), "CancelledKeyError", f"{state.key!r} was cancelled"))
        ledger.key_failed(state)
        state.cancelled = True


def _is_needed(ledger: Ledger, state: KeyState, unmade: Container[Key]) -> bool:
    """Whether something else than what will not be made needs a key."""
    blocks = (ledger.blocks[name] for name in state.consumers)
    outputs = ((block.spec, out.key) for block in blocks for out in ledger.produced_by(block) if out.key not in unmade)
    return any(spec.needs(output, state.key) for spec, output in outputs)
