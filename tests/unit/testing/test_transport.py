"""In any weather messages arrive once, in order, through the real codec; a good stream costs no resends."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from daskfed.messages import Attempt, KeysLost, KeysMade, MadeKey, Message, ReleaseKeys
from daskfed.testing.clock import VirtualClock
from daskfed.testing.transport import Connection, Weather, connect

STREAM = Weather(delay_s=(0.01, 0.02))
STORM = Weather(delay_s=(0.01, 0.2), loss=0.3, duplicate=0.2, ordered=False)


class Ends:
    """Two peers that write down what they get."""

    def __init__(self, weather: Weather, seed: int = 1) -> None:
        self.clock = VirtualClock()
        self.got: tuple[list[Any], list[Any]] = ([], [])
        self.connection: Connection = connect(self.clock, Random(seed), weather, "s", (self._take(0), self._take(1)))

    def _take(self, end: int) -> Any:
        return lambda message, beside: self.got[end].append((message, beside))

    def send(self, end: int, message: Message, beside: Any = None) -> None:
        self.connection.ends[end].send(message, beside)
        self.connection.ends[end].pump()


@pytest.mark.parametrize("weather", [STREAM, STORM])
def test_everything_arrives_once_in_order_and_then_silence(weather: Weather) -> None:
    ends = Ends(weather)
    here = [ReleaseKeys(keys=(("x", n), f"y-{n}")) for n in range(50)]
    there = [KeysLost(keys=(n,)) for n in range(50)]
    for n in range(50):
        ends.clock.call_later(n / 10, ends.send, 0, here[n], {("x", n): "beside"})
        ends.clock.call_later(n / 7, ends.send, 1, there[n])
    ends.clock.run_until(60.0)
    assert ends.got[1] == [(message, {("x", n): "beside"}) for n, message in enumerate(here)]
    assert ends.got[0] == [(message, None) for message in there]
    assert ends.connection.idle


def test_messages_pass_through_the_codec() -> None:
    ends = Ends(STREAM)
    message = KeysMade("b1", Attempt(2, 3), (MadeKey(("x", 1), 7),))
    ends.send(0, message)
    ends.clock.run_until(1.0)
    ((arrived, _),) = ends.got[1]
    assert arrived == message
    assert arrived is not message


@pytest.mark.parametrize("weather", [STREAM, STORM])
def test_a_partition_loses_nothing_once_it_heals(weather: Weather) -> None:
    ends = Ends(weather)
    ends.send(0, KeysLost(keys=("before",)))
    ends.connection.cut()  # what is under way is lost
    ends.send(0, KeysLost(keys=("during",)))
    ends.clock.run_until(30.0)
    assert ends.got[1] == []
    ends.connection.mend()
    ends.clock.run_until(90.0)
    assert [message.keys for message, _ in ends.got[1]] == [("before",), ("during",)]
    assert ends.connection.idle


def test_a_closed_end_says_and_hears_nothing() -> None:
    ends = Ends(STREAM)
    ends.connection.ends[1].close()
    ends.send(0, KeysLost(keys=("x",)))
    ends.send(1, KeysLost(keys=("y",)))
    ends.clock.run_until(1.0)
    assert ends.got == ([], [])
