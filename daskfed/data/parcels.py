"""Values on their way between sites: opaque frames with a checksum, cut into chunks. Pure.

The checksum is zlib's CRC-32 over all frames: it finds what a bad cable or a bug in a relay does, not what an attacker
does (that is what TLS is for).

A stream of keys is a sequence of messages::

    {"values": {k: <frames>, ...}, "checksums": {k: n, ...}}           small values, whole
    {"key": k, "head": <header>, "lengths": [...], "checksum": n}      a large one begins
    {"part": <frames>}                                                 ... and comes in parts of at most CHUNK_BYTES
    {"missing": {k: "why", ...}}                                       not to be had here

The last one has ``"end": True`` too, and ``"error"`` where the stream breaks off. Without checksums (``None``) nothing
is compared: between a site and a client, where connections do that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distributed.protocol.serialize import serialize

from daskfed.dask_private import Serialize, Serialized, host_array
from daskfed.errors import TransferError
from daskfed.messages import Key

CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value as its worker sent it, unopened."""

    header: dict[str, Any]
    frames: tuple[Any, ...]  # bytes-like
    checksum: int | None  # CRC-32 of all frames; None: nobody compares it

    @classmethod
    def of(cls, value: Any, checked: bool = True) -> Parcel:
        """Wrap what an opaque comm hands over; a value that never left this process is serialised here."""
        if isinstance(value, Serialize):
            value = Serialized(*serialize(value.data, on_error="raise"))
        frames = tuple(value.frames)
        return cls(plain_header(value.header), frames, checksum_of(frames) if checked else None)

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return sum(size_of(frame) for frame in self.frames)

    def serialized(self) -> Serialized:
        """Return it as a comm takes it."""
        return Serialized(dict(self.header), list(self.frames))

    def check(self, key: Key) -> Parcel:
        """Return itself; raises TransferError where the frames do not have the checksum."""
        if self.checksum is not None and (found := checksum_of(self.frames)) != self.checksum:
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


def pack(parcels: Mapping[Key, Parcel]) -> Iterator[dict[str, Any]]:
    """Yield the messages that carry values, the small ones first."""
    small = {key: parcel for key, parcel in parcels.items() if parcel.nbytes <= CHUNK_BYTES}
    for batch in _batches(small):
        checksums = {key: small[key].checksum for key in batch}
        yield {"values": {key: small[key].serialized() for key in batch}, "checksums": checksums}
    for key, parcel in parcels.items():
        if key not in small:
            lengths = [size_of(frame) for frame in parcel.frames]
            head = Serialized(dict(parcel.header), [])
            yield {"key": key, "head": head, "lengths": lengths, "checksum": parcel.checksum}
            for part in _parts(parcel.frames):
                yield {"part": Serialized({}, part)}


def _batches(parcels: Mapping[Key, Parcel]) -> Iterator[list[Key]]:
    """Yield keys of values that have at most CHUNK_BYTES together."""
    batch: list[Key] = []
    nbytes = 0
    for key, parcel in parcels.items():
        if batch and nbytes + parcel.nbytes > CHUNK_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(key)
        nbytes += parcel.nbytes
    if batch:
        yield batch


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
    """Puts parcels together again from the messages of a stream; ``largest`` is the most bytes that one may announce.

    :meth:`take` raises TransferError where a message does not fit what came before, or a checksum its value.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._key: Key | None = None
        self._head: dict[str, Any] = {}
        self._lengths: tuple[int, ...] = ()
        self._checksum: int | None = None
        self._data = memoryview(b"")
        self._filled = 0  # bytes of it

    def take(self, message: dict[str, Any]) -> dict[Key, Parcel]:
        """Take in the next message and return the parcels that it completes."""
        if "values" in message:
            checksums = message["checksums"]
            return {
                key: Parcel(plain_header(value.header), tuple(value.frames), checksums[key]).check(key)
                for key, value in message["values"].items()
            }
        if "head" in message:
            self._begin(message)
        elif "part" in message:
            self._append(message["part"].frames)
        elif not message.keys() <= {"missing", "end", "error", "site"}:
            raise TransferError(f"unexpected message with {sorted(map(str, message))} in a stream of keys")
        return self._completed()

    def _begin(self, message: dict[str, Any]) -> None:
        if self._key is not None:
            raise TransferError(f"{self._key!r} broke off in the middle")
        if (nbytes := sum(message["lengths"])) > self.largest:
            limit = f"more than the {self.largest} that daskfed.comm.largest-message allows"
            raise TransferError(f"{message['key']!r} has {nbytes} bytes, {limit}")
        self._key, self._head = message["key"], plain_header(message["head"].header)
        self._lengths, self._checksum = tuple(message["lengths"]), message["checksum"]
        self._data, self._filled = memoryview(host_array(nbytes)), 0

    def _append(self, frames: Any) -> None:
        if self._key is None:
            raise TransferError("a part of a value came without its beginning")
        for frame in frames:
            start, self._filled = self._filled, self._filled + size_of(frame)
            if self._filled > len(self._data):
                raise TransferError(f"{self._key!r} is longer than announced")
            self._data[start : self._filled] = memoryview(frame).cast("B")

    def _completed(self) -> dict[Key, Parcel]:
        if self._key is None or self._filled < len(self._data):
            return {}
        frames, start = [], 0
        for length in self._lengths:
            frames.append(self._data[start : start + length])
            start += length
        key, self._key, self._data = self._key, None, memoryview(b"")
        return {key: Parcel(self._head, tuple(frames), self._checksum).check(key)}
