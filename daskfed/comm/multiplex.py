"""Many connections over one: framing, order, flow control, and what is left to do when the one breaks. Pure.

A :class:`Multiplexer` is one end of a line between two processes; its :class:`Channel` objects are the connections over
that, opened by the end that dialled. What leaves is a list of parts, each a buffer, the first of which begins with this
header::

    kind, flags, channel, number, received      1 + 1 + 4 + 8 + 8 bytes, little-endian

Packets that matter (``OPEN DATA CREDIT CLOSE``) are numbered, and kept until the other end says that it has received
them, which every packet does: after a break both ends tell what they have, and go on from there.

- A message is a list of frames. The first packet of one says how long they are; a small message is one packet, a large
  one is cut into chunks.
- What is small goes first, whichever channel it is of; chunks of large messages take turns. A channel that has much
  under way counts as large, so that it cannot keep others waiting with many small messages.
- What arrives of a large message is copied at once to where it stays: what it came in can be used again, before it is
  cold. Frames of one object lie side by side, others apart, so that each can be let go of by itself.
- Of large messages no more is under way than the line holds (:class:`Window`): nothing queues in buffers that the small
  ones would have to wait behind.
- Each channel has credit for what its reader has not taken yet: a slow reader holds its own channel up and no other.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from math import inf

from daskfed.dask_private import host_array
from daskfed.errors import DaskfedError

Buffer = bytes | memoryview

PROTOCOL = 2
HEADER = struct.Struct("<BBIQQ")
GREETING = struct.Struct("<I16s")  # protocol, session
COUNT = struct.Struct("<I")
JOINED = 2**63  # mark of a length: the frame shares a buffer with the one before
SMALL = 64 * 2**10  # bytes of a message that is sent in one piece, before large ones
INLINE = 4 * 2**10  # bytes that are rather copied than sent as a part of their own
MOST_PARTS = 8  # of a packet; more are joined
SMALLEST_CHUNK, LARGEST_CHUNK = 16 * 2**10, 256 * 2**10  # bytes
CREDIT = 8 * 2**20  # bytes a channel may have sent that its reader has not taken
UNDER_WAY = 256 * 2**10  # bytes of small messages of one channel that count as small
ACK_BYTES = 32 * 2**10  # received without a word about it; the smallest window is larger
MAX_FRAMES = 2**20
MOST_MESSAGES = 2**16  # that arrived on a channel and nobody took
MAX_CHANNELS = 2**16  # at a time
MAX_PACKET = LARGEST_CHUNK + 2**20  # bytes of a part; the lengths of many frames take room as well


class Kind(IntEnum):
    """What a packet is."""

    HELLO = 1  # of the end that dialled: which session it begins or goes on with
    WELCOME = 2  # the answer
    REFUSED = 3  # or this, with the reason
    OPEN = 4
    DATA = 5
    CREDIT = 6
    CLOSE = 7
    ACK = 8
    PING = 9  # to be answered with an ACK
    BYE = 10  # the line ends, and with it all channels


FIRST, LAST, BULK = 1, 2, 4  # flags of DATA
RESUMED = 1  # flag of WELCOME: the session is known
NUMBERED = frozenset((Kind.OPEN, Kind.DATA, Kind.CREDIT, Kind.CLOSE))


class ProtocolError(DaskfedError):
    """The other end sent what it never should: the line ends."""


@dataclass(slots=True, eq=False)
class Packet:
    """Something to be sent, and sent again if need be."""

    kind: Kind
    channel: int = 0
    flags: int = 0
    body: bytes = b""  # goes right behind the header
    parts: Sequence[Buffer] = ()  # each as a message part of its own
    nbytes: int = 0  # of content
    number: int = 0
    sent_at: float = 0.0

    def encode(self, received: int) -> list[Buffer]:
        """Return the parts to send."""
        header = HEADER.pack(self.kind, self.flags, self.channel, self.number, received)
        return [header + self.body, *self.parts]


class Window:
    """How many bytes of large messages may be under way: as many as make use of the line, and hardly queue.

    It grows while what is sent arrives as fast as it can, and shrinks when it takes longer: less than half of the
    round trip may be spent in queues. (The idea is that of LEDBAT, RFC 6817: delay is the signal, not loss.)
    """

    START, LEAST, MOST = 512 * 2**10, 64 * 2**10, 64 * 2**20  # bytes
    FORGET_S = 20.0  # a line may become slower for good
    SLACK_S = 0.01  # a line without delay would else wait for its ends

    def __init__(self) -> None:
        self.nbytes = float(self.START)
        self._starting = True
        self._fastest = [inf, inf]  # seconds to the answer: in this stretch of time, and in the one before
        self._since = 0.0
        self._shrunk = 0.0

    @property
    def fastest_s(self) -> float:
        """The shortest time in which an answer came, of late."""
        return min(self._fastest)

    @property
    def chunk(self) -> int:
        """Bytes of a chunk: several are under way at a time."""
        return int(min(LARGEST_CHUNK, max(SMALLEST_CHUNK, self.nbytes // 4)))

    def answered(self, nbytes: int, seconds: float, now: float, full: bool) -> None:
        """What was sent was received, ``seconds`` later; ``full`` says whether more could not have been under way."""
        if now - self._since > self.FORGET_S:
            self._fastest, self._since = [inf, self._fastest[0]], now
        self._fastest[0] = min(self._fastest[0], seconds)
        if seconds > 1.4 * self.fastest_s + self.SLACK_S:
            if now - self._shrunk > seconds:  # once for what was under way together
                self.nbytes, self._shrunk, self._starting = max(self.LEAST, 0.8 * self.nbytes), now, False
        elif full:
            growth = nbytes if self._starting else nbytes * LARGEST_CHUNK / self.nbytes
            self.nbytes = min(self.MOST, self.nbytes + growth)


class Outgoing:
    """A large message, of which chunks leave as there is room."""

    def __init__(self, frames: Sequence[Buffer]) -> None:
        self._body = _marked_lengths(frames)
        self._flags = FIRST | BULK
        self._rest = deque(view for frame in frames if (view := memoryview(frame).cast("B")).nbytes)

    def chunk(self, channel: int, size: int) -> Packet:
        """Return the next packet, with at most ``size`` bytes of content."""
        parts: list[Buffer] = []
        room = size
        while self._rest and room:
            view = self._rest.popleft()
            if view.nbytes > room:
                self._rest.appendleft(view[room:])
                view = view[:room]
            room -= view.nbytes
            parts.append(view)
        if len(parts) > MOST_PARTS:
            parts = [b"".join(parts)]
        flags = self._flags if self._rest else self._flags | LAST
        packet = Packet(Kind.DATA, channel, flags, self._body, parts, size - room)
        self._flags, self._body = BULK, b""
        return packet


class _Incoming:
    """A message that arrives in pieces. Each is copied to where it stays, so that what it came in is free at once."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = [length & ~JOINED for length in lengths]
        self.nbytes = self.missing = sum(self.lengths)
        self.unpaid = 0  # bytes that no credit was given for yet
        self._buffers = _shared(lengths)
        self._frames: list[Buffer] = []
        self._room = memoryview(b"")  # what is not filled yet of the last frames

    def add(self, body: memoryview, parts: Sequence[Buffer]) -> int:
        """Take in content; returns how many bytes it is. Raises MemoryError where there is no room for a frame."""
        pieces = [view for part in (body, *parts) if (view := memoryview(part)).nbytes]
        nbytes = sum(piece.nbytes for piece in pieces)
        if nbytes > self.missing:
            raise ProtocolError("a message is longer than it said")
        if len(pieces) == 1 and nbytes == self.nbytes <= SMALL:
            self._frames = _slices(pieces[0], self.lengths)
        else:
            for piece in pieces:
                self._fill(piece)
        self.missing -= nbytes
        return nbytes

    def frames(self) -> list[Buffer]:
        """Return the whole message."""
        if self.missing:
            raise ProtocolError(f"a message ended {self.missing} bytes early")
        while len(self._frames) < len(self.lengths):  # only those without content
            self._make_room()
        return self._frames

    def _fill(self, piece: memoryview) -> None:
        while piece.nbytes:
            if not self._room.nbytes:
                self._make_room()
            nbytes = min(piece.nbytes, self._room.nbytes)
            self._room[:nbytes] = piece[:nbytes]
            piece, self._room = piece[nbytes:], self._room[nbytes:]

    def _make_room(self) -> None:
        lengths = next(self._buffers)
        try:
            self._room = memoryview(host_array(sum(lengths))).cast("B")  # may be written to, as over tcp
        except ValueError as exc:  # numpy's word for what no machine has
            raise MemoryError(str(exc)) from exc
        self._frames += _slices(self._room, lengths)


