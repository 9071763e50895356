"""A preload for workers: each writes down which data files it opened, and which tasks it ran, in its working directory.

``LocalCluster(preload=["tests.system.journal"])`` puts it in; :class:`Journal` reads what a site's workers wrote.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin
from distributed.worker import thread_state

NAME = "journal.txt"
DATA = (".zarr", ".nc", ".parquet", ".csv")


class Recorder(WorkerPlugin):  # type: ignore[misc]
    """Writes a line for each data file that the process opens, in whatever thread, and for each task that ran."""

    def __init__(self) -> None:
        self.file = os.open(NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of a file that is opened."""
        if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if any(part.endswith(DATA) for part in path.split(os.sep)):
            self.write("read", path)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Take note of a task that ended well."""
        if start == "executing" and finish == "memory":
            self.write("ran", str(key))

    def write(self, what: str, name: str) -> None:
        """Append one line, at once."""
        task = getattr(thread_state, "key", "") if what == "read" else ""
        os.write(self.file, f"{what}\t{name}\t{task}\n".encode())


async def dask_setup(worker: Worker) -> None:
    """Start recording; called by the worker when it starts."""
    await worker.plugin_add(plugin=Recorder(), name="journal")


class Journal:
    """What the workers in ``folder`` did since the last :meth:`clear`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen = 0

    def clear(self) -> None:
        """Forget what was written so far."""
        self._seen = len(self._text())

    def reads(self) -> set[Path]:
        """Return the data files that were opened."""
        return {Path(name) for what, name, _ in self._lines() if what == "read"}

    def readers(self) -> set[str]:
        """Return the tasks that opened data files."""
        return {task for what, _, task in self._lines() if what == "read"}

    def ran(self) -> list[str]:
        """Return the keys of the tasks that ran, in order."""
        return [name for what, name, _ in self._lines() if what == "ran"]

    def _lines(self) -> list[tuple[str, ...]]:
        return [tuple(line.split("\t")) for line in self._text()[self._seen :].splitlines()]

    def _text(self) -> str:
        path = self.folder / NAME
        return path.read_text() if path.exists() else ""
