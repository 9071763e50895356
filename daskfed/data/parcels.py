"""Values on their way between sites: opaque frames with a checksum, cut into chunks. Pure.

The checksum is zlib's CRC-32 over all frames: it finds what a bad cable or a bug in a relay does, not what an attacker
does (that is what TLS is for).

A stream of keys is a sequence of messages::

    {"key": k, "value": <frames>, "checksum": n}                       a small value, whole
    {"key": k, "head": <header>, "lengths": [...], "checksum": n}      a large one begins
    {"part": <frames>}                                                 ... and comes in parts of at most CHUNK_BYTES
    {"key": k, "missing": "why"}                                       not to be had here
    {"end": True}                                                      last; with "error" where the stream breaks off
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distributed.protocol.serialize import serialize

from daskfed.dask_private import Serialize, Serialized
from daskfed.errors import TransferError
from daskfed.messages import Key

CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value as its worker sent it, unopened."""

    header: dict[str, Any]
    frames: tuple[Any, ...]  # bytes-like
    checksum: int  # CRC-32 of all frames

    @classmethod
    def of(cls, value: Any) -> Parcel:
        """Wrap what an opaque comm hands over; a value that never left this process is serialised here."""
        if isinstance(value, Serialize):
            value = Serialized(*serialize(value.data, on_error="raise"))
        frames = tuple(value.frames)
        return cls(plain_header(value.header), frames, checksum_of(frames))

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return sum(size_of(frame) for frame in self.frames)

    def serialized(self) -> Serialized:
        """Return it as a comm takes it."""
        return Serialized(dict(self.header), list(self.frames))

    def check(self, key: Key) -> Parcel:
        """Return itself; raises TransferError where the frames do not have the checksum."""
        if (found := checksum_of(self.frames)) != self.checksum:
            raise TransferError(f"{key!r} arrived damaged: its checksum is {found:#x} instead of {self.checksum:#x}")
        return self


def plain_header(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header without what belongs to the message it came in."""
    return {name: value for name, value in header.items() if name != "num-sub-frames"}


def checksum_of(frames: Any) -> int:
    """Return the CRC-32 of all frames."""
    checksum = 0
    for frame in frames:
        checksum = zlib.crc32(frame, checksum)
    return checksum


def size_of(frame: Any) -> int:
    """Return the bytes of one frame."""
    return memoryview(frame).nbytes


def pack(key: Key, parcel: Parcel) -> Iterator[dict[str, Any]]:
    """Yield the messages that carry one value."""
    if parcel.nbytes <= CHUNK_BYTES:
        yield {"key": key, "value": parcel.serialized(), "checksum": parcel.checksum}
        return
    lengths = [size_of(frame) for frame in parcel.frames]
    head = Serialized(dict(parcel.header), [])
    yield {"key": key, "head": head, "lengths": lengths, "checksum": parcel.checksum}
    for part in _parts(parcel.frames):
        yield {"part": Serialized({}, part)}


def _parts(frames: tuple[Any, ...]) -> Iterator[list[memoryview]]:
    """Cut frames into lists of pieces of at most CHUNK_BYTES in all, without copying."""
    part: list[memoryview] = []
    room = CHUNK_BYTES
    for frame in frames:
        left = memoryview(frame).cast("B")
        while left.nbytes:
            part.append(left[:room])
            left, room = left[room:], room - part[-1].nbytes
            if room == 0:
                yield part
                part, room = [], CHUNK_BYTES
    if part:
        yield part


class Unpacker:
    """Puts parcels together again from the messages of a stream.

    :meth:`take` raises TransferError where a message does not fit what came before, or a checksum its value.
    """

    def __init__(self) -> None:
        self._key: Key | None = None
        self._head: dict[str, Any] = {}
        self._lengths: tuple[int, ...] = ()
        self._checksum = 0
        self._data = bytearray()

    def take(self, message: dict[str, Any]) -> tuple[Key, Parcel] | None:
        """Take in the next message and return a key and its parcel if that completes it."""
        if "value" in message:
            value = message["value"]
            parcel = Parcel(plain_header(value.header), tuple(value.frames), message["checksum"])
            return message["key"], parcel.check(message["key"])
        if "head" in message:
            self._begin(message)
        elif "part" in message:
            self._append(message["part"].frames)
        else:
            raise TransferError(f"unexpected message with {sorted(map(str, message))} in a stream of keys")
        return self._completed()

    def _begin(self, message: dict[str, Any]) -> None:
        if self._key is not None:
            raise TransferError(f"{self._key!r} broke off in the middle")
        self._key, self._head = message["key"], plain_header(message["head"].header)
        self._lengths, self._checksum = tuple(message["lengths"]), message["checksum"]
        self._data = bytearray()

    def _append(self, frames: Any) -> None:
        if self._key is None:
            raise TransferError("a part of a value came without its beginning")
        for frame in frames:
            self._data += frame
        if len(self._data) > sum(self._lengths):
            raise TransferError(f"{self._key!r} is longer than announced")

    def _completed(self) -> tuple[Key, Parcel] | None:
        if self._key is None or len(self._data) < sum(self._lengths):
            return None
        view, frames, start = memoryview(self._data), [], 0
        for length in self._lengths:
            frames.append(view[start : start + length])
            start += length
        key, self._key = self._key, None
        return key, Parcel(self._head, tuple(frames), self._checksum).check(key)