class Channel:
    """One connection over a line."""

    def __init__(self, multiplexer: Multiplexer, name: int) -> None:
        self.multiplexer = multiplexer
        self.name = name
        self.max_bytes = inf  # of a message that arrives
        self.closed = False  # nothing can be sent any more
        self.closed_here = False  # by this end, which takes nothing any more
        self.ended = ""  # why nothing more will arrive
        self.messages: deque[tuple[list[Buffer], int]] = deque()  # that nobody took, and bytes to give credit for
        self.arrived: Callable[[], None] = _nothing  # called when there is a message, or the end
        self.left: Callable[[], None] = _nothing  # called when nothing waits to be sent any more
        self._waiting: deque[Outgoing | Packet] = deque()
        self._credit = CREDIT
        self._under_way = 0
        self._coming: _Incoming | None = None
        self._owed = 0  # credit that the other end is to be told of
        self._unpaid = 0  # bytes that arrived and that no credit was given for yet

    # -- what this end does ------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._waiting)

    def send(self, frames: Sequence[Buffer], nbytes: int) -> None:
        """Queue a message of ``nbytes`` in all; :attr:`waits` tells whether a part of it has to wait."""
        if nbytes <= SMALL and not self._waiting and self._credit > 0 and self._under_way < UNDER_WAY:
            lengths, parts = _lengths(frames), [b"".join(frames)]
            if nbytes <= INLINE:
                lengths, parts = lengths + parts[0], []
            self._spend(nbytes)
            self.multiplexer.urgent.append(Packet(Kind.DATA, self.name, FIRST | LAST, lengths, parts, nbytes))
        else:
            self._wait(Outgoing(frames))

    def close(self, at_once: bool = False) -> None:
        """Say that no more comes: after all that waits, or ``at_once`` instead of it."""
        self.closed_here = True
        if self.closed and not (at_once and self._waiting):
            return
        self.closed = True
        if at_once:
            self._waiting.clear()
        packet = Packet(Kind.CLOSE, self.name)
        if self._waiting:
            self._wait(packet)
        else:
            self.multiplexer.urgent.append(packet)
        self.end("it was closed here")

    def take(self) -> list[Buffer]:
        """Return the next message that arrived; raises IndexError where there is none."""
        frames, unpaid = self.messages.popleft()
        if not self.messages and self._coming is not None:  # that one is waited for now
            unpaid, self._coming.unpaid = unpaid + self._coming.unpaid, 0
        self._give_credit(unpaid)
        return frames

    # -- what the other end does -------------------------------------------------------------------------------------

    def data(self, flags: int, body: memoryview, parts: Sequence[Buffer]) -> None:
        """Take in a packet of a message."""
        if self.ended:
            if self.closed_here and self._waiting:  # the other end may have to send all before it takes ours
                self._give_credit(body.nbytes + sum(map(len, parts)))
            return
        if flags & FIRST:
            if self._coming is not None:
                raise ProtocolError("a message began within another")
            lengths, body = _read_lengths(body)
            self._coming = _Incoming(lengths)
            if self._coming.nbytes > self.max_bytes:
                self.refuse(f"a message of {self._coming.nbytes} bytes came, the limit is {self.max_bytes:g}")
                return
        if (coming := self._coming) is None:
            raise ProtocolError("a message has no beginning")
        try:
            nbytes = coming.add(body, parts)
        except MemoryError:
            self.refuse(f"a message of {coming.nbytes} bytes came, for which there is no memory")
            return
        coming.unpaid += nbytes
        self._unpaid += nbytes
        if self._unpaid > 2 * CREDIT or len(self.messages) > MOST_MESSAGES:
            raise ProtocolError("more was sent than there was credit for")
        if not self.messages:  # it is what the reader waits for
            self._give_credit(coming.unpaid)
            coming.unpaid = 0
        if flags & LAST:
            self._coming = None
            self.messages.append((coming.frames(), coming.unpaid))
            self.arrived()

    def refuse(self, reason: str) -> None:
        """Close at once, since the other end does what it must not."""
        self.multiplexer.urgent.append(Packet(Kind.CLOSE, self.name))
        self.cut(reason)

    def cut(self, reason: str) -> None:
        """Nothing is sent or taken any more, of what waits either."""
        self.closed = True
        self._waiting.clear()
        self.end(reason)

    def end(self, reason: str) -> None:
        """Nothing more will arrive, and nothing can be sent, but for what waits where this end closed it."""
        if not self.ended:
            self.ended = reason
            self._coming = None
        if not self.closed or not self.multiplexer.alive:
            self.closed = True
            self._waiting.clear()
        if not self._waiting:
            self.multiplexer.forget(self)
        self.arrived()
        if not self._waiting:
            self.left()

    def received(self, nbytes: int) -> None:
        """The other end has got so much of it."""
        self._under_way -= nbytes

    def credited(self, nbytes: int) -> None:
        """The reader at the other end has taken so much of it."""
        was_stuck = self._credit <= 0
        self._credit += nbytes
        if self._credit > CREDIT:
            raise ProtocolError("more credit was given than there is")
        if was_stuck and self._credit > 0 and self._waiting:
            self.multiplexer.bulk.append(self)

    # -- for the multiplexer -----------------------------------------------------------------------------------------

    def next_packet(self, chunk: int) -> Packet:
        """Return the next packet of what waits."""
        what = self._waiting[0]
        if isinstance(what, Packet):
            packet = what
        else:
            packet = what.chunk(self.name, chunk)
            self._spend(packet.nbytes)
        if packet.kind is Kind.CLOSE or packet.flags & LAST:
            self._waiting.popleft()
        if not self._waiting:
            self.left()
            if self.ended:
                self.multiplexer.forget(self)
        return packet

    @property
    def stuck(self) -> bool:
        """Whether the reader at the other end has to take something before more is sent."""
        return self._credit <= 0 and not isinstance(self._waiting[0], Packet)

    def _wait(self, what: Outgoing | Packet) -> None:
        self._waiting.append(what)
        if len(self._waiting) == 1 and not self.stuck:
            self.multiplexer.bulk.append(self)

    def _spend(self, nbytes: int) -> None:
        self._credit -= nbytes
        self._under_way += nbytes

    def _give_credit(self, nbytes: int) -> None:
        self._owed += nbytes
        self._unpaid -= nbytes
        if self._owed >= CREDIT // 4 and (not self.ended or self._waiting):
            self.multiplexer.urgent.append(Packet(Kind.CREDIT, self.name, body=COUNT.pack(self._owed)))
            self._owed = 0


