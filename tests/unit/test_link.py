"""The link delivers every item once and in order, keeps little, and costs nearly nothing on a good wire."""

from __future__ import annotations

import random

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daskfed.link import ACK_DELAY_S, Backlog, Envelope, Link, OtherSession


def sends(link: Link[str], *items: str) -> list[Envelope]:
    for item in items:
        link.send(item, nbytes=10)
    return link.outgoing(now=0.0)


def test_many_items_travel_in_one_envelope_and_the_ack_rides_on_data() -> None:
    a: Link[str] = Link("s")
    b: Link[str] = Link("s")
    (envelope,) = sends(a, "x", "y", "z")
    assert envelope == Envelope("s", seq=0, ack=0, items=("x", "y", "z"))
    assert b.receive(envelope, now=0.0) == ["x", "y", "z"]
    (answer,) = sends(b, "thanks")
    assert answer.ack == 3
    assert a.receive(answer, now=0.0) == ["thanks"]
    assert a.backlog == Backlog(0, 0)
    assert b.outgoing(now=10.0) == []


def test_a_bare_ack_goes_out_at_the_latest_after_the_delay() -> None:
    a: Link[str] = Link("s")
    b: Link[str] = Link("s")
    b.receive(sends(a, "x")[0], now=5.0)
    assert b.outgoing(now=5.0) == []
    assert b.wakes_at() == 5.0 + ACK_DELAY_S
    (ack,) = b.outgoing(now=5.0 + ACK_DELAY_S)
    assert ack == Envelope("s", seq=0, ack=1)
    assert b.idle
    assert not a.idle
    assert a.receive(ack, now=6.0) == []
    assert a.idle
    assert a.outgoing(now=99.0) == []  # a bare ack is not acknowledged


def test_envelopes_are_bounded_in_items_and_bytes() -> None:
    by_items: Link[str] = Link("s", batch_items=2)
    assert [e.items for e in sends(by_items, "a", "b", "c")] == [("a", "b"), ("c",)]
    by_bytes: Link[str] = Link("s", batch_nbytes=15)
    assert [e.items for e in sends(by_bytes, "a", "b", "c")] == [("a", "b"), ("c",)]


def test_a_large_item_still_travels() -> None:
    link: Link[str] = Link("s", batch_nbytes=15)
    link.send("huge", nbytes=10**9)
    assert [e.items for e in link.outgoing(0.0)] == [("huge",)]
    assert link.backlog == Backlog(1, 10**9)


def test_the_window_bounds_what_is_in_flight() -> None:
    a: Link[str] = Link("s", window_items=2)
    b: Link[str] = Link("s")
    (first,) = sends(a, "x", "y", "z")
    assert first.items == ("x", "y")
    assert a.outgoing(1.0) == []
    assert a.backlog == Backlog(3, 30)
    assert b.receive(first, 1.0) == ["x", "y"]
    a.receive(b.outgoing(9.0)[0], 9.0)
    assert a.wakes_at() < 9.0
    assert [e.items for e in a.outgoing(9.0)] == [("z",)]


def test_what_comes_early_waits_and_what_came_already_is_dropped() -> None:
    a: Link[str] = Link("s", batch_items=1)
    b: Link[str] = Link("s")
    x, y, z = sends(a, "x", "y", "z")
    assert b.receive(z, 0.0) == []
    assert b.receive(z, 0.0) == []
    assert b.receive(x, 0.0) == ["x"]
    assert b.receive(x, 0.0) == []
    assert b.receive(y, 0.0) == ["y", "z"]
    assert b.received == 3


def test_a_receiver_takes_an_envelope_larger_than_its_own_window() -> None:
    a: Link[str] = Link("s")
    b: Link[str] = Link("s", window_items=1)
    assert b.receive(sends(a, "x", "y", "z")[0], 0.0) == ["x", "y", "z"]


def test_a_stream_that_was_dialled_again_gets_only_what_the_peer_lacks() -> None:
    a: Link[str] = Link("s", batch_items=1)
    b: Link[str] = Link("s")
    x, _lost = sends(a, "x", "y")
    b.receive(x, 0.0)
    a.tick(1000.0)
    assert a.outgoing(1000.0) == []  # on a stream nothing is sent again before it breaks
    a.reconnected(1000.0, peer_received=b.received)
    (again,) = a.outgoing(1000.0)
    assert again.items == ("y",)
    assert b.receive(again, 1000.0) == ["y"]


