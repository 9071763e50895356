"""What the hub's shell answers by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed.core import rpc

from daskfed.hub.server import Hub


def ask(op: str, **kwargs: Any) -> Any:
    async def asked() -> Any:
        async with await Hub().start_at("tcp://127.0.0.1:0") as hub:
            async with rpc(hub.address) as remote:
                return await getattr(remote, op)(**kwargs)

    return asyncio.run(asked())


@pytest.mark.parametrize("op", ["update_data", "adaptive_target", "no_such_thing"])
def test_what_it_cannot_do_is_an_error(op: str) -> None:
    with pytest.raises(NotImplementedError, match=op):
        ask(op, keys=["x"])


def test_what_it_can_do_is_answered() -> None:
    assert ask("identity")["type"] == "Hub"