class Multiplexer:
    """One end of what joins two processes.

    ``dialled`` says whether this end opens channels; ``opened`` is called with each channel that the other end opens.
    What is to be sent comes from :meth:`outgoing`, what arrives goes into :meth:`incoming`.
    """

    def __init__(self, session: bytes, *, dialled: bool, opened: Callable[[Channel], None] | None = None) -> None:
        self.session = session
        self.dialled = dialled
        self.opened = opened or _nothing
        self.alive = True
        self.connected = False
        self.channels: dict[int, Channel] = {}
        self.urgent: deque[Packet] = deque()
        self.bulk: deque[Channel] = deque()  # whose turn it is next to send a chunk
        self.window = Window()
        self.heard_at = 0.0
        self.received = 0  # number of the last packet that arrived
        self.unacknowledged = 0  # bytes that arrived since the other end was told
        self._told = 0  # how many packets arrived, as the other end knows
        self._last = 0  # number of the last packet that was sent
        self._last_channel = 0
        self._kept: deque[Packet] = deque()  # sent, and perhaps not received
        self._again: deque[Packet] = deque()  # of these, what is to be sent once more
        self._under_way = 0  # bytes of large messages
        self._acknowledge = False  # at once

    # -- channels ----------------------------------------------------------------------------------------------------

    def open(self) -> Channel:
        """Open a channel."""
        self._last_channel += 1
        channel = self.channels[self._last_channel] = Channel(self, self._last_channel)
        self.urgent.append(Packet(Kind.OPEN, channel.name))
        return channel

    def forget(self, channel: Channel) -> None:
        """A channel is of the past."""
        self.channels.pop(channel.name, None)

    # -- sending -----------------------------------------------------------------------------------------------------

    def outgoing(self, now: float) -> list[Buffer] | None:
        """Return the parts of the next packet to send; None where there is nothing to send now."""
        if not self.connected:
            return None
        packet = self._next()
        if packet is None:
            return self._acknowledgement()
        packet.sent_at = now
        return self._encoded(packet)

    def _next(self) -> Packet | None:
        if self._again:
            return self._again.popleft()
        if self.urgent:
            return self._numbered(self.urgent.popleft())
        while self.bulk and self._under_way < self.window.nbytes:
            channel = self.bulk.popleft()
            if not channel.waits or channel.stuck:
                continue
            packet = channel.next_packet(self.window.chunk)
            if channel.waits and not channel.stuck:
                self.bulk.append(channel)
            self._under_way += packet.nbytes
            return self._numbered(packet)
        return None

    def _numbered(self, packet: Packet) -> Packet:
        if packet.kind in NUMBERED:
            self._last += 1
            packet.number = self._last
            self._kept.append(packet)
        return packet

    def _acknowledgement(self) -> list[Buffer] | None:
        if not self._acknowledge and self.unacknowledged < ACK_BYTES:
            return None
        return self.tell(Kind.ACK)

    def tell(self, kind: Kind, flags: int = 0, body: bytes = b"") -> list[Buffer]:
        """Return a packet that has no number: it is sent at once, and not again."""
        return self._encoded(Packet(kind, 0, flags, body))

    def _encoded(self, packet: Packet) -> list[Buffer]:
        self.unacknowledged, self._acknowledge, self._told = 0, False, self.received
        return packet.encode(self.received)

    @property
    def owes_answer(self) -> bool:
        """Whether something arrived that the other end does not know of yet."""
        return self._told != self.received

    # -- receiving ---------------------------------------------------------------------------------------------------

    def incoming(self, parts: Sequence[Buffer], now: float) -> None:
        """Take in a packet; raises ProtocolError where it is none, or none that could come now."""
        head = memoryview(parts[0])
        kind, flags, name, number, received = read_header(head)
        self.heard_at = now
        self._acknowledged(received, now)
        if kind in NUMBERED:
            if number != self.received + 1:  # sent twice, or before what was lost
                return
            self.received = number
            self._take(kind, flags, name, head[HEADER.size :], parts[1:])
        elif kind == Kind.PING:
            self._acknowledge = True
        elif kind == Kind.BYE:
            self.end("the other end has ended")

    def _take(self, kind: int, flags: int, name: int, body: memoryview, parts: Sequence[Buffer]) -> None:
        if kind == Kind.OPEN:
            self._open(name)
            return
        channel = self.channels.get(name)
        if kind == Kind.DATA:
            self.unacknowledged += body.nbytes + sum(map(len, parts))
            if flags & LAST and flags & BULK:
                self._acknowledge = True
            if channel is not None:
                channel.data(flags, body, parts)
        elif channel is not None and kind == Kind.CREDIT:
            channel.credited(_count(body))
        elif channel is not None:
            channel.cut("the other end has closed it")

    def _open(self, name: int) -> None:
        if self.dialled or name <= self._last_channel or len(self.channels) >= MAX_CHANNELS:
            raise ProtocolError(f"a channel {name} cannot be opened")
        self._last_channel = name
        channel = self.channels[name] = Channel(self, name)
        self.opened(channel)

    def _acknowledged(self, received: int, now: float) -> None:
        kept = self._kept
        if not kept or received < kept[0].number:
            return
        if received > self._last:
            raise ProtocolError("something was received that was never sent")
        full = self._under_way + self.window.chunk >= self.window.nbytes
        nbytes = 0
        while kept and kept[0].number <= received:
            packet = kept.popleft()
            if not packet.nbytes:
                continue
            if (channel := self.channels.get(packet.channel)) is not None:
                channel.received(packet.nbytes)
            if packet.flags & BULK:
                self._under_way -= packet.nbytes
                nbytes += packet.nbytes
                last = packet
        if nbytes:
            self.window.answered(nbytes, now - last.sent_at, now, full)

    # -- the line breaks ---------------------------------------------------------------------------------------------

    def broke(self) -> None:
        """The line is down: nothing is sent until :meth:`goes_on`."""
        self.connected = False

    def goes_on(self, received: int, now: float) -> None:
        """There is a line; the other end has ``received`` so many packets. What it has not is sent again."""
        self.connected, self.heard_at = True, now
        self._acknowledged(received, now)
        self._again = deque(self._kept)

    def end(self, reason: str) -> None:
        """The line is of the past, and all channels with it."""
        if not self.alive:
            return
        self.alive = self.connected = False
        for channel in list(self.channels.values()):
            channel.end(reason)
        for queue in (self.urgent, self.bulk, self._kept, self._again):
            queue.clear()