def test_after_dialling_again_without_telling_everything_unacknowledged_goes_out() -> None:
    a: Link[str] = Link("s")
    b: Link[str] = Link("s")
    b.receive(sends(a, "x", "y")[0], 0.0)
    a.send("z")
    a.reconnected(1.0)
    (again,) = a.outgoing(1.0)
    assert again == Envelope("s", seq=0, ack=0, items=("x", "y", "z"))
    assert b.receive(again, 1.0) == ["z"]


def test_time_out_doubles_until_an_ack_comes() -> None:
    a: Link[str] = Link("s", resend_after_s=1.0)
    b: Link[str] = Link("s")
    sends(a, "x")
    sent_at = []
    for now in range(1, 16):
        a.tick(float(now))
        sent_at += [now for _ in a.outgoing(float(now))]
    assert sent_at == [1, 3, 7, 15]
    a.reconnected(16.0)
    b.receive(a.outgoing(16.0)[0], 16.0)
    a.receive(b.outgoing(17.0)[0], 17.0)
    a.send("y")
    a.outgoing(17.0)
    assert a.wakes_at() == 18.0


def test_a_peer_who_is_heard_is_tried_again_sooner_than_a_silent_one() -> None:
    a: Link[str] = Link("s", resend_after_s=1.0)
    sends(a, "x")
    sent_at = []
    for now in range(1, 16):
        a.tick(float(now))
        sent_at += [now for _ in a.outgoing(float(now))]
        a.receive(Envelope("s", 0, ack=0), float(now))  # it lives and lacks "x"
    assert sent_at == [1, 3, 7, 11, 15]
    assert a.wakes_at() <= 19.0


def test_an_ack_that_comes_after_the_time_out_spares_the_resend() -> None:
    a: Link[str] = Link("s", resend_after_s=1.0)
    b: Link[str] = Link("s")
    b.receive(sends(a, "x")[0], 0.0)
    a.tick(1.0)
    a.receive(b.outgoing(1.0)[0], 1.0)
    assert a.outgoing(1.0) == []
    assert a.idle


def test_a_lost_ack_is_sent_again_when_the_item_comes_again() -> None:
    a: Link[str] = Link("s", resend_after_s=1.0)
    b: Link[str] = Link("s")
    b.receive(sends(a, "x")[0], 0.0)
    assert len(b.outgoing(0.5)) == 1  # lost
    a.tick(1.0)
    assert b.receive(a.outgoing(1.0)[0], 1.0) == []
    assert b.outgoing(1.0 + ACK_DELAY_S) == [Envelope("s", 0, ack=1)]


def test_another_session_is_recognised_and_changes_nothing() -> None:
    link: Link[str] = Link("north:1")
    with pytest.raises(OtherSession, match="north:2") as caught:
        link.receive(Envelope("north:2", 0, 0, ("x",)), 0.0)
    assert (caught.value.expected, caught.value.got) == ("north:1", "north:2")
    assert link.received == 0
    assert link.idle


@pytest.mark.parametrize("sent", [0, 1])
def test_an_ack_of_what_was_never_sent_is_refused(sent: int) -> None:
    link: Link[str] = Link("s")
    for _ in range(sent):
        link.send("x")
        link.outgoing(0.0)
    link.send("still queued")
    with pytest.raises(ValueError, match="never sent"):
        link.receive(Envelope("s", 0, ack=sent + 1, items=("y",)), 0.0)
    with pytest.raises(ValueError, match="never sent"):
        link.reconnected(0.0, peer_received=sent + 1)
    assert link.received == 0


def test_envelope_survives_msgpack() -> None:
    envelope = Envelope("north:1", seq=7, ack=3, items=(1, 2))
    wire = msgpack.packb(envelope.encode(item=lambda n: {"n": n}))
    assert Envelope.decode(msgpack.unpackb(wire), item=lambda plain: plain["n"]) == envelope


@pytest.mark.parametrize(
    "plain", [{}, {"session": "s", "seq": -1, "ack": 0, "items": []}, {"session": 3, "seq": 0, "ack": 0, "items": []}]
)
def test_what_is_not_an_envelope_is_refused(plain: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="envelope"):
        Envelope.decode(plain)


