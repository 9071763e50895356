"""Values in parts: packed and unpacked again, damage found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from distributed.protocol.serialize import serialize, to_serialize

from daskfed.dask_private import Serialized
from daskfed.data.fetch import open_import
from daskfed.data.parcels import CHUNK_BYTES, Parcel, Unpacker, pack, size_of
from daskfed.errors import TransferError

LARGEST = 4 * CHUNK_BYTES


def parcel_of(value: Any) -> Parcel:
    return Parcel.of(Serialized(*serialize(value)))


def opened(parcel: Parcel) -> Any:
    return open_import(parcel.header, list(parcel.frames), parcel.checksum)


def unpacked(messages: list[dict[str, Any]]) -> dict[Any, Parcel]:
    unpacker = Unpacker(LARGEST)
    return {key: parcel for message in messages for key, parcel in unpacker.take(message).items()}


def part_bytes(message: dict[str, Any]) -> int:
    return sum(map(size_of, message["part"].frames))


def test_a_small_value_is_one_message() -> None:
    (message,) = pack({("x", 1): parcel_of({"a": [1, 2]})})
    ((key, parcel),) = unpacked([message]).items()
    assert key == ("x", 1) and opened(parcel) == {"a": [1, 2]}


@pytest.mark.parametrize("nbytes", [CHUNK_BYTES, CHUNK_BYTES + 8, 3 * CHUNK_BYTES])
def test_a_large_value_comes_in_parts_of_bounded_size(nbytes: int) -> None:
    value = np.arange(nbytes // 8)
    messages = list(pack({"x": parcel_of(value)}))
    parts = [part_bytes(message) for message in messages[1:]]
    assert max(parts, default=0) <= CHUNK_BYTES and all(part == CHUNK_BYTES for part in parts[:-1])
    np.testing.assert_array_equal(opened(unpacked(messages)["x"]), value)


def test_small_values_come_together_up_to_a_bounded_size() -> None:
    parcels = {key: parcel_of(b"x" * (CHUNK_BYTES * 2 // 5)) for key in range(4)}
    messages = list(pack(parcels))
    assert [list(message["values"]) for message in messages] == [[0, 1], [2, 3]]
    assert unpacked(messages).keys() == parcels.keys()


def test_many_frames_share_parts_and_come_out_as_they_were() -> None:
    frames = [bytes([i]) * (CHUNK_BYTES // 3) for i in range(7)] + [b""]
    parcel = Parcel.of(Serialized({"serializer": "none"}, frames))
    messages = list(pack({"x": parcel}))
    assert len(messages) == 1 + 3
    result = unpacked(messages)["x"]
    assert [bytes(frame) for frame in result.frames] == frames
    assert result.header == {"serializer": "none"}


def test_parts_are_not_copies() -> None:
    value = np.zeros(CHUNK_BYTES, dtype="u1")
    frame = memoryview(value)
    _, first, *_ = pack({"x": Parcel.of(Serialized({}, [frame, b"more"]))})
    value[0] = 7
    assert first["part"].frames[0][0] == 7


def test_a_value_that_never_left_its_process_is_serialised() -> None:
    assert opened(Parcel.of(to_serialize([1, 2]))) == [1, 2]


def test_a_header_travels_without_what_belongs_to_its_message() -> None:
    value = Serialized(*serialize(1))
    value.header["num-sub-frames"] = 17
    assert "num-sub-frames" not in Parcel.of(value).header


def test_damage_is_found_at_the_other_site_and_at_the_worker() -> None:
    (message,) = pack({"x": parcel_of(123)})
    message["values"]["x"].frames[-1] = b"\0" * size_of(message["values"]["x"].frames[-1])
    with pytest.raises(TransferError, match="'x' arrived damaged"):
        unpacked([message])
    unpacked([{**message, "checksums": {"x": None}}])  # of which nobody keeps an account
    parcel = parcel_of(123)
    with pytest.raises(TransferError, match="an imported value is damaged"):
        open_import(parcel.header, list(parcel.frames), parcel.checksum + 1)


def test_a_lost_or_doubled_part_is_found() -> None:
    head, first, second = pack({"x": parcel_of(np.arange(CHUNK_BYTES // 4))})
    with pytest.raises(TransferError, match="broke off in the middle"):
        unpacked([head, first, head])
    with pytest.raises(TransferError, match="arrived damaged"):
        unpacked([head, first, {"part": Serialized({}, [b"?" * part_bytes(second)])}])
    with pytest.raises(TransferError, match="arrived damaged"):
        unpacked([head, first, first])
    with pytest.raises(TransferError, match="longer than announced"):
        unpacked([head, first, {"part": Serialized({}, [b"?" * (CHUNK_BYTES + 10_000)])}])
    with pytest.raises(TransferError, match="has 16777217 bytes, more than the 16777216 that"):
        unpacked([{**head, "lengths": [LARGEST + 1]}])
    with pytest.raises(TransferError, match="without its beginning"):
        unpacked([first])
    with pytest.raises(TransferError, match=r"unexpected message with \['hello'\]"):
        unpacked([{"hello": 1}])


def test_compressed_frames_are_opened() -> None:
    from distributed.protocol.compression import maybe_compress

    header, frames = serialize(np.zeros(10**6))
    compressed = [maybe_compress(frame, compression="zlib") for frame in frames]
    header["compression"] = tuple(name for name, _ in compressed)
    assert any(header["compression"])
    value = opened(Parcel.of(Serialized(header, [frame for _, frame in compressed])))
    np.testing.assert_array_equal(value, np.zeros(10**6))