def read_header(head: memoryview) -> tuple[int, int, int, int, int]:
    """Return kind, flags, channel, number and what was received; raises ProtocolError where there is no header."""
    if head.nbytes < HEADER.size:
        raise ProtocolError("a packet without a header")
    return HEADER.unpack_from(head)


def _lengths(frames: Sequence[Buffer]) -> bytes:
    return _packed([memoryview(frame).nbytes for frame in frames])


def _marked_lengths(frames: Sequence[Buffer]) -> bytes:
    """Return the lengths, and mark which frames are of one object with the one before.

    Dask splits what is large. Whoever puts it together again need not copy it where it lies side by side.
    """
    lengths: list[int] = []
    before: object = None
    for frame in frames:
        of = frame.obj if isinstance(frame, memoryview) else None
        lengths.append(memoryview(frame).nbytes | (JOINED if of is not None and of is before else 0))
        before = of
    return _packed(lengths)


def _packed(lengths: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(lengths)}Q", len(lengths), *lengths)


def _shared(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield lengths of frames that share a buffer: marked ones, and small ones up to a size.

    All others get a buffer of their own, so that each can be let go of without the others.
    """
    together: list[int] = []
    total = 0
    for length in lengths:
        nbytes = length & ~JOINED
        if together and not (length & JOINED or total + nbytes <= SMALL):
            yield together
            together, total = [], 0
        together.append(nbytes)
        total += nbytes
    yield together


def _slices(buffer: memoryview, lengths: Sequence[int]) -> list[Buffer]:
    ends = list(accumulate(lengths))
    return [buffer[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _read_lengths(body: memoryview) -> tuple[tuple[int, ...], memoryview]:
    count = _count(body)
    end = COUNT.size + 8 * count
    if count > MAX_FRAMES or end > body.nbytes:
        raise ProtocolError(f"a message of {count} frames is announced in {body.nbytes} bytes")
    return struct.unpack_from(f"<{count}Q", body, COUNT.size), body[end:]


def _count(body: memoryview) -> int:
    if body.nbytes < COUNT.size:
        raise ProtocolError("a number is missing")
    return int(COUNT.unpack_from(body)[0])


def _nothing(*args: object) -> None:
    """Do nothing."""
