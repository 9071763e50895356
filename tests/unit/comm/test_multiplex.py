"""Links between two ends: nothing is lost, doubled or mixed up, whatever the line does; small goes before large."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskfed.comm import multiplex as mux
from daskfed.comm.multiplex import Channel, Kind, Multiplexer, ProtocolError, Window
from daskfed.dask_private import merge_memoryviews


class Pair:
    """Two ends and a line between them, which can break."""

    def __init__(self) -> None:
        self.now = 0.0
        self.opened: list[Channel] = []
        self.ends = (
            Multiplexer(b"s" * 16, dialled=True),
            Multiplexer(b"s" * 16, dialled=False, opened=self.opened.append),
        )
        self.lines: tuple[deque[list[bytes]], deque[list[bytes]]] = deque(), deque()
        for end in self.ends:
            end.goes_on(0, 0.0)

    def open(self) -> tuple[Channel, Channel]:
        """Open a channel; returns both ends of it."""
        channel = self.ends[0].open()
        self.settle()
        return channel, self.opened[-1]

    def send(self, which: int, most: int = 10**9) -> None:
        """Put what an end has to send on the line."""
        for _ in range(most):
            if (parts := self.ends[which].outgoing(self.now)) is None:
                return
            self.lines[which].append([bytes(part) for part in parts])

    def arrive(self, which: int, most: int = 10**9) -> None:
        """Have what an end has sent arrive at the other one."""
        for _ in range(min(most, len(self.lines[which]))):
            self.ends[1 - which].incoming(self.lines[which].popleft(), self.now)

    def settle(self) -> None:
        """Let everything arrive."""
        while True:
            for which in (0, 1):
                self.send(which)
            self.now += 0.001
            if not any(self.lines):
                return
            for which in (0, 1):
                self.arrive(which)

    def break_and_go_on(self) -> None:
        """Lose what is on the line."""
        for end, line in zip(self.ends, self.lines, strict=True):
            end.broke()
            line.clear()
        first, second = self.ends
        had = second.received
        second.goes_on(first.received, self.now)
        first.goes_on(had, self.now)


def taken(channel: Channel) -> list[bytes]:
    """Return all messages that arrived, each as one."""
    found = []
    while channel.messages:
        found.append(b"|".join(bytes(frame) for frame in channel.take()))
    return found


def put(channel: Channel, *frames: mux.Buffer) -> None:
    """Send a message."""
    channel.send(frames, sum(map(len, frames)))


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_every_message_arrives_once_and_in_order_over_a_line_that_breaks(seed: int, channels: int) -> None:
    dice, pair = random.Random(seed), Pair()
    both = [pair.open() for _ in range(channels)]
    sent: dict[Channel, list[bytes]] = {end: [] for ends in both for end in ends}
    got: dict[Channel, list[bytes]] = {end: [] for end in sent}
    other = {end: ends[1 - n] for ends in both for n, end in enumerate(ends)}
    for _ in range(dice.randint(5, 60)):
        what = dice.randrange(6)
        end = dice.choice(list(sent))
        if what <= 1:
            size = dice.choice([0, 1, 100, 5000, mux.SMALL, mux.SMALL + 1, 700_000])
            frames = [dice.randbytes(dice.randrange(size + 1)) for _ in range(dice.randint(1, 3))]
            middle = dice.randrange(len(frames[0]) + 1)
            put(end, memoryview(frames[0])[:middle], memoryview(frames[0])[middle:], *frames[1:])
            frames[:1] = [frames[0][:middle], frames[0][middle:]]
            sent[end].append(b"|".join(frames))
        elif what == 2:
            pair.send(dice.randrange(2), dice.randint(1, 5))
        elif what == 3:
            pair.arrive(dice.randrange(2), dice.randint(1, 5))
        elif what == 4:
            got[end] += taken(end)
        else:
            pair.break_and_go_on()
    for _ in range(50):
        pair.settle()
        for end in sent:
            got[end] += taken(end)
    assert {end: got[other[end]] for end in sent} == sent
    for this, that in zip(pair.ends, pair.ends[::-1], strict=True):
        that.incoming(this.tell(Kind.ACK), pair.now)
    assert not any(end._kept or end._under_way for end in pair.ends)


def test_small_messages_go_before_large_ones_of_other_channels() -> None:
    pair = Pair()
    (large, _), (small, there) = pair.open(), pair.open()
    put(large, b"x" * 10**7)
    pair.send(0)
    put(small, b"now")
    pair.send(0)
    assert pair.lines[0][-1][0].endswith(b"now")
    pair.arrive(0)
    assert taken(there) == [b"now"]


def test_large_messages_take_turns() -> None:
    pair = Pair()
    first, second = pair.open(), pair.open()
    for channel, _ in (first, second):
        put(channel, b"x" * 10**6)
    pair.send(0)
    names = [mux.read_header(memoryview(parts[0]))[2] for parts in pair.lines[0]]
    assert names[:4] == [1, 2, 1, 2]


def test_of_large_messages_no_more_is_under_way_than_the_window_allows() -> None:
    pair = Pair()
    channel, _ = pair.open()
    put(channel, b"x" * 10**7)
    pair.send(0)
    under_way = sum(len(part) for parts in pair.lines[0] for part in parts[1:])
    assert Window.START <= under_way < Window.START + mux.LARGEST_CHUNK


def test_a_slow_reader_holds_up_its_own_channel_only() -> None:
    pair = Pair()
    (slow, unread), (other, there) = pair.open(), pair.open()
    for _ in range(30):
        put(slow, b"x" * 2**20)
    for _ in range(20):
        pair.settle()
    held = sum(len(frame) for frames, _ in unread.messages for frame in frames)
    assert slow.waits and held <= 3 * mux.CREDIT
    put(other, b"y" * 2**20)
    pair.settle()
    assert len(taken(there)[0]) == 2**20
    total = 0
    for _ in range(100):
        total += len(taken(unread))
        pair.settle()
    assert total == 30 and not slow.waits


def test_one_message_of_any_size_passes_though_nobody_reads_yet() -> None:
    pair = Pair()
    channel, there = pair.open()
    put(channel, b"x" * 3 * mux.CREDIT)
    for _ in range(50):
        pair.settle()
    assert not channel.waits and len(taken(there)[0]) == 3 * mux.CREDIT


def test_what_was_sent_before_it_closed_arrives() -> None:
    pair = Pair()
    channel, there = pair.open()
    put(channel, b"x" * 10**6)
    channel.close()
    assert channel.closed and channel.waits
    for _ in range(20):
        pair.settle()
    assert (
        len(taken(there)[0]) == 10**6
        and there.ended
        and not there.multiplexer.channels
        and not channel.multiplexer.channels
    )


def test_credit_holds_for_many_messages_together() -> None:
    pair = Pair()
    _, there = pair.open()
    end = pair.ends[1]
    body = b"\x01\x00\x00\x00" + (60_000).to_bytes(8, "little") + b"x" * 60_000
    with pytest.raises(ProtocolError, match="credit"):
        for _ in range(1000):
            head = mux.HEADER.pack(Kind.DATA, mux.FIRST | mux.LAST, there.name, end.received + 1, 0)
            end.incoming([head + body], 0.0)


def test_two_ends_that_close_with_much_to_say_both_end() -> None:
    pair = Pair()
    both = pair.open()
    for channel in both:
        for _ in range(30):
            put(channel, b"x" * 2**20)
        channel.close()
    for _ in range(200):
        pair.settle()
    assert not any(channel.waits for channel in both)


def test_closing_at_once_ends_a_close_that_waits() -> None:
    pair = Pair()
    channel, there = pair.open()
    for _ in range(30):
        put(channel, b"x" * 2**20)
    pair.settle()
    channel.close()
    assert channel.waits
    channel.close(at_once=True)
    pair.settle()
    assert not channel.waits and there.ended and not pair.ends[0].channels


def test_a_message_that_is_too_large_closes_the_channel() -> None:
    pair = Pair()
    channel, there = pair.open()
    there.max_bytes = 1000
    put(channel, b"x" * 1001)
    pair.settle()
    assert "the limit is 1000" in there.ended and channel.closed


def test_a_message_for_which_there_is_no_memory_closes_the_channel() -> None:
    pair = Pair()
    channel, there = pair.open()
    put(channel, b"x" * 10**6)
    pair.send(0, 1)
    first = pair.lines[0][0]
    first[0] = first[0][:-8] + (2**62).to_bytes(8, "little")
    pair.settle()
    assert f"{2**62} bytes came, for which there is no memory" in there.ended and channel.closed


def test_parts_of_one_object_lie_side_by_side_and_other_large_frames_apart() -> None:
    pair = Pair()
    channel, there = pair.open()
    split, other = memoryview(bytearray(range(200)) * 2000), memoryview(bytearray(b"y" * 100_000))
    frames = [b"head", split[:300_000], split[300_000:], b"small", b"", other]
    channel.send(frames, sum(map(len, frames)))
    pair.settle()
    arrived = [memoryview(frame) for frame in there.take()]
    assert arrived == frames and not any(frame.readonly for frame in arrived)
    assert merge_memoryviews(arrived[1:3]) == split
    assert arrived[2].obj is not arrived[5].obj


def test_what_a_large_message_came_in_is_not_kept() -> None:
    pair = Pair()
    channel, there = pair.open()
    put(channel, b"h" * 100, b"x" * 10**6)
    pair.send(0, 1)
    packet = bytearray(pair.lines[0][0][1])
    pair.lines[0][0][1] = memoryview(packet)  # type: ignore[assignment]
    pair.arrive(0)
    packet[:] = b"?" * len(packet)
    packet.clear()  # raises BufferError while somebody has a view of it
    pair.settle()
    assert taken(there) == [b"h" * 100 + b"|" + b"x" * 10**6]


def test_the_end_of_a_link_ends_its_channels() -> None:
    pair = Pair()
    channel, there = pair.open()
    put(channel, b"x" * 10**7)
    pair.ends[1].incoming(pair.ends[0].tell(Kind.BYE), 0.0)
    assert there.ended == "the other end has ended" and there.closed and not pair.ends[1].alive
    pair.ends[0].end("no more")
    assert channel.closed and not channel.waits


@pytest.mark.parametrize(
    "packet",
    {
        "short": b"\x05",
        "a message within another": (Kind.DATA, mux.FIRST, struct_lengths := b"\x01\x00\x00\x00" + b"\x05" + b"\0" * 7),
        "no beginning": (Kind.DATA, 0, b"abc"),
        "too many frames": (Kind.DATA, mux.FIRST, b"\xff\xff\xff\xff"),
        "longer than it said": (Kind.DATA, mux.FIRST, struct_lengths + b"123456"),
        "ended early": (Kind.DATA, mux.FIRST | mux.LAST, struct_lengths + b"123"),
        "credit for nothing": (Kind.CREDIT, 0, b"\xff\xff\xff\x7f"),
        "half a number": (Kind.CREDIT, 0, b"\xff"),
        "a channel that is open": (Kind.OPEN, 0, b""),
        "received what was never sent": None,
    }.items(),
    ids=lambda item: item[0],
)
def test_what_never_should_be_sent_is_refused(packet: tuple[str, object]) -> None:
    pair = Pair()
    channel, there = pair.open()
    end = pair.ends[1]
    name, what = packet
    if name == "a message within another":
        put(channel, b"x" * 10**6)
        pair.send(0, 1)
        pair.arrive(0)
    with pytest.raises(ProtocolError):
        if isinstance(what, bytes):
            end.incoming([what], 0.0)
        elif isinstance(what, tuple):
            kind, flags, body = what
            head = mux.HEADER.pack(kind, flags, there.name, end.received + 1, 0)
            end.incoming([head + body], 0.0)
        else:
            end._kept.append(mux.Packet(Kind.CREDIT, number=1))
            end.incoming([mux.HEADER.pack(Kind.ACK, 0, 0, 0, 10**6)], 0.0)


def test_the_window_finds_the_line_it_has() -> None:
    """100 Mbit/s and a round trip of 40 ms hold 500 kB: about as much again may queue."""
    window, rate, round_trip, now = Window(), 12.5e6, 0.04, 0.0
    free_at, waiting = 0.0, deque[tuple[float, float, int]]()
    under_way, sizes = 0, []
    while now < 10.0:
        while under_way < window.nbytes:
            nbytes = window.chunk
            free_at = max(free_at, now) + nbytes / rate
            waiting.append((free_at + round_trip, now, nbytes))
            under_way += nbytes
        due, sent_at, nbytes = waiting.popleft()
        now = max(now, due)
        under_way -= nbytes
        window.answered(nbytes, now - sent_at, now, full=True)
        sizes.append(window.nbytes)
    late = sizes[len(sizes) // 2 :]
    assert min(late) > 0.4e6 and max(late) < 1.6e6


def test_the_window_opens_on_a_fast_line() -> None:
    window = Window()
    for n in range(1000):
        window.answered(window.chunk, 0.001, n / 1000, full=True)
    assert window.nbytes == Window.MOST
