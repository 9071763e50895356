"""Small files of this user that several processes read and write."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Have others who lock this file wait; its folder is made, for this user only, where there is none."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_whole(file: Path, text: str) -> None:
    """Write a file, for this user only, so that a reader finds the old one or the new one; raises OSError."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(text)
    new.replace(file)
