"""Values as the memo store has them: as they came from a worker, unopened."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from daskfed.dask_private import Serialize, Serialized, decompress_frames
from daskfed.data.fetch import open_frames
from daskfed.data.parcels import Parcel, plain_header
from daskfed.data.spill import read, written

PICKLE, FRAMES = b"P", b"F"  # how a value begins: one pickle, or frames of distributed


def packed(header: Mapping[str, Any], frames: Sequence[Any]) -> bytes:
    """Return a value in frames as bytes."""
    header = plain_header(dict(header))
    if any(header.get("compression") or ()):
        frames = decompress_frames(header, list(frames))
        header = {name: each for name, each in header.items() if name != "compression"}
    if header.get("serializer") == "pickle" and len(frames) == 1 and "is-collection" not in header:
        return PICKLE + bytes(frames[0])
    return FRAMES + written({"value": Serialized(header, list(frames))})


def packed_pickle(value: bytes) -> bytes:
    """Return a pickled value as :func:`packed` does."""
    return PICKLE + value


def pickled(value: bytes) -> bytes | None:
    """Return the pickle in a packed value; None where it is in frames."""
    return value[1:] if value.startswith(PICKLE) else None


def frames_of(value: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return header and frames of a packed value that is no single pickle."""
    parcel = Parcel.of(read(memoryview(value)[1:])["value"], checked=False)
    return dict(parcel.header), [bytes(frame) for frame in parcel.frames]


def opened(value: bytes) -> Any:
    """Return the value itself."""
    return pickle.loads(memoryview(value)[1:]) if value.startswith(PICKLE) else open_frames(*frames_of(value))


def opened_copy(copy: Any) -> Any:
    """Return what a client keeps of data that it scattered, opened."""
    if isinstance(copy, Serialize):
        return copy.data
    return open_frames(dict(copy.header), list(copy.frames)) if isinstance(copy, Serialized) else copy
