"""Keys from one agent to another: grouped, streamed, relayed, and what happens when they do not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from distributed.comm.core import Comm
from distributed.core import Status
from distributed.protocol.serialize import serialize

from daskfed.comm.opaque import OpaqueServer
from daskfed.dask_private import Serialized
from daskfed.data import transfer
from daskfed.data.fetch import open_import
from daskfed.data.parcels import CHUNK_BYTES
from daskfed.data.transfer import GROUP_BYTES, GROUP_KEYS, Arrival, Door, Fetcher, Source, grouped
from daskfed.messages import Key
from daskfed.site.agent import Agent

NOBODY = "tcp://127.0.0.1:1"


class NorthSite:
    """A site that has some values, behind a door; also the directory of a federation of that one site."""

    def __init__(self, values: Mapping[Key, Any], address: str | None = None) -> None:
        self.values = values
        self.server = OpaqueServer({"get_keys": self.get_keys})
        self.source = Source(self.gather, lambda key: 1)
        self.said_address = address  # what the hub says, if not the truth
        self.break_after: int | None = None  # messages of a stream
        self.stalls = False  # instead of sending a value
        self.asked: list[str] = []
        self.gathered: list[list[Key]] = []
        self.streams = 0

    async def gather(self, keys: list[Key]) -> dict[Key, Any]:
        self.gathered.append(keys)
        if self.stalls:
            await asyncio.sleep(3600)
        return {key: Serialized(*serialize(self.values[key])) for key in keys if key in self.values}

    async def get_keys(self, comm: Comm, keys: Collection[Key], token: str, site: str) -> Status:
        assert (token, site) == ("secret", "north")
        self.streams += 1
        async for message in self.messages(keys):
            await comm.write(message)
        if self.break_after is not None:
            comm.abort()
        return Status.dont_reply

    async def messages(self, keys: Collection[Key]) -> AsyncIterator[dict[str, Any]]:
        count = 0
        async for message in self.source.stream(keys):
            if count == self.break_after:
                return
            count += 1
            yield message

    async def door_of(self, site: str) -> Door:
        self.asked.append(site)
        if site != "north":
            raise OSError(f"no site {site!r}")
        return Door(self.server.address if self.said_address is None else self.said_address, "secret")

    def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        return self.messages(keys)


async def fetched(
    north: NorthSite, *keys: Key, source: str = "north", fetcher: Fetcher | None = None
) -> dict[Key, Arrival]:
    """Fetch keys from the site and return what became of them."""
    if not north.server.listeners:
        await north.server.listen("inproc://")
        await north.server.start()
    arrivals: dict[Key, Arrival] = {}
    fetcher = fetcher or Fetcher(north, lambda arrival: None)
    fetcher.deliver = lambda arrival: arrivals.__setitem__(arrival.key, arrival)
    await fetcher.start()
    fetcher.fetch(source, [(key, 1) for key in keys])
    async with asyncio.timeout(30):
        while len(arrivals) < len(keys):
            await asyncio.sleep(0.001)
    return arrivals


def value(arrival: Arrival) -> Any:
    assert arrival.parcel is not None, arrival.reason
    return open_import(arrival.parcel.header, list(arrival.parcel.frames), arrival.parcel.checksum)


def test_keys_come_over_one_connection_and_say_how() -> None:
    async def check() -> None:
        north = NorthSite({"a": 1, ("b", 2): "x" * 3 * CHUNK_BYTES, "c": [3]})
        arrivals = await fetched(north, "a", ("b", 2), "c")
        assert {key: value(arrival) for key, arrival in arrivals.items()} == north.values
        assert {arrival.relayed for arrival in arrivals.values()} == {False}
        assert {arrival.source for arrival in arrivals.values()} == {"north"}
        assert all(arrival.seconds >= 0 for arrival in arrivals.values())
        assert north.streams == 1

    asyncio.run(check())


def test_the_hub_is_asked_once_for_an_address_and_a_connection_is_used_again() -> None:
    async def check() -> None:
        north = NorthSite({"a": 1, "b": 2})
        fetcher = Fetcher(north, lambda arrival: None)
        assert value((await fetched(north, "a", fetcher=fetcher))["a"]) == 1
        assert value((await fetched(north, "b", fetcher=fetcher))["b"]) == 2
        assert north.asked == ["north"]
        await fetcher.close()

    asyncio.run(check())


@pytest.mark.parametrize("address", ["", "inproc://10.0.0.1/1/1", "gopher://x", "tls://127.0.0.1:1"])
def test_a_site_that_cannot_be_dialled_is_reached_through_the_hub(address: str) -> None:
    async def check() -> None:
        north = NorthSite({"a": 1}, address)
        arrival = (await fetched(north, "a"))["a"]
        assert value(arrival) == 1 and arrival.relayed and north.streams == 0

    asyncio.run(check())


def test_a_site_at_whose_address_another_one_answers_is_reached_through_the_hub() -> None:
    """As in two private networks with the same addresses."""

    async def check() -> None:
        south = SimpleNamespace(name="south", _port=SimpleNamespace(door="another secret"))
        server = OpaqueServer({"get_keys": MethodType(Agent._get_keys, south)})
        await server.listen("inproc://")
        await server.start()
        north = NorthSite({"a": 1, "b": 2}, server.address)
        fetcher = Fetcher(north, lambda arrival: None)
        for key in "ab":
            arrival = (await fetched(north, key, fetcher=fetcher))[key]
            assert value(arrival) == north.values[key] and arrival.relayed and north.asked == ["north"]
        await fetcher.close()
        await server.close()

    asyncio.run(check())


def test_a_site_that_moved_is_looked_up_again() -> None:
    async def check() -> None:
        north = NorthSite({"a": 1, "b": 2})
        fetcher = Fetcher(north, lambda arrival: None)
        await fetched(north, "a", fetcher=fetcher)
        fetcher._doors["north"] = Door("inproc://10.0.0.1/1/1")
        arrival = (await fetched(north, "b", fetcher=fetcher))["b"]
        assert value(arrival) == 2 and not arrival.relayed
        assert north.asked == ["north", "north"]

    asyncio.run(check())


def test_missing_keys_are_told_and_the_others_come() -> None:
    async def check() -> None:
        arrivals = await fetched(NorthSite({"a": 1}), "gone", "a")
        assert value(arrivals["a"]) == 1
        assert arrivals["gone"].parcel is None and arrivals["gone"].reason == "it is not in memory at its site"

    asyncio.run(check())


def test_an_unknown_site_is_told() -> None:
    async def check() -> None:
        arrivals = await fetched(NorthSite({}), "a", "b", source="atlantis")
        assert {arrival.reason for arrival in arrivals.values()} == {
            "the hub does not say where site 'atlantis' is: no site 'atlantis'"
        }

    asyncio.run(check())


@pytest.mark.parametrize(("address", "who"), [(None, "the connection with"), ("", "relay from")])
def test_a_stream_that_breaks_off_loses_only_what_had_not_come(address: str | None, who: str) -> None:
    async def check() -> None:
        north = NorthSite({"a": 1, "b": "x" * 3 * CHUNK_BYTES}, address)
        north.break_after = 2
        arrivals = await fetched(north, "a", "b")
        assert value(arrivals["a"]) == 1
        assert arrivals["b"].parcel is None and who in arrivals["b"].reason and "'north'" in arrivals["b"].reason

    asyncio.run(check())


def test_where_somebody_answers_nothing_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Nanny does, which has the site's address on the loopback of another machine."""
    monkeypatch.setattr(transfer, "STALLED_S", 0.05)

    async def check() -> None:
        another = OpaqueServer({})
        await another.listen("inproc://")
        await another.start()
        north = NorthSite({"x": 1}, another.address)
        arrival = (await fetched(north, "x"))["x"]
        assert value(arrival) == 1 and arrival.relayed and north.streams == 0
        await another.close()

    asyncio.run(check())


