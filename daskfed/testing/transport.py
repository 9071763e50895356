"""An in-memory twin of the connection between two peers, with the weather of real networks.

A :class:`Wire` carries bytes one way and loses, repeats, delays and reorders them as its :class:`Weather` says, all
from one random source. A :class:`Peer` is one end of a session: the real :class:`daskfed.link.Link` and the real codec
over two wires. :func:`connect` builds both ends::

    core ──▶ Peer.send ─▶ Link ─▶ msgpack ─▶ Wire ─▶ msgpack ─▶ Link ─▶ handle ──▶ core
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any, TypeAlias

import msgpack

from daskfed.link import ACK_DELAY_S, Envelope, Link
from daskfed.messages import Message, decode, encode
from daskfed.testing.clock import VirtualClock

AnyLink: TypeAlias = Link[tuple[Message, Any]]
Handler: TypeAlias = Callable[[Message, Any], None]
"""Takes a message and what travelled beside it."""


@dataclass(slots=True)
class Weather:
    """How a wire behaves; probabilities are per envelope."""

    delay_s: tuple[float, float] = (0.001, 0.01)  # shortest and longest
    loss: float = 0.0
    duplicate: float = 0.0
    ordered: bool = True  # a stream; otherwise each envelope takes its own time


class Wire:
    """Carries bytes one way."""

    def __init__(self, clock: VirtualClock, rng: Random, weather: Weather) -> None:
        self.weather = weather
        self.broken = False  # a partition: what is sent, and what is under way, is lost
        self.deliver: Callable[[bytes], None] = lambda data: None
        self.in_flight = 0
        self.lost = self.repeated = 0  # envelopes so far
        self._clock = clock
        self._rng = rng
        self._last_arrival = 0.0
        self._cuts = 0  # times that it was broken: what was sent before the last cut never arrives

    def cut(self) -> None:
        """Break the wire: everything under way is lost, and all that is sent before :meth:`mend`."""
        self.broken = True
        self._cuts += 1
        self.in_flight = 0

    def mend(self) -> None:
        """End the partition."""
        self.broken = False

    def send(self, data: bytes) -> None:
        """Put ``data`` on the wire."""
        if self.broken or self._rng.random() < self.weather.loss:
            self.lost += 1
            return
        self._carry(data)
        if self.weather.duplicate and self._rng.random() < self.weather.duplicate:
            self.repeated += 1
            self._carry(data)

    def _carry(self, data: bytes) -> None:
        shortest, longest = self.weather.delay_s
        arrival = self._clock.now + shortest + (longest - shortest) * self._rng.random()
        if self.weather.ordered:
            arrival = self._last_arrival = max(arrival, self._last_arrival)
        self.in_flight += 1
        self._clock.call_at(arrival, self._arrive, data, self._cuts)

    def _arrive(self, data: bytes, cuts: int) -> None:
        if cuts == self._cuts:
            self.in_flight -= 1
            self.deliver(data)


class Peer:
    """One end of a session: queues messages, keeps its link's time, and hands over what arrives."""

    def __init__(self, clock: VirtualClock, link: AnyLink, wire: Wire, handle: Handler) -> None:
        self.link = link
        self.wire = wire
        self.closed = False
        self.handled = 0  # messages of the other end
        self._clock = clock
        self._handle = handle
        self._wakes_at = inf

    def send(self, message: Message, beside: Any = None) -> None:
        """Queue ``message`` with plain data ``beside`` it; :meth:`pump` puts it on the wire."""
        self.link.send((message, beside))

    def pump(self) -> None:
        """Put on the wire what is due, and plan the next time."""
        if self.closed:
            return
        now = self._clock.now
        self.link.tick(now)
        for envelope in self.link.outgoing(now):
            self.wire.send(msgpack.packb(envelope.encode(_encode_item)))
        self._plan(self.link.wakes_at())

    def arrived(self, data: bytes) -> None:
        """Take bytes off the wire and handle what they bring."""
        if self.closed:
            return
        envelope = Envelope.decode(msgpack.unpackb(data, use_list=False, strict_map_key=False), _decode_item)
        for message, beside in self.link.receive(envelope, self._clock.now):
            self.handled += 1
            self._handle(message, beside)
        self.pump()

    def redialled(self, peer_received: int) -> None:
        """The stream is up again and the other end told what it had received."""
        self.link.reconnected(self._clock.now, peer_received)
        self.pump()

    def close(self) -> None:
        """Stop for good: a crash, or the end of the session."""
        self.closed = True

    def _plan(self, when: float) -> None:
        if when < self._wakes_at:
            self._wakes_at = when
            self._clock.call_at(when, self._wake, when)

    def _wake(self, planned_for: float) -> None:
        if planned_for == self._wakes_at:
            self._wakes_at = inf
            self.pump()


@dataclass(slots=True)
class Connection:
    """Both ends of a session and the wires between them."""

    ends: tuple[Peer, Peer]
    wires: tuple[Wire, Wire]  # wires[i] carries what ends[i] sends

    def cut(self) -> None:
        """Start a partition."""
        for wire in self.wires:
            wire.cut()

    def mend(self) -> None:
        """End a partition: a stream is dialled again, datagrams simply pass again."""
        for wire in self.wires:
            wire.mend()
        if self.wires[0].weather.ordered:
            received = [end.link.received for end in self.ends]
            self.ends[0].redialled(received[1])
            self.ends[1].redialled(received[0])

    def close(self) -> None:
        """End the session without a word."""
        for end in self.ends:
            end.close()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or owed in either direction."""
        return all(end.link.idle for end in self.ends) and not any(wire.in_flight for wire in self.wires)


def connect(
    clock: VirtualClock,
    rng: Random,
    weather: Weather,
    session: str,
    handle: tuple[Handler, Handler],
    link: Callable[..., AnyLink] = Link,
) -> Connection:
    """Return a session between two peers; ``handle[i]`` gets what arrives at ``ends[i]``, ``link`` makes the links."""
    resend_after_s = inf if weather.ordered and not weather.loss else 4 * weather.delay_s[1] + ACK_DELAY_S
    wires = (Wire(clock, rng, weather), Wire(clock, rng, weather))
    links = [link(session, ack_delay_s=ACK_DELAY_S, resend_after_s=resend_after_s) for _ in wires]
    ends = (Peer(clock, links[0], wires[0], handle[0]), Peer(clock, links[1], wires[1], handle[1]))
    wires[0].deliver, wires[1].deliver = ends[1].arrived, ends[0].arrived
    return Connection(ends, wires)


def _encode_item(item: tuple[Message, Any]) -> dict[str, Any]:
    return {"message": encode(item[0]), "beside": item[1]}


def _decode_item(plain: dict[str, Any]) -> tuple[Message, Any]:
    return decode(plain["message"]), plain["beside"]
