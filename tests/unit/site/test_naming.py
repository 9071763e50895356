"""Workers say which task logged an event."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

from daskfed.data.fetch import by_value
from daskfed.site.naming import NAMED, NameTasks, opened


class Worker:
    """As much of a worker as the plugin knows."""

    def __init__(self) -> None:
        self.active_threads: dict[int, Any] = {}
        self.logged: list[tuple[Any, Any]] = []

    def log_event(self, topic: Any, msg: Any) -> None:
        self.logged.append((topic, msg))


def test_what_a_task_logs_is_wrapped_and_what_nobody_logs_is_not() -> None:
    worker, plugin = Worker(), NameTasks()
    plugin.setup(worker)
    worker.log_event("t", 1)
    worker.active_threads[threading.get_ident()] = ("x", 0)
    worker.log_event("t", {NAMED: "another's", "msg": 2})
    plugin.teardown(worker)
    worker.log_event("t", 3)
    assert [opened(msg) for _, msg in worker.logged] == [
        (None, 1), (("x", 0), {NAMED: "another's", "msg": 2}), (None, 3)
    ]  # fmt: skip


def test_it_opens_where_daskfed_is_not_installed() -> None:
    code = (
        "import pickle, sys; sys.modules['daskfed'] = None; "
        "from distributed import WorkerPlugin; "
        "assert isinstance(pickle.loads(sys.stdin.buffer.read()), WorkerPlugin)"
    )
    subprocess.run([sys.executable, "-c", code], input=by_value(NameTasks()), check=True, timeout=60)
