"""What workers run to get an import, also where daskfed is not installed."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from distributed.core import error_message
from distributed.protocol.serialize import serialize

from daskfed.dask_private import Serialized
from daskfed.data.fetch import by_value, fetch_import, open_import, raise_import
from daskfed.data.parcels import Parcel


def framed(value: Any) -> tuple[Any, list[bytes]]:
    parcel = Parcel.of(value)
    return parcel.header, [bytes(frame) for frame in parcel.frames]


def failure(text: str) -> dict[str, Any]:
    def guilty() -> None:
        raise KeyError(text)

    try:
        guilty()
    except KeyError as exc:
        return dict(error_message(exc))
    raise AssertionError


def test_an_error_is_raised_again_with_the_traceback_that_it_had() -> None:
    error = failure("lost keys")
    with pytest.raises(KeyError, match="lost keys") as caught:
        raise_import(framed(error["exception"]), framed(error["traceback"]))
    assert "guilty" in [entry.name for entry in caught.traceback]


def test_an_error_without_a_traceback_or_with_one_that_does_not_open_is_still_that_error() -> None:
    error = failure("lost keys")
    broken = framed(Serialized(*serialize(b"no pickle")))
    for traceback in (None, broken):
        with pytest.raises(KeyError, match="lost keys"):
            raise_import(framed(error["exception"]), traceback)


def test_what_is_no_exception_is_raised_as_a_text() -> None:
    with pytest.raises(RuntimeError, match="just words"):
        raise_import(framed(Serialized(*serialize("just words"))), None)


def test_a_value_can_be_opened_more_than_once() -> None:
    parcel = Parcel.of(Serialized(*serialize({"a": [np.arange(3)], "b": 1})))
    for _ in range(2):
        value = open_import(parcel.header, parcel.frames, parcel.checksum)
        assert value["b"] == 1 and value["a"][0].tolist() == [0, 1, 2]


SCRIPT = """
import sys, base64, pickle
sys.modules["daskfed"] = None  # not installed
function, args = pickle.loads(base64.b64decode(sys.stdin.read()))
try:
    print(pickle.loads(function)(*args))
except OSError as exc:
    print(type(exc).__name__, str(exc)[:40])
"""


def run_elsewhere(function: Any, *args: Any) -> str:
    sent = base64.b64encode(pickle.dumps((by_value(function), args)))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], input=sent, capture_output=True, check=True, timeout=60
    ).stdout.decode().strip()  # fmt: skip


def test_workers_need_no_daskfed() -> None:
    parcel = Parcel.of(Serialized(*serialize([1, 2])))
    frames = [bytes(frame) for frame in parcel.frames]
    assert run_elsewhere(open_import, parcel.header, frames, parcel.checksum) == "[1, 2]"
    said = run_elsewhere(open_import, parcel.header, frames, parcel.checksum + 1)
    assert said == "OSError TransferError: an imported value is dama"


@pytest.mark.parametrize("function", [open_import, fetch_import, raise_import])
def test_what_is_sent_with_each_import_is_short(function: Any) -> None:
    assert len(by_value(function)) < 6000
