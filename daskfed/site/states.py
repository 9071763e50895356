"""The life of a key and of a block at one site: two tables of legal moves.

A key is imported (wanted, fetching, landing, held) or made here (making, held or failed); a block waits for its inputs,
queues, is handed to the site's scheduler, and is done. Anything that is not in a table raises
:class:`daskfed.errors.IllegalTransition`.
"""

from __future__ import annotations

from daskfed.errors import IllegalTransition
from daskfed.messages import QuickEnum


class KeyPhase(QuickEnum):
    """Where a key stands at this site."""

    ABSENT = "absent"  # not here, and nobody here expects it
    WANTED = "wanted"  # to be fetched from another site as soon as the byte budget allows
    FETCHING = "fetching"  # on its way from another site
    LANDING = "landing"  # its bytes are with the agent; a fetch task under its name was given to the scheduler
    MAKING = "making"  # a block that was given to the scheduler makes it
    HELD = "held"  # in the memory of a worker, and the scheduler was told to keep it
    FAILED = "failed"  # its task raised, here or where it was to be made


class BlockPhase(QuickEnum):
    """Where a block stands at this site."""

    WAITING = "waiting"  # some input has not arrived yet
    QUEUED = "queued"  # all inputs are with the scheduler; waits for its turn and can be recalled
    SUBMITTED = "submitted"  # its tasks are with the scheduler
    DONE = "done"  # every output was made or failed; the site still holds some of them
    GONE = "gone"  # done, and every output was released
    RECALLED = "recalled"  # given back to the hub before it was submitted
    CANCELLED = "cancelled"  # nobody wants it any more
    LOST = "lost"  # cannot finish here through no fault of its tasks


KEY_MOVES: dict[tuple[KeyPhase, str], KeyPhase] = {
    (KeyPhase.ABSENT, "import"): KeyPhase.WANTED,
    (KeyPhase.ABSENT, "import error"): KeyPhase.FAILED,
    (KeyPhase.ABSENT, "make"): KeyPhase.MAKING,
    (KeyPhase.ABSENT, "scattered"): KeyPhase.HELD,
    (KeyPhase.WANTED, "fetch"): KeyPhase.FETCHING,
    (KeyPhase.WANTED, "make"): KeyPhase.MAKING,
    (KeyPhase.WANTED, "release"): KeyPhase.ABSENT,
    (KeyPhase.FETCHING, "fetched"): KeyPhase.LANDING,
    (KeyPhase.FETCHING, "fetch failed"): KeyPhase.ABSENT,
    (KeyPhase.FETCHING, "make"): KeyPhase.MAKING,
    (KeyPhase.FETCHING, "release"): KeyPhase.ABSENT,
    (KeyPhase.LANDING, "ready"): KeyPhase.HELD,
    (KeyPhase.LANDING, "erred"): KeyPhase.FAILED,
    (KeyPhase.LANDING, "lost"): KeyPhase.ABSENT,
    (KeyPhase.LANDING, "release"): KeyPhase.ABSENT,
    (KeyPhase.MAKING, "ready"): KeyPhase.HELD,
    (KeyPhase.MAKING, "erred"): KeyPhase.FAILED,
    (KeyPhase.MAKING, "lost"): KeyPhase.ABSENT,
    (KeyPhase.MAKING, "release"): KeyPhase.ABSENT,
    (KeyPhase.HELD, "lost"): KeyPhase.ABSENT,
    (KeyPhase.HELD, "release"): KeyPhase.ABSENT,
    (KeyPhase.FAILED, "make"): KeyPhase.MAKING,
    (KeyPhase.FAILED, "release"): KeyPhase.ABSENT,
}

BLOCK_MOVES: dict[tuple[BlockPhase, str], BlockPhase] = {
    (BlockPhase.WAITING, "inputs here"): BlockPhase.QUEUED,
    (BlockPhase.WAITING, "recall"): BlockPhase.RECALLED,
    (BlockPhase.WAITING, "step back"): BlockPhase.DONE,
    (BlockPhase.WAITING, "cancel"): BlockPhase.CANCELLED,
    (BlockPhase.WAITING, "lose"): BlockPhase.LOST,
    (BlockPhase.QUEUED, "submit"): BlockPhase.SUBMITTED,
    (BlockPhase.QUEUED, "recall"): BlockPhase.RECALLED,
    (BlockPhase.QUEUED, "step back"): BlockPhase.DONE,
    (BlockPhase.QUEUED, "cancel"): BlockPhase.CANCELLED,
    (BlockPhase.QUEUED, "lose"): BlockPhase.LOST,
    (BlockPhase.SUBMITTED, "finish"): BlockPhase.DONE,
    (BlockPhase.SUBMITTED, "cancel"): BlockPhase.CANCELLED,
    (BlockPhase.SUBMITTED, "lose"): BlockPhase.LOST,
    (BlockPhase.DONE, "cancel"): BlockPhase.CANCELLED,
    (BlockPhase.DONE, "released"): BlockPhase.GONE,
}

COMING = frozenset({KeyPhase.WANTED, KeyPhase.FETCHING})  # a block that needs such a key has to wait
AT_SCHEDULER = frozenset({KeyPhase.LANDING, KeyPhase.MAKING, KeyPhase.HELD, KeyPhase.FAILED})  # it knows the key
LOSSES = dict.fromkeys(AT_SCHEDULER, "lost") | {KeyPhase.FETCHING: "fetch failed", KeyPhase.FAILED: "release"}
RECALLABLE = frozenset({BlockPhase.WAITING, BlockPhase.QUEUED})
UNFINISHED = frozenset({BlockPhase.WAITING, BlockPhase.QUEUED, BlockPhase.SUBMITTED})


def next_key_phase(phase: KeyPhase, move: str, key: object) -> KeyPhase:
    """Return where ``move`` leads a key; raises IllegalTransition where the table has no such move."""
    try:
        return KEY_MOVES[phase, move]
    except KeyError:
        raise IllegalTransition(f"key {key!r} is {phase.value}: it cannot {move!r}") from None


def next_block_phase(phase: BlockPhase, move: str, block: str) -> BlockPhase:
    """Return where ``move`` leads a block; raises IllegalTransition where the table has no such move."""
    try:
        return BLOCK_MOVES[phase, move]
    except KeyError:
        raise IllegalTransition(f"block {block!r} is {phase.value}: it cannot {move!r}") from None
