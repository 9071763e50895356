"""A relay in its own process, which could import what it carries, opens nothing; a stock one does (the control)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from distributed.core import Server, rpc
from distributed.protocol.serialize import Serialize, ToPickle

from tests.system.canary import Canary, CanaryError, opened_by

pytestmark = pytest.mark.system

KINDS: dict[str, Callable[[Canary], Any]] = {
    "serialised": Serialize,
    "serialised one by one": lambda canary: Serialize({"a": [canary], "b": np.arange(9)}),
    "pickled": ToPickle,
    "what msgpack cannot write": lambda canary: canary,
    "in a set": lambda canary: {canary},
    "deep inside": lambda canary: [{"op": "x", "event": (1.0, {"a": (canary,)})}],
}


class Relay(NamedTuple):
    pid: int
    address: str


@contextmanager
def relay(kind: str) -> Iterator[Relay]:
    command = [sys.executable, "-m", "tests.system.relay", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Relay(process.pid, process.stdout.readline().strip())
        process.communicate("", timeout=30)


@pytest.fixture(scope="module")
def opaque_relay() -> Iterator[Relay]:
    with relay("opaque") as running:
        yield running


@pytest.fixture(scope="module")
def stock_relay() -> Iterator[Relay]:
    with relay("stock") as running:
        yield running


def there_and_back(relay: Relay, value: Any) -> Any:
    async def main() -> Any:
        async with rpc(relay.address) as stock_end:
            await stock_end.put(value=value)
            return (await stock_end.get())["value"]

    return asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
def test_payloads_are_opened_by_their_reader_only(
    opaque_relay: Relay, tmp_path: Path, wrap: Callable[[Canary], Any]
) -> None:
    arrived = there_and_back(opaque_relay, wrap(Canary(tmp_path, 7)))
    assert "Canary" in repr(arrived)
    assert opened_by(tmp_path) == {os.getpid()}


@pytest.mark.parametrize("wrap", [ToPickle, lambda canary: canary], ids=["pickled", "what msgpack cannot write"])
def test_a_stock_relay_opens_them(stock_relay: Relay, tmp_path: Path, wrap: Callable[[Canary], Any]) -> None:
    there_and_back(stock_relay, wrap(Canary(tmp_path, 7)))
    assert opened_by(tmp_path) == {os.getpid(), stock_relay.pid}


def test_the_exception_of_an_error_reply_is_opened_by_the_caller_only(opaque_relay: Relay, tmp_path: Path) -> None:
    def fail() -> None:
        raise CanaryError(tmp_path)

    async def main() -> None:
        async with Server({"fail": fail}) as failing, rpc(opaque_relay.address) as caller:
            await failing.listen("tcp://127.0.0.1:0")
            with pytest.raises(CanaryError, match=str(tmp_path)):
                await caller.ask(address=failing.address)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert opened_by(tmp_path) == {os.getpid()}
