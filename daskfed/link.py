"""One end of a session between two peers: every item arrives once, in order, whatever happens to the wire.

A :class:`Link` is pure: no sockets, no clock. Its owner carries envelopes between the wire and the link and says what
time it is. The wire may lose, repeat, delay and reorder envelopes (datagrams), or be a stream that breaks and is
dialled again; while both ends live, items sent by one end are delivered by the other exactly once and in the order of
sending.

How it works. Items are numbered from 0. An :class:`Envelope` carries some consecutive items, the number of the first,
and a cumulative acknowledgement: the number of the next item that its sender waits for. A sender keeps items until they
are acknowledged; it sends them again when told that the stream was dialled again (:meth:`Link.reconnected`) or when no
acknowledgement came in time (:meth:`Link.tick`, doubling its patience each time, within narrower bounds while the peer
is heard). A receiver drops what it has seen and holds what came too early. Acknowledgements ride on data; alone they
travel only after ``ack_delay_s`` without data::

    send ──▶ queued ──outgoing──▶ in flight ──acknowledged──▶ gone
                ▲                     │
                └── reconnected, tick ┘

Both ends of a session know it by one name. A peer that started anew comes with another name, and its envelopes raise
:class:`OtherSession`: the owner then decides what the old session's items are worth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

from .errors import DaskfedError

T = TypeVar("T")

ACK_DELAY_S = 0.1
"""How long an acknowledgement waits for data to ride on."""
BATCH_ITEMS = 512
"""Most items in one envelope."""
BATCH_BYTES = 4 * 2**20
"""An envelope takes no further item once its items have this size together."""
WINDOW_ITEMS = 16_384
"""Most items in flight; it bounds what the receiver must hold when the first of them is lost."""
MOST_PATIENCE = 16
"""The time-out doubles until it is this many times ``resend_after_s``, for a peer from whom nothing comes."""
HEARD_PATIENCE = 4
"""The same for a peer who is heard: the wire is not down, it has lost something."""


class OtherSession(DaskfedError):
    """An envelope belongs to another session than the link: one of the peers started anew."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"an envelope of session {got!r} came to session {expected!r}: one of the peers started anew")
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class Envelope:
    """What travels in one piece."""

    session: str  # of both ends
    seq: int  # number of the first item; without items: of the item that its sender would send next
    ack: int  # number of the next item that the sender of this envelope waits for: it has all before
    items: tuple[Any, ...] = ()

    def encode(self, item: Callable[[Any], Any] = lambda item: item) -> dict[str, Any]:
        """Return a plain dict for msgpack; ``item`` turns one item into plain values."""
        return {"session": self.session, "seq": self.seq, "ack": self.ack, "items": [item(each) for each in self.items]}

    @classmethod
    def decode(cls, plain: dict[str, Any], item: Callable[[Any], Any] = lambda item: item) -> Envelope:
        """Return what :meth:`encode` wrote; ``item`` is the inverse of its.

        Raises ValueError where the dict is not an envelope: the peer speaks another protocol.
        """
        try:
            session, seq, ack, items = plain["session"], plain["seq"], plain["ack"], plain["items"]
        except (KeyError, TypeError) as exc:
            raise ValueError(f"not an envelope ({exc!r} is missing): the peer speaks another protocol") from exc
        if not (isinstance(session, str) and isinstance(seq, int) and isinstance(ack, int) and min(seq, ack) >= 0):
            raise ValueError("malformed envelope: session must be a string, seq and ack numbers from 0 on")
        return cls(session, seq, ack, tuple(item(each) for each in items))


class Backlog(NamedTuple):
    """What a link keeps because the peer has not acknowledged it."""

    items: int
    nbytes: int


