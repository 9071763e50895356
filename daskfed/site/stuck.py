"""Finds tasks that a site's scheduler takes for running while their worker does not know of it, and has them run.

Scheduler and worker tell each other of each change, and where messages cross at a bad moment their views may stay
apart: the scheduler believes in a result that the worker dropped, or waits for a task that it has finished or
forgotten. Stock Dask then waits for ever. It is rare, but sites are given work, have it taken back and are given it
again more often than most clusters, and one such task holds up all that is queued behind it.

:class:`StuckTasks` watches for workers whose tasks have not changed for a while and has them look
(:func:`daskfed.data.fetch.give_back`).
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from daskfed.data.fetch import by_value, give_back
from daskfed.site.attached import Attached

GIVE_BACK = by_value(give_back)
LOOK_S = 2.0
PATIENCE = 3  # looks without a change until a worker is asked; then it is asked after twice as many, and so on
ASK_S = 10.0  # for an answer
MOST_KEYS = 1000  # that a worker is asked for at a time


class StuckTasks(Attached):
    """Looks after the tasks of a scheduler as long as the agent's ``client`` is there."""

    kind = "stuck"

    async def start(self, scheduler: Any) -> None:
        """Begin to look; called by the scheduler."""
        self._unchanged: dict[str, tuple[frozenset[int], int, int]] = {}  # worker -> runs, looks, when to ask
        self.begin(scheduler, (self.look, LOOK_S))

    async def look(self) -> None:
        """Ask those workers whose tasks are the same as before for what they do not run."""
        former, self._unchanged = self._unchanged, {}
        asked: list[Awaitable[None]] = []
        for address, worker in list(self.scheduler.workers.items()):
            waiting = [task for task in worker.processing if task not in worker.executing]
            runs = frozenset(task.run_id for task in waiting)
            before, looks, due = former.get(address, (frozenset(), 0, PATIENCE))
            looks, due = (looks + 1, due) if runs == before else (1, PATIENCE)
            if waiting and looks > due:
                due *= 2
                asked.append(self._ask(address, [task.key for task in waiting[:MOST_KEYS]]))
            self._unchanged[address] = (runs, looks, due)
        await asyncio.gather(*asked)

    async def _ask(self, address: str, keys: list[Any]) -> None:
        message = {"op": "run", "function": GIVE_BACK, "args": pickle.dumps((keys,))}
        asking = self.scheduler.broadcast(msg=message, workers=[address], on_error="ignore")
        with suppress(TimeoutError):  # a worker that is busy is asked again
            await asyncio.wait_for(asking, ASK_S)
