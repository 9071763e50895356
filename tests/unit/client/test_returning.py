"""What a client remembers for a hub that comes back, and how its calls wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed.protocol import to_serialize
from distributed.protocol.serialize import Serialized

from daskfed.client import returning
from daskfed.client.returning import Memory, PatientRPC, Replicas, dialled_at, pauses
from daskfed.client.submission import Submission
from daskfed.messages import REQUEST, BlockKind, BlockSpec, decode_block


def submission(*names: str) -> Submission:
    specs = [BlockSpec(name, "", "", BlockKind.GRAPH, (), (name,), 1, ()) for name in names]
    return Submission(specs, [{"expr": name} for name in names])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(returning, "PAUSE_S", (0.001, 0.002))
    yield


class TestMemory:
    def test_a_hub_is_told_what_it_has_not_numbered(self) -> None:
        memory = Memory()
        memory.keep(submission("c/0/0", "c/0/1"))
        memory.keep(submission("c/1/0"))
        memory.arrived("c/0/0", 7, 2, epoch=1)
        told = memory.message(1, ["x"])
        assert (told["op"], told["wanted"], told["kept"]) == ("fed-back", ["x"], [])
        assert [(block["id"], arrival) for block, arrival in zip(told["blocks"], told["arrivals"], strict=True)] == [
            ("c/1/0", 0)
        ]
        anew = memory.message(2, [])
        assert [block["id"] for block in anew["blocks"]] == ["c/0/0", "c/0/1", "c/1/0"]
        assert anew["arrivals"] == [7, 8, 0] and [each["expr"] for each in anew["payloads"]] == [
            "c/0/0", "c/0/1", "c/1/0",
        ]  # fmt: skip

    def test_a_hub_that_starts_anew_is_told_to_which_sites_blocks_are_bound(self) -> None:
        memory = Memory()
        memory.keep(submission("c/0/0", "c/0/1"))
        memory.bound({"c/0/1": ("north",), "c/9/9": ("south",)})
        sites = [decode_block(block).constraint.sites for block in memory.message(2, [])["blocks"]]
        assert sites == [(), ("north",)]

    def test_what_will_never_be_needed_is_forgotten(self) -> None:
        memory = Memory()
        memory.keep(submission("c/0/0"))
        memory.forget("c/0/0")
        memory.forget("c/0/0")
        memory.arrived("c/0/0", 1, 1, epoch=1)
        assert memory.message(2, [])["blocks"] == [] and not memory.payloads

    def test_payloads_beyond_the_limit_go_to_disk(self, tmp_path: Path) -> None:
        with dask.config.set({"temporary-directory": str(tmp_path), "daskfed.client.memory": "10 kB"}):
            memory = Memory()
            for n in range(10):
                memory.keep_data({("x", n): to_serialize(np.full(4000, n))})
            copies = memory.copies([("x", 0), "unknown"])
            assert list(copies) == [("x", 0)] and isinstance(copies["x", 0], Serialized)
            memory.drop_data([("x", n) for n in range(10)] + ["unknown"])
            assert not memory.data and not memory.keys
            memory.close()


class Hub:
    """Answers calls, after it was away for as many as ``away`` says."""

    def __init__(self, away: int = 0, error: OSError | None = None) -> None:
        self.away = away
        self.error = error or OSError("no connection")
        self.calls: list[dict[str, Any]] = []
        self.address = "tcp://hub"

    def __getattr__(self, op: str) -> Callable[..., Awaitable[Any]]:
        async def call(**kwargs: Any) -> str:
            self.calls.append({"op": op, **kwargs})
            if len(self.calls) <= self.away:
                raise self.error
            return "done"

        return call


def ask(hub: Hub, op: str, status: str = "connecting", **kwargs: Any) -> Any:
    memory = Memory()
    rpc = PatientRPC(hub, lambda: status, memory, lambda: 7)
    return asyncio.run(getattr(rpc, op)(**kwargs)), memory


class TestCalls:
    def test_a_call_waits_for_the_hub(self) -> None:
        hub = Hub(away=3)
        assert ask(hub, "who_has", keys=["x"])[0] == "done"
        assert hub.calls == [{"op": "who_has", "keys": ["x"]}] * 4

    def test_a_call_of_a_client_that_has_given_up_fails(self) -> None:
        with pytest.raises(OSError, match="no connection"):
            ask(Hub(away=3), "who_has", status="closed")

    def test_a_client_may_not_have_noticed_yet_that_its_hub_is_gone(self) -> None:
        assert ask(Hub(away=3), "who_has", status="running")[0] == "done"

    def test_a_hub_that_answers_with_an_error_is_not_gone(self) -> None:
        hub = Hub(away=1, error=TimeoutError("no site could take the data"))
        with pytest.raises(TimeoutError, match="no site"):
            ask(hub, "scatter", status="running", data={}, workers=None)

    def test_a_hub_that_cannot_be_reached_though_its_stream_stands_is_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(returning, "NOTICED_S", 0.01)
        with pytest.raises(OSError, match="no connection"):
            ask(Hub(away=10**6), "who_has", status="running")

    def test_what_is_asked_again_carries_the_same_id(self) -> None:
        hub = Hub(away=2)
        ask(hub, "queue_get", name="q")
        assert len({call[REQUEST] for call in hub.calls}) == 1 and len(hub.calls) == 3
        ask(hub, "queue_get", name="q")
        assert len({call[REQUEST] for call in hub.calls}) == 2

    def test_attributes_pass(self) -> None:
        rpc = PatientRPC(Hub(), lambda: "running", Memory(), lambda: 7)
        assert rpc.address == "tcp://hub"
        with dialled_at("inproc://here"):
            assert rpc.address == "inproc://here"
            with dialled_at(""):
                assert rpc.address == "tcp://hub"
        assert rpc.address == "tcp://hub"

    def test_pauses_grow_up_to_the_longest(self) -> None:
        found = pauses()
        assert [next(found) for _ in range(4)] == [0.001, 0.002, 0.002, 0.002]


class TestScatter:
    def test_a_copy_is_kept_until_the_hub_says_otherwise(self) -> None:
        hub = Hub(away=1)
        _, memory = ask(hub, "scatter", data={"x": 1}, workers=["fed://north", Replicas(2)], client="c")
        assert memory.copies(["x"]) == {"x": 1}
        request = {"data": {"x": 1}, "workers": ["fed://north"], "client": "c", "kept": True, "replicas": 2}
        assert hub.calls == [{"op": "scatter", **request}] * 2
        memory.drop_data(["x"])
        assert memory.copies(["x"]) == {}

    def test_of_what_did_not_arrive_no_copy_is_kept(self) -> None:
        memory = Memory()
        memory.keep_data({"x": 1})
        rpc = PatientRPC(Hub(away=1), lambda: "closed", memory, lambda: 7)
        with pytest.raises(OSError, match="no connection"):
            asyncio.run(rpc.scatter({"x": 1, "y": 2}, None, client="c"))
        assert memory.copies(["x", "y"]) == {"x": 1}

    def test_a_copy_is_brought_for_nobody_new(self) -> None:
        hub = Hub()
        ask(hub, "bring", copies={"x": 1}, client="c", timeout_s=5.0)
        request = {"data": {"x": 1}, "workers": [], "client": "c", "timeout": 5.0, "again": True}
        assert hub.calls == [{"op": "scatter", **request}]
