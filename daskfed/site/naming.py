"""Has the workers of a site say which task logged an event: stock Dask says only which worker it was.

The plugin is sent to workers by value and needs only distributed and the standard library there.
"""

from __future__ import annotations

import threading
from typing import Any

from distributed import WorkerPlugin

NAMED = "daskfed-logged-by"
"""A message that is wrapped: ``{NAMED: key of the task, "msg": what it logged}``."""


class NameTasks(WorkerPlugin):
    """Wraps what tasks log on a worker, so that the scheduler's plugin can tell whose it is."""

    name = "daskfed-name-tasks"
    wrapper = NAMED  # an attribute, since it travels by value

    def setup(self, worker: Any) -> None:
        """Begin; called by the worker."""
        stock, wrapper = type(worker).log_event, self.wrapper

        def log_event(topic: Any, msg: Any) -> None:
            key = worker.active_threads.get(threading.get_ident())
            stock(worker, topic, msg if key is None else {wrapper: key, "msg": msg})

        worker.log_event = log_event

    def teardown(self, worker: Any) -> None:
        """End; called by the worker."""
        worker.__dict__.pop("log_event", None)


def opened(msg: Any) -> tuple[Any, Any]:
    """Return the key of the task that logged ``msg``, None if nobody said, and what it logged."""
    if isinstance(msg, dict) and NAMED in msg:
        return msg[NAMED], msg["msg"]
    return None, msg