class Link(Generic[T]):
    """One end of a session; see the module's text.

    ``session``: its name, the same at both ends and never used again.
    ``resend_after_s``: unacknowledged items are sent again after this; the default, never, is right for a stream,
    which loses nothing until it breaks. It should exceed the round trip plus ``ack_delay_s`` of the peer.
    """

    def __init__(
        self,
        session: str,
        *,
        ack_delay_s: float = ACK_DELAY_S,
        resend_after_s: float = inf,
        batch_items: int = BATCH_ITEMS,
        batch_nbytes: int = BATCH_BYTES,
        window_items: int = WINDOW_ITEMS,
    ) -> None:
        self.session = session
        self._ack_delay_s = ack_delay_s
        self._resend_after_s = resend_after_s
        self._batch_items = batch_items
        self._batch_nbytes = batch_nbytes
        self._window_items = window_items
        self._queued: deque[tuple[T, int]] = deque()  # (item, bytes) to put on the wire
        self._in_flight: deque[tuple[T, int]] = deque()  # on the wire, not acknowledged
        self._nbytes = 0  # of both
        self._acked = 0  # number of the oldest item that the peer may lack
        self._sent = 0  # one more than the number of the last item that ever was on the wire
        self._patience = 1
        self._resend_at = inf
        self._early: dict[int, T] = {}  # arrived before an item that precedes it
        self._received = 0  # number of the next item to deliver
        self._ack_at = inf  # when an acknowledgement is owed at the latest

    # -- sending ------------------------------------------------------------------------------------------------

    def send(self, item: T, nbytes: int = 0) -> None:
        """Queue ``item``; ``nbytes`` is what it weighs in :attr:`backlog` and in the size of an envelope."""
        self._queued.append((item, nbytes))
        self._nbytes += nbytes

    def outgoing(self, now: float) -> list[Envelope]:
        """Return what is to be put on the wire at ``now`` (seconds, any monotonic clock)."""
        room = self._window_items - len(self._in_flight)
        envelopes = []
        while self._queued and room > 0:
            envelopes.append(self._next_envelope(room))
            room -= len(envelopes[-1].items)
        if not envelopes and self._ack_at <= now:
            envelopes.append(Envelope(self.session, self._acked + len(self._in_flight), self._received))
        if envelopes:
            self._ack_at = inf
        if self._in_flight and self._resend_at == inf:
            self._resend_at = now + self._patience * self._resend_after_s
        return envelopes

    def tick(self, now: float) -> None:
        """Queue again what was not acknowledged in time; :meth:`outgoing` then returns it."""
        if self._in_flight and now >= self._resend_at:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._queue_again()

    def reconnected(self, now: float, peer_received: int = 0) -> None:
        """The stream broke and was dialled again: everything that the peer may lack goes out again.

        ``peer_received``: the peer's :attr:`received`, where the two told each other while dialling; it spares sending
        again what did arrive. Raises ValueError where it is more than was sent.
        """
        self._drop_acknowledged(peer_received)
        self._patience = 1
        self._queue_again()
        self._ack_at = now

    # -- receiving ----------------------------------------------------------------------------------------------

    def receive(self, envelope: Envelope, now: float) -> list[T]:
        """Take an envelope off the wire and return the items that are to be handled now, in order.

        Raises OtherSession where it is not of this session, and ValueError where it acknowledges what was never sent;
        either leaves the link as it was.
        """
        if envelope.session != self.session:
            raise OtherSession(self.session, envelope.session)
        if self._drop_acknowledged(envelope.ack):
            self._patience = 1
            self._resend_at = now + self._resend_after_s if self._in_flight else inf
        elif self._in_flight:
            self._patience = min(self._patience, HEARD_PATIENCE)
            self._resend_at = min(self._resend_at, now + self._patience * self._resend_after_s)
        if not envelope.items:
            return []
        self._ack_at = min(self._ack_at, now + self._ack_delay_s)
        return self._deliver(envelope)

    @property
    def received(self) -> int:
        """Number of the next item that this end waits for: it has all before."""
        return self._received

    @property
    def accepted(self) -> int:
        """Number of items that this end was given to send so far."""
        return self._acked + len(self._in_flight) + len(self._queued)

    # -- what the owner must know -------------------------------------------------------------------------------

    @property
    def backlog(self) -> Backlog:
        """What is queued or in flight: the owner slows down, or gives the peer up, when it grows too large."""
        return Backlog(len(self._queued) + len(self._in_flight), self._nbytes)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to send, to be acknowledged or to acknowledge."""
        return not self._queued and not self._in_flight and not self._early and self._ack_at == inf

    def wakes_at(self) -> float:
        """Return when :meth:`tick` and :meth:`outgoing` are to be called next; -inf for at once, inf for never."""
        if self._queued and len(self._in_flight) < self._window_items:
            return -inf
        return min(self._ack_at, self._resend_at)

    # -- inside -------------------------------------------------------------------------------------------------

    def _next_envelope(self, room: int) -> Envelope:
        seq = self._acked + len(self._in_flight)
        items: list[T] = []
        nbytes = 0
        while self._queued and len(items) < min(room, self._batch_items) and nbytes < self._batch_nbytes:
            entry = self._queued.popleft()
            self._in_flight.append(entry)
            items.append(entry[0])
            nbytes += entry[1]
        self._sent = max(self._sent, seq + len(items))
        return Envelope(self.session, seq, self._received, tuple(items))

    def _queue_again(self) -> None:
        self._queued.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
        self._resend_at = inf

    def _drop_acknowledged(self, ack: int) -> bool:
        """Forget the items before ``ack``; return whether there were any."""
        if ack > self._sent:
            raise ValueError(f"session {self.session!r}: item {ack - 1} was acknowledged but never sent")
        count = ack - self._acked
        for _ in range(count):
            # Items that wait to be sent *again* may be acknowledged by a late envelope of their first journey.
            _, nbytes = (self._in_flight or self._queued).popleft()
            self._nbytes -= nbytes
        self._acked = max(self._acked, ack)
        return count > 0

    def _deliver(self, envelope: Envelope) -> list[T]:
        delivered = []
        for seq, item in enumerate(envelope.items, envelope.seq):
            if seq == self._received:
                delivered.append(item)
                self._early.pop(seq, None)
                self._received += 1
            elif self._received < seq < self._received + self._window_items:
                self._early[seq] = item
        while self._received in self._early:
            delivered.append(self._early.pop(self._received))
            self._received += 1
        return delivered
