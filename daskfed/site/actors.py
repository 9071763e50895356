"""Calls of the actors at this site, for clients and for tasks at other sites."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from distributed.protocol import to_serialize

from daskfed.comm.opaque import OpaqueError
from daskfed.ending import end_tasks
from daskfed.errors import ActorCallError

logger = logging.getLogger(__name__)


class ActorCalls:
    """Calls that the hub asked for and that are under way.

    ``ask_scheduler`` calls an op of the site's scheduler, ``tell_hub`` one of the hub.
    """

    def __init__(self, ask_scheduler: Callable[..., Awaitable[Any]], tell_hub: Callable[..., Awaitable[Any]]) -> None:
        self._ask_scheduler = ask_scheduler
        self._tell_hub = tell_hub
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, ticket: int, worker: str, msg: dict[str, Any]) -> None:
        """Begin a call; the hub is told when it is done, however long that takes."""
        task = asyncio.create_task(self._call(ticket, worker, msg), name=f"actor call {ticket}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, ticket: int, worker: str, msg: dict[str, Any]) -> None:
        try:
            reply = await self._ask_scheduler("proxy", worker=worker, msg=msg)
        except (OpaqueError, OSError) as exc:
            problem = ActorCallError(f"the actor {msg['actor']!r} cannot be called at its worker {worker}: {exc}")
            reply = {"status": "error", "exception": to_serialize(problem)}
        try:
            await self._tell_hub("actor-answer", ticket=ticket, answer=reply)
        except (OSError, OpaqueError) as exc:
            logger.warning("the answer of an actor could not be given to the hub: %s", exc)

    async def close(self) -> None:
        """End the calls that are under way."""
        await end_tasks(*self._tasks)
