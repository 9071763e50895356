"""What does not fit into memory goes to disk, comes back as it was, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed.protocol import deserialize, serialize, to_serialize
from distributed.protocol.serialize import Serialized

from daskfed.data.spill import Spilled, nbytes_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with dask.config.set({"temporary-directory": str(tmp_path)}):
        yield tmp_path


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def payload(n: int, nbytes: int = 10_000) -> dict[str, Any]:
    return {"expr": Serialized(*serialize(np.full(nbytes, n, "u1"))), "priorities": {("x", n): n}}


def value_of(payload: Any) -> Any:
    return deserialize(payload["expr"].header, list(payload["expr"].frames))


def test_what_fits_stays_in_memory(folder: Path) -> None:
    store = Spilled("1 MiB")
    store["a"] = payload(1)
    assert list(store) == ["a"] and len(store) == 1 and "a" in store and "b" not in store
    assert not list(folder.iterdir())
    del store["a"]
    with pytest.raises(KeyError):
        store["a"]


def test_what_does_not_fit_comes_back_from_disk(folder: Path) -> None:
    store = Spilled(100_000)
    for n in range(50):
        store[f"b{n}"] = payload(n)
    assert 300_000 < on_disk(folder) < 600_000
    assert list(map(len, (store, set(store)))) == [50, 50]
    for n in range(50):
        assert (value_of(store[f"b{n}"]) == n).all()
        assert dict(store[f"b{n}"]["priorities"]) == {("x", n): n}
    for n in range(50):
        assert store.pop(f"b{n}") is not None
    assert not store and on_disk(folder) < 1000
    store.close()
    assert on_disk(folder) < 1000


def test_removing_makes_room_again(folder: Path) -> None:
    store = Spilled(100_000)
    for n in range(100):
        store["one"] = payload(n)
        del store["one"]
    assert not list(folder.iterdir())


def test_data_of_a_user_is_pickled_when_it_is_spilled(folder: Path) -> None:
    store = Spilled(1000)
    store["x"] = to_serialize(np.arange(1000))
    store["y"] = to_serialize(["text"])
    found = store["x"]
    assert isinstance(found, Serialized)
    assert (deserialize(found.header, list(found.frames)) == np.arange(1000)).all()
    store.close()
    assert not store


def test_a_folder_whose_process_was_killed_is_cleared_away_by_the_next(folder: Path) -> None:
    code = (
        "import dask, os, signal; from daskfed.data.spill import Spilled;"
        f"dask.config.set({{'temporary-directory': {str(folder)!r}}}); store = Spilled(10);"
        "store['a'] = b'x' * 100_000; store['b'] = b'y'; os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert ended.returncode == -signal.SIGKILL and on_disk(folder) > 100_000
    store = Spilled(10)
    store["c"] = b"z" * 100
    assert on_disk(folder) < 10_000
    store.close()


def test_sizes() -> None:
    array = np.zeros(10_000, "u1")
    assert 10_000 <= nbytes_of(to_serialize(array)) <= 10_500
    assert 10_000 <= nbytes_of({"expr": Serialized(*serialize(array)), "n": [1, "two", b"three"]}) <= 12_000
