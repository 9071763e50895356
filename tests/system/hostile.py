"""A client that says what it likes: Dask's client protocol by hand, over raw comms."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

from distributed.comm.core import CommClosedError, connect
from distributed.core import rpc

REPLY_S = 20.0


class Raw:
    """A stream to a hub, registered under an id of one's choice, and calls without anything that a client adds."""

    def __init__(self, address: str, client: str | None = None) -> None:
        self.address = address
        self.id = client or f"Client-{uuid.uuid4()}"
        self.heard: list[dict[str, Any]] = []

    async def __aenter__(self) -> Raw:
        self.comm = await connect(self.address)
        await self.comm.write({"op": "register-client", "client": self.id, "reply": False, "versions": {}})
        self.rpc: Any = rpc(self.address)
        self._reader = asyncio.create_task(self._read())
        await self.hears(lambda message: message["op"] == "stream-start")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._reader.cancel()
        self.comm.abort()
        await self.rpc.close_rpc()

    async def _read(self) -> None:
        try:
            while True:
                self.heard.extend(await self.comm.read())
        except CommClosedError:
            self.heard.append({"op": "hung up"})

    async def say(self, *messages: dict[str, Any]) -> None:
        """Write messages on the stream."""
        await self.comm.write(list(messages))

    async def hears(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a message."""
        deadline = time.monotonic() + REPLY_S
        while not (found := [message for message in self.heard if wanted(message)]):
            assert time.monotonic() < deadline, f"it was not said; heard {self.heard}"
            await asyncio.sleep(0.02)
        return found[0]

    async def settled(self) -> list[dict[str, Any]]:
        """Return all that was heard once the hub has taken in what was said: it answers a question about nothing."""
        nothing = f"nothing-{uuid.uuid4().hex}"
        await self.say({"op": "report-key", "key": nothing})
        await self.hears(lambda message: nothing in message.get("keys", ()))
        return self.heard
