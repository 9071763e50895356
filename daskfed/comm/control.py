"""The ordered, exactly-once stream of messages between a hub and a site, over a Dask comm.

Both ends use the same class: a :class:`daskfed.link.Link` does the bookkeeping, this shell moves its envelopes. What is
sent within a few milliseconds travels together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from typing import Any

from distributed.comm.core import Comm

from daskfed.ending import end_tasks
from daskfed.link import Envelope, Link
from daskfed.messages import Message, decode, encode

INTERVAL_S = 0.002  # messages within this time of several others travel together
SEVERAL = 4
MOST_KEYS = 2**11  # about so many that messages name at a time

Item = tuple[Message, Any]
Deliver = Callable[[Message, Any], None]


class ControlStream:
    """One end of the control stream, which goes on over another comm when one breaks.

    ``comm`` must read opaquely (see :mod:`daskfed.comm.opaque`); ``deliver(message, payload)`` is called on the event
    loop for each message of the peer, in order. ``payload`` is None or whatever opaque structure travelled beside it.
    """

    def __init__(self, comm: Comm, session: str, deliver: Deliver, *, interval_s: float = INTERVAL_S) -> None:
        self.comm = comm
        self.session = session
        self.link: Link[Item] = Link(session)
        self.deliver = deliver
        self.interval_s = interval_s
        self._wake = asyncio.Event()

    def resume(self, comm: Comm, peer_received: int) -> None:
        """Go on over ``comm``; ``peer_received`` is the :attr:`received` of the other end."""
        self.link.reconnected(time.monotonic(), peer_received)
        self.comm = comm

    @property
    def received(self) -> int:
        """How many messages of the other end have arrived."""
        return self.link.received

    def send(self, message: Message, payload: Any = None) -> None:
        """Queue a message, with what travels beside it."""
        self.link.send((message, payload))
        self._wake.set()

    async def serve(self) -> None:
        """Move messages both ways until the comm closes; raises CommClosedError when it did."""
        writer = asyncio.create_task(self._write_forever())
        try:
            while True:
                self._receive(await self.comm.read())
        finally:
            await end_tasks(writer)

    def _receive(self, plain: dict[str, Any]) -> None:
        for each in plain["envelopes"]:
            envelope = Envelope.decode(each, item=_decode_item)
            for message, payload in self.link.receive(envelope, time.monotonic()):
                self.deliver(message, payload)
        self._wake.set()

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until everything sent so far was written or ``timeout_s`` passed."""
        deadline = time.monotonic() + timeout_s
        while not self.link.idle and time.monotonic() < deadline and not self.comm.closed():
            self._wake.set()
            await asyncio.sleep(self.interval_s)

    async def _write_forever(self) -> None:
        while True:
            await self._sleep_until_due()
            envelopes = self.link.outgoing(time.monotonic())
            for envelope in envelopes:
                for piece in at_a_time(envelope):
                    await self.comm.write({"envelopes": [piece.encode(item=_encode_item)]})
            if sum(len(envelope.items) for envelope in envelopes) >= SEVERAL:
                await asyncio.sleep(self.interval_s)

    async def _sleep_until_due(self) -> None:
        left = self.link.wakes_at() - time.monotonic()
        timer = None if left == inf else asyncio.get_running_loop().call_later(max(0.0, left), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._wake.clear()


def at_a_time(envelope: Envelope) -> Iterator[Envelope]:
    """Yield an envelope in pieces: the other end has to hold in memory what comes together."""
    start = keys = 0
    for n, (message, _) in enumerate(envelope.items, 1):
        keys += len(getattr(message, "keys", ()))
        if keys >= MOST_KEYS:
            yield replace(envelope, seq=envelope.seq + start, items=envelope.items[start:n])
            start, keys = n, 0
    if start < len(envelope.items) or not start:
        yield replace(envelope, seq=envelope.seq + start, items=envelope.items[start:])


def _encode_item(item: Item) -> dict[str, Any]:
    message, payload = item
    plain = encode(message)
    if payload is not None:
        plain["payload"] = payload
    return plain


def _decode_item(plain: dict[str, Any]) -> Item:
    values = dict(plain)
    payload = values.pop("payload", None)
    return decode(values), payload
