"""Has workers that end say nothing of the heartbeat that they were just sending.

A stock worker that is told to close cuts its own connections, and logs an error with its traceback where a heartbeat
waits for its answer on one of them: every few hundredth end on a busy machine, in the middle of the user's terminal.

The plugin is sent to workers by value and needs only distributed and the standard library there.
"""

from __future__ import annotations

import logging
from typing import Any

from distributed import WorkerPlugin
from distributed.core import Status

LOGGER = "distributed.worker"
HEARTBEAT = "heartbeat"  # the method of a worker that logs it


class QuietEnd(WorkerPlugin):
    """Keeps the errors of heartbeats out of the log of a worker that is closing; those of others stay."""

    name = "daskfed-quiet-end"
    idempotent = True

    def setup(self, worker: Any) -> None:
        """Begin; called by the worker. It lasts as long as the process: the error comes after ``teardown``."""
        logger = logging.getLogger(LOGGER)
        if not any(each.name == self.name for each in logger.filters if isinstance(each, logging.Filter)):
            logger.addFilter(NotOfTheEnd(self.name))


class NotOfTheEnd(logging.Filter):
    """Drops what the heartbeat of a worker logs once that worker is closing."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged."""
        if record.funcName != HEARTBEAT or not record.exc_info or record.exc_info[2] is None:
            return True
        worker = record.exc_info[2].tb_frame.f_locals.get("self")
        return getattr(worker, "status", None) not in (Status.closing, Status.closed)
