"""What travels together on a control stream is not more than the other end should hold in memory."""

from __future__ import annotations

import pytest

from daskfed.comm import control
from daskfed.link import Link
from daskfed.messages import KeysLost, Message, ReleaseKeys, ReportHoldings


@pytest.mark.parametrize(
    ("messages", "pieces"),
    [
        ([], [0]),
        ([ReportHoldings()] * 5, [5]),
        ([KeysLost(("a", "b", "c")), KeysLost(("d",)), ReportHoldings()], [2, 1]),
        ([ReleaseKeys(("a", "b", "c", "d", "e"), 0), KeysLost(("f", "g", "h", "i"))], [1, 1]),
    ],
)
def test_pieces_come_together_as_they_were(
    messages: list[Message], pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MOST_KEYS", 4)
    sender: Link[control.Item] = Link("session")
    receiver: Link[control.Item] = Link("session")
    for message in messages:
        sender.send((message, None))
    envelopes = sender.outgoing(0.0) or [control.Envelope("session", 0, 0)]
    parts = [part for envelope in envelopes for part in control.at_a_time(envelope)]
    assert [len(part.items) for part in parts] == pieces
    received = [item for part in parts for item in receiver.receive(part, 0.0)]
    assert [message for message, _ in received] == messages
