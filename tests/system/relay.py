"""A server that keeps what it is given and asks others: ``python -m tests.system.relay opaque`` (or ``stock``).

It prints its address, and stops when its standard input ends. It could open canaries, since it imports their module.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from distributed.core import Server

from daskfed.comm.opaque import OpaqueServer, relays_errors
from tests.system import canary

assert canary


class _Keeps:
    def __init__(self) -> None:
        super().__init__({"put": self.put, "get": self.get, "ask": self.ask}, deserialize=False)  # type: ignore[call-arg]
        self.value: Any = None

    def put(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return {"value": self.value}

    async def ask(self, address: str) -> Any:
        raise NotImplementedError


class OpaqueRelay(_Keeps, OpaqueServer):
    """Passes on what it is told without opening it."""

    @relays_errors
    async def ask(self, address: str) -> Any:
        """Call ``fail`` at ``address``."""
        return await self.rpc.call(address, "fail")


class StockRelay(_Keeps, Server):
    """Does the same with distributed's own means, as a stock scheduler would."""

    async def ask(self, address: str) -> Any:
        """Call ``fail`` at ``address``."""
        return await self.rpc(address).fail()


async def main(kind: str) -> None:
    """Serve until standard input ends."""
    async with OpaqueRelay() if kind == "opaque" else StockRelay() as server:
        await server.listen("tcp://127.0.0.1:0")
        print(server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
