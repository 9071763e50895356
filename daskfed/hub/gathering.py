"""Values of keys for clients, unopened: in one answer, as any scheduler gives them, or in a stream.

The stream is made of the sites' streams (see :mod:`daskfed.data.parcels`), each message with its ``site`` and passed on
before the next one of that site is read: the hub holds no more than one message of each, however much is gathered.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status

from daskfed.comm.opaque import relays_errors
from daskfed.comm.pacing import Paced
from daskfed.ending import end_tasks
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub


STREAMS_PER_SITE = 8  # at a time, to all clients together: each takes memory of the site's agent


class Gathering:
    """Answers to clients that gather."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._slots: dict[str, asyncio.Semaphore] = {}  # site -> how many streams may begin

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        return {"gather": relays_errors(self.gather), "fed_gather": self.stream}

    async def gather(self, keys: Collection[Key], serializers: Any = None) -> dict[str, Any]:
        """Return ``{"status": "OK", "data": {key: value}}``, values unopened, or which keys could not be had."""
        by_site, absent = self._locate(keys)
        if absent:
            return {"status": "error", "keys": absent}
        calls = [self.hub.ports[site].call("gather", keys=there) for site, there in by_site.items()]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        data: dict[Key, Any] = {}
        for there, reply in zip(by_site.values(), replies, strict=True):
            if isinstance(reply, OSError):
                absent.extend(there)
            elif isinstance(reply, BaseException):
                raise reply
            elif reply["status"] != "OK":
                absent.extend(reply["keys"])
            else:
                data |= reply["data"]
        return {"status": "error", "keys": absent} if absent else {"status": "OK", "data": data}

    def _locate(self, keys: Collection[Key]) -> tuple[dict[str, list[Key]], list[Key]]:
        by_site: dict[str, list[Key]] = defaultdict(list)
        absent: list[Key] = []
        for key in keys:
            state = self.hub.core.ledger.keys.peek(key)
            site = next((name for name in state.holders if name in self.hub.ports), None) if state else None
            if site is None:
                absent.append(key)
            else:
                by_site[site].append(key)
        return by_site, absent

    async def stream(self, comm: Comm, keys: Collection[Key]) -> Status:
        """Write the messages with these keys to ``comm``; the last one has ``end``."""
        by_site, absent = self._locate(keys)
        if absent or not by_site:
            await comm.write({"missing": dict.fromkeys(absent, "no site has it"), "end": not by_site})
        paced, running, turn = Paced(comm), set(by_site), asyncio.Lock()
        tasks = [asyncio.create_task(self._relay(paced, site, by_site[site], running, turn)) for site in by_site]
        try:
            await asyncio.gather(*tasks)
        finally:
            await end_tasks(*tasks)
        return Status.dont_reply

    async def _relay(self, paced: Paced, site: str, keys: list[Key], running: set[str], turn: asyncio.Lock) -> None:
        """Pass on the messages of one of the sites; whichever is the last of them says that all have ended."""
        async with aclosing(self._messages(site, keys)) as messages:
            async for message in messages:
                async with turn:
                    if message.get("end"):
                        running.discard(site)
                    await paced.write({**message, "site": site, "end": not running})

    async def _messages(self, site: str, keys: list[Key]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages of one site, up to one with ``end``, also where the site goes away."""
        async with self._slots.setdefault(site, asyncio.Semaphore(STREAMS_PER_SITE)):
            try:
                if (port := self.hub.ports.get(site)) is None:
                    raise CommClosedError("it has left")
                async with aclosing(port.stream_keys(keys, self.hub.secret, checked=False)) as messages:
                    async for message in messages:
                        yield message
            except OSError as exc:
                yield {"error": f"site {site!r} broke off: {exc}", "end": True}
