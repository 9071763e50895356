"""Where in Dask's configuration a setting was written: the file and the line, or the variable. For errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import yaml

IN_PROCESS = "dask.config, set in this process"
PREFIX = "DASK_"


def where_set(path: Sequence[str]) -> str:
    """Return where what Dask's configuration has at ``path`` is from, like ``/etc/dask/fed.yaml, line 12``.

    Where several files have it, the one that counts is the last. Of what is not there at all, the nearest above it is
    named.
    """
    if variable := _variable(path):
        return f"environment variable {variable}"
    best: tuple[int, str] = (0, IN_PROCESS)
    for file in _files():
        depth, line = _line_of(file, path)
        if depth >= max(best[0], 2):  # 1: only "daskfed:" itself
            best = depth, f"{file}, line {line}"
    return best[1]


def _variable(path: Sequence[str]) -> str | None:
    """Return the environment variable that sets a setting, or something above it."""
    for length in range(len(path), 1, -1):
        name = PREFIX + "__".join(path[:length])
        for variable in os.environ:
            if _plain(variable) == _plain(name):
                return variable
    return None


def _files() -> Iterator[Path]:
    """Yield the files that Dask reads, those that count more later."""
    for place in map(Path, dask.config.paths):
        if place.is_dir():
            yield from sorted(file for file in place.iterdir() if file.suffix in (".json", ".yaml", ".yml"))
        elif place.is_file():
            yield place


def _line_of(file: Path, path: Sequence[str]) -> tuple[int, int]:
    """Return how many steps of ``path`` a file has, and the line of the last of these."""
    try:
        with file.open() as stream:
            node = yaml.compose(stream, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return 0, 0
    depth, line = 0, 0
    for step in path:
        found = _entry(node, step)
        if found is None:
            break
        key, node = found
        depth, line = depth + 1, key.start_mark.line + 1
    return depth, line


def _entry(node: Any, name: str) -> tuple[Any, Any] | None:
    """Return key and value of an entry of a mapping; names are alike but for ``-`` and ``_``."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((key, value) for key, value in node.value if _plain(str(key.value)) == _plain(name)), None)


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()