@pytest.mark.parametrize("address", [None, ""], ids=["direct", "relayed"])
def test_a_stream_from_which_nothing_comes_is_given_up(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALLED_S", 0.05)

    async def check() -> None:
        north = NorthSite({"x": 1}, address)
        north.stalls = True
        arrival = (await fetched(north, "x"))["x"]
        assert arrival.parcel is None and "nothing came for 0.05 s" in arrival.reason and not arrival.missing
        north.stalls = False
        assert value((await fetched(north, "x"))["x"]) == 1

    asyncio.run(check())


def test_small_keys_are_brought_together_and_large_ones_alone() -> None:
    sizes: list[tuple[Key, int]] = [("a", 1), ("b", 1), ("big", 2 * GROUP_BYTES), ("c", 1)]
    assert list(grouped(sizes)) == [["a", "b"], ["big"], ["c"]]
    many: list[tuple[Key, int]] = [(i, 0) for i in range(GROUP_KEYS + 1)]
    assert [len(group) for group in grouped(many)] == [GROUP_KEYS, 1]
    assert list(grouped([])) == []


def test_a_source_asks_for_one_group_of_values_while_another_is_taken() -> None:
    async def check() -> None:
        north = NorthSite({key: key for key in "abcd"})
        north.source.size_of = lambda key: GROUP_BYTES
        asked, messages = [], []
        async for message in north.source.stream(["a", "b", "c", "d"]):
            await asyncio.sleep(0.01)
            asked.append(len(north.gathered))
            messages.append(message)
        assert north.gathered == [["a"], ["b"], ["c"], ["d"]] and asked == [2, 3, 4, 4]
        assert [bool(message.get("end")) for message in messages] == [False, False, False, True]

    asyncio.run(check())


def test_a_stream_that_nobody_reads_any_more_asks_for_no_more() -> None:
    async def check() -> None:
        north = NorthSite({key: key for key in "abc"})
        north.source.size_of = lambda key: GROUP_BYTES
        messages = north.source.stream(["a", "b", "c"])
        await anext(messages)
        await messages.aclose()
        assert len(north.gathered) <= 2 and [task.get_name() for task in asyncio.all_tasks()] == [
            asyncio.current_task().get_name()  # type: ignore[union-attr]
        ]

    asyncio.run(check())


def test_a_stream_of_no_keys_ends() -> None:
    async def check() -> None:
        assert [message async for message in NorthSite({}).source.stream([])] == [{"end": True}]

    asyncio.run(check())
