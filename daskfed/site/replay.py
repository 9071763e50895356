"""Values that only a site knows, made once more there: what a task needed that a client wants to run by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from distributed.protocol.serialize import Serialized, serialize

from daskfed.dask_private import LLGExpr
from daskfed.errors import TransferError
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.site.session import Session

POLL_S = 0.02
UNDER_WAY = ("waiting", "queued", "no-worker", "processing")
BEGIN_S = 5.0  # within which a scheduler begins to make a key that it is asked for, if it can


async def make_again(session: Session, keys: Collection[Key]) -> dict[Key, Any]:
    """Return the unopened values of ``keys``, which the site's scheduler has or makes again, and let go of them.

    Raises TransferError for one that it cannot make, since it failed or came from elsewhere.
    """
    empty = LLGExpr({}, _determ_token="daskfed-borrows")
    session.wire.borrow(keys, Serialized(*serialize(empty, on_error="raise")))
    try:
        await _in_memory(session, keys)
        return await session.gather_values(keys)
    finally:
        session.wire.give_back(keys)


async def _in_memory(session: Session, keys: Collection[Key]) -> None:
    idle_s = 0.0
    while True:
        states = await session.ask_scheduler("get_task_status", keys=list(keys))
        missing = {key: state for key, state in states.items() if state != "memory"}
        if not missing:
            return
        idle_s = 0.0 if any(state in UNDER_WAY for state in missing.values()) else idle_s + POLL_S
        if "erred" in missing.values() or idle_s > BEGIN_S:
            key, state = next(iter(missing.items()))
            raise TransferError(
                f"the input {key!r} cannot be made again at its site, where it is {state or 'forgotten'}: submit the "
                "graph once more and keep a future of that input"
            )
        await asyncio.sleep(POLL_S)
