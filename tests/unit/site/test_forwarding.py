"""The agent announces what tasks put and brings what they take, in that order around the hub's reply."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

import pytest
from distributed.protocol.serialize import Pickled

from daskfed.comm.opaque import OpaqueError, OpaquePool, OpaqueServer
from daskfed.messages import Key
from daskfed.site.forwarding import agent_handlers, forward_to_hub, keys_put, keys_taken


class RecordingAgent:
    """Answers as it was told and writes down what it was asked."""

    def __init__(self, reply: Any = None) -> None:
        self.reply = reply
        self.log: list[Any] = []

    async def call_hub(self, op: str, **kwargs: Any) -> Any:
        self.log.append((op, kwargs))
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    async def announce_keys(self, keys: Mapping[Key, int | None]) -> None:
        self.log.append(("announce", dict(keys)))

    async def bring_keys(self, keys: Collection[Key]) -> None:
        self.log.append(("bring", list(keys)))


def future(key: Key) -> dict[str, Any]:
    return {"type": "Future", "value": key, "state": "memory"}


VALUE = {"type": "msgpack", "value": {"type": "Future", "value": "not a key"}}


def test_what_is_put_is_announced_before_the_hub_hears_of_it() -> None:
    agent = RecordingAgent()
    asyncio.run(forward_to_hub(agent, "variable_set", {"name": "v", "key": "x"}, {"x": 8}))
    assert agent.log == [("announce", {"x": 8}), ("variable_set", {"name": "v", "key": "x"})]


def test_what_is_taken_is_brought_before_the_task_hears_of_it() -> None:
    agent = RecordingAgent(future(("x", 0)))
    assert asyncio.run(forward_to_hub(agent, "variable_get", {"name": "v"})) == future(("x", 0))
    assert agent.log == [("variable_get", {"name": "v"}), ("bring", [("x", 0)])]


@pytest.mark.parametrize(
    ("op", "reply", "keys"),
    [
        ("queue_get", future("x"), ["x"]),
        ("queue_get", [future("x"), VALUE, future("y")], ["x", "y"]),
        ("publish_get", [{"data": None, "keys": ("x", "y")}, None], ["x", "y"]),
        ("variable_get", VALUE, []),
        ("variable_get", {"type": "msgpack", "value": Pickled({}, [])}, []),
        ("event_wait", True, []),
        ("queue_qsize", 3, []),
    ],
)
def test_which_keys_a_reply_hands_out(op: str, reply: Any, keys: list[Key]) -> None:
    assert keys_taken(op, reply) == keys


@pytest.mark.parametrize(
    ("op", "kwargs", "keys"),
    [
        ("variable_set", {"key": 0, "name": "v"}, [0]),
        ("queue_put", {"key": ("x", 1)}, [("x", 1)]),
        ("queue_put", {"data": 1}, []),
        ("variable_set", {"key": None, "data": 1}, []),
        ("publish_put", {"keys": (("x",), (), ("y", "z")), "names": ("a", "b", "c")}, ["x", "y", "z"]),
        ("variable-future-received-confirm", {"key": "x"}, []),
    ],
)
def test_which_keys_a_request_puts(op: str, kwargs: dict[str, Any], keys: list[Key]) -> None:
    assert keys_put(op, kwargs) == keys


def test_the_agent_serves_its_own_site_only_and_passes_errors_on() -> None:
    async def main() -> None:
        refusal = OpaqueError({"exception": b"opaque", "exception_text": "no such lock"})
        agent = RecordingAgent(refusal)
        async with OpaqueServer(agent_handlers(agent, "secret")) as server, OpaquePool() as pool:
            await server.listen("tcp://127.0.0.1:0")
            request = {"hub_op": "semaphore_acquire", "kwargs": {"name": "l"}}
            for wrong in ("", "Secret", None):
                with pytest.raises(OpaqueError, match="not this agent's"):
                    await pool.call(server.address, "forward-to-hub", token=wrong, **request)
            assert agent.log == []
            with pytest.raises(OpaqueError, match="no such lock") as failure:
                await pool.call(server.address, "forward-to-hub", token="secret", **request)
            assert failure.value.exception == b"opaque"
            assert agent.log == [("semaphore_acquire", {"name": "l"})]

    asyncio.run(asyncio.wait_for(main(), 20))
