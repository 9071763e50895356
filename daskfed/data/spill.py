"""A dict of opaque messages that holds so many bytes in memory, and what was not used for longest on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from typing import Any

import dask
from dask.utils import parse_bytes
from distributed.protocol import dumps
from distributed.utils import nbytes
from zict import Buffer, File, Func

from daskfed.comm.opaque import loads_opaque
from daskfed.dask_private import Serialize, Serialized, WorkSpace, pack_frames, sizeof, unpack_frames

PLAIN_NBYTES = 100  # taken for what is neither bytes nor a payload


class Spilled(MutableMapping[str, Any]):
    """Name -> message; ``limit``: bytes that stay in memory, as ``distributed`` writes them ("512 MiB").

    The folder, in Dask's temporary directory, is made when it is first needed. It ends with :meth:`close`, or, if the
    process is killed, when the next process on this machine makes one.
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = parse_bytes(limit)
        self._folder: Any = None
        self._data: MutableMapping[str, Any] = {}
        self._nbytes = 0

    def __getitem__(self, name: str) -> Any:
        return self._data[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._folder is None:
            self.pop(name, None)
            self._nbytes += nbytes_of(value)
            if self._nbytes > self.limit:
                self._begin_to_spill()
        self._data[name] = value

    def __delitem__(self, name: str) -> None:
        if self._folder is None:
            self._nbytes -= nbytes_of(self._data[name])
        del self._data[name]

    def __contains__(self, name: object) -> bool:
        return name in self._data

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def _begin_to_spill(self) -> None:
        base = dask.config.get("temporary-directory") or os.getcwd()
        self._folder = WorkSpace(os.path.join(base, "dask-scratch-space")).new_work_dir(prefix="daskfed-")
        on_disk: MutableMapping[str, Any] = Func(written, read, File(self._folder.dir_path))
        buffer: Buffer[str, Any] = Buffer({}, on_disk, self.limit, _weight)
        buffer.update(self._data)
        self._data = buffer

    def close(self) -> None:
        """Forget everything."""
        self._data = {}
        self._nbytes = 0
        if self._folder is not None:
            self._folder.release()
            self._folder = None


def written(value: Any) -> bytes:
    """Return a message as bytes, unopened parts as they are."""
    return bytes(pack_frames(dumps(value)))


def read(value: Any) -> Any:
    """Return the message that was written, its payloads unopened."""
    return loads_opaque(list(unpack_frames(value)))


def _weight(name: str, value: Any) -> float:
    return nbytes_of(value)


def nbytes_of(value: Any) -> int:
    """Return about how many bytes a message takes."""
    if isinstance(value, Serialized):
        return int(sum(map(nbytes, value.frames))) + PLAIN_NBYTES
    if isinstance(value, Serialize):
        return int(sizeof(value.data))
    if isinstance(value, dict):
        return sum(map(nbytes_of, value.values())) + PLAIN_NBYTES * (len(value) + 1)
    if isinstance(value, list | tuple):
        return sum(map(nbytes_of, value)) + PLAIN_NBYTES
    if isinstance(value, str | bytes | bytearray | memoryview):
        return len(value) + PLAIN_NBYTES
    return PLAIN_NBYTES
