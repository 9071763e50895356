"""The end of keys that somebody cancels, and of what depends on them. Pure.

Cancelling goes down the graph as far as blocks are unfinished. Of a block of many calls only those end that need what
was cancelled (``BlockSpec.uses`` says which do); the others go on, and for their sake a key that will never be made
counts as failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from daskfed.hub.events import FailKeys, Outcome
from daskfed.hub.ledger import KeyState, Ledger
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
    for state in doomed.values():
        if ledger.keys.get(state.key) is state and state.phase is KeyPhase.PENDING:
            _spare_others(ledger, state, doomed)


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
        for name in state.consumers:
            spec = ledger.blocks[name].spec
            stack.extend(output for output in spec.outputs if spec.needs(output, state.key))
    return found


def _spare_others(ledger: Ledger, state: KeyState, doomed: Mapping[Key, KeyState]) -> None:
    """A cancelled key is an input of blocks that go on: where what they still make does not need it, it is not made."""
    blocks = [ledger.blocks[name] for name in state.consumers]
    going_on = ((block.spec, out.key) for block in blocks for out in ledger.produced_by(block) if out.key not in doomed)
    if any(spec.needs(output, state.key) for spec, output in going_on):
        return
    ledger.stop(state)
    ledger.command(FailKeys((state.key,), "CancelledKeyError", f"{state.key!r} was cancelled"))
    ledger.key_failed(state)
    state.cancelled = True
