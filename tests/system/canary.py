"""Values that write down which process opens their pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Canary:
    """Adds the id of the process that unpickles it to ``folder``; equal to any other with its value."""

    def __init__(self, folder: Path, value: int = 0) -> None:
        self.folder = folder
        self.value = value

    def __reduce__(self) -> Any:
        return open_canary, (self.folder, self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Canary) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)


class CanaryError(Exception):
    """An exception that does the same."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def __reduce__(self) -> Any:
        return open_canary_error, (self.folder,)


def open_canary(folder: Path, value: int) -> Canary:
    """What the pickle of a :class:`Canary` calls."""
    (folder / str(os.getpid())).touch()
    return Canary(folder, value)


def open_canary_error(folder: Path) -> CanaryError:
    """What the pickle of a :class:`CanaryError` calls."""
    (folder / str(os.getpid())).touch()
    return CanaryError(folder)


def opened_by(folder: Path) -> set[int]:
    """Return the ids of the processes that opened a canary of ``folder``."""
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}
