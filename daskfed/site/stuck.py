"""Finds tasks that a site's scheduler takes for running while their worker does not know of it, and has them run.

Scheduler and worker tell each other of each change, and where messages cross at a bad moment their views may stay
apart: the scheduler believes in a result that the worker dropped, or waits for a task that it has finished or
forgotten. Stock Dask then waits for ever. It is rare, but sites are given work, have it taken back and are given it
again more often than most clusters, and one such task holds up all that is queued behind it.

:class:`StuckTasks` watches for workers whose tasks have not changed for a while and has them look
(:func:`daskfed.data.fetch.give_back`). It asks in step with what the scheduler tells its workers: one that is slow has
heard of each task by then.
"""

from __future__ import annotations

from typing import Any

from daskfed.data.homing import GIVE_BACK
from daskfed.site.attached import Attached

LOOK_S = 2.0
PATIENCE = 3  # looks without a change until a worker is asked; then it is asked after twice as many, and so on
MOST_KEYS = 1000  # that a worker is asked for at a time


class StuckTasks(Attached):
    """Looks after the tasks of a scheduler as long as the agent's ``client`` is there."""

    kind = "stuck"

    async def start(self, scheduler: Any) -> None:
        """Begin to look; called by the scheduler."""
        self._unchanged: dict[str, tuple[frozenset[int], int, int]] = {}  # worker -> runs, looks, when to ask
        self.begin(scheduler, (self.look, LOOK_S))

    def look(self) -> None:
        """Ask those workers whose tasks are the same as before for what they do not run."""
        former, self._unchanged = self._unchanged, {}
        for address, worker in self.scheduler.workers.items():
            waiting = [task for task in worker.processing if task not in worker.executing]
            runs = frozenset(task.run_id for task in waiting)
            before, looks, due = former.get(address, (frozenset(), 0, PATIENCE))
            looks, due = (looks + 1, due) if runs == before else (1, PATIENCE)
            if waiting and looks > due:
                due *= 2
                keys = [task.key for task in waiting[:MOST_KEYS]]
                self.scheduler.worker_send(address, {"op": GIVE_BACK, "keys": keys})
            self._unchanged[address] = (runs, looks, due)
