"""Values are packed unopened, and come out as they went in."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed.protocol import deserialize, serialize, to_serialize
from distributed.protocol.serialize import Serialized, merge_and_deserialize

from daskfed.data.packed import frames_of, opened, opened_copy, packed, packed_pickle, pickled

VALUES = [1, "a", None, {"a": [1, 2]}, np.arange(10.0), [np.ones(3), "x"], {"a": (np.ones(2),)}, np.zeros(0), b"bytes"]


def same(a: Any, b: Any) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_from_frames(value: Any) -> None:
    for form in (value, to_serialize(value)):
        header, frames = serialize(form)
        kept = packed({**header, "num-sub-frames": len(frames)}, frames)
        assert isinstance(kept, bytes)
        assert same(opened(kept), value) and same(opened(kept), value), "more than once"


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_pickle_stays_one(value: Any) -> None:
    kept = packed_pickle(pickle.dumps(value))
    assert pickled(kept) == pickle.dumps(value) and same(opened(kept), value)


def test_frames_are_opened_by_what_workers_have() -> None:
    frame = pd.DataFrame({"a": np.arange(1000)})
    kept = packed(*serialize(frame))
    assert pickled(kept) is None
    pd.testing.assert_frame_equal(merge_and_deserialize(*frames_of(kept)), frame)


def test_copies_of_scattered_data() -> None:
    array = np.arange(5)
    assert opened_copy(to_serialize(array)) is array
    np.testing.assert_array_equal(opened_copy(Serialized(*serialize(array))), deserialize(*serialize(array)))