@settings(max_examples=60, stateful_step_count=60, deadline=None)
class BadWire(RuleBasedStateMachine):
    """Two links over a wire on which hypothesis loses, repeats and reorders envelopes as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        options = {"ack_delay_s": 0.5, "resend_after_s": 2.0, "batch_items": 3, "window_items": 7}
        self.ends: tuple[Link[int], Link[int]] = (Link("s", **options), Link("s", **options))  # type: ignore[arg-type]
        self.sent: tuple[list[int], list[int]] = ([], [])
        self.got: tuple[list[int], list[int]] = ([], [])
        self.wire: list[tuple[int, Envelope]] = []  # (to which end, what)

    @rule(end=st.sampled_from([0, 1]), count=st.integers(1, 10))
    def send(self, end: int, count: int) -> None:
        for _ in range(count):
            self.ends[end].send(len(self.sent[end]), nbytes=1)
            self.sent[end].append(len(self.sent[end]))

    @rule(end=st.sampled_from([0, 1]), seconds=st.floats(0, 5))
    def wake(self, end: int, seconds: float) -> None:
        self.now += seconds
        self.ends[end].tick(self.now)
        self.wire += [(1 - end, envelope) for envelope in self.ends[end].outgoing(self.now)]

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), repeat=st.booleans())
    def arrive(self, data: st.DataObject, repeat: bool) -> None:
        i = data.draw(st.integers(0, len(self.wire) - 1))
        end, envelope = self.wire[i] if repeat else self.wire.pop(i)
        self.got[end].extend(self.ends[end].receive(envelope, self.now))

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

    @rule(told=st.booleans())
    def break_the_stream(self, told: bool) -> None:
        self.wire.clear()
        for end in (0, 1):
            self.ends[end].reconnected(self.now, self.ends[1 - end].received if told else 0)

    @invariant()
    def delivered_once_and_in_order(self) -> None:
        for end in (0, 1):
            assert self.got[end] == self.sent[1 - end][: len(self.got[end])]
            assert self.ends[end].backlog.nbytes == self.ends[end].backlog.items
            assert self.ends[end].backlog.items >= len(self.sent[end]) - len(self.got[1 - end])
            assert len(self.ends[end]._early) < 7

    def teardown(self) -> None:
        """From here on the wire is good: everything must arrive, and then both ends fall silent."""
        for _ in range(400):
            if not self.wire and all(end.idle for end in self.ends):
                break
            self.wake(0, 1.0)
            self.wake(1, 0.0)
            for end, envelope in self.wire:
                self.got[end].extend(self.ends[end].receive(envelope, self.now))
            self.wire.clear()
        assert all(end.idle for end in self.ends)
        assert self.got == (self.sent[1], self.sent[0])


TestBadWire = BadWire.TestCase


def test_a_good_stream_costs_one_envelope_per_batch_and_few_acks() -> None:
    """10,000 items sent as they come, 100 a round of 10 ms: 100 envelopes there, at most one back in 100 ms."""
    a: Link[int] = Link("s")
    b: Link[int] = Link("s")
    there = back = 0
    for round_ in range(100):
        now = round_ / 100
        for n in range(100):
            a.send(n)
        for envelope in a.outgoing(now):
            there += 1
            b.receive(envelope, now)
        for envelope in b.outgoing(now):
            back += 1
            a.receive(envelope, now)
    assert there == 100
    assert 8 <= back <= 10
    assert a.backlog.items <= 1100


def test_half_the_envelopes_lost_and_all_reordered_still_delivers() -> None:
    rng = random.Random(7)
    a: Link[int] = Link("s", resend_after_s=1.0, batch_items=5)
    b: Link[int] = Link("s", resend_after_s=1.0)
    for n in range(500):
        a.send(n)
    got: list[int] = []
    now = 0.0
    while not a.idle:
        now += 0.5
        a.tick(now)
        there = [e for e in a.outgoing(now) if rng.random() < 0.5]
        rng.shuffle(there)
        for envelope in there:
            got += b.receive(envelope, now)
        for envelope in b.outgoing(now):
            if rng.random() < 0.5:
                a.receive(envelope, now)
        assert now < 1000
    assert got == list(range(500))
