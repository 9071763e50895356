"""Plugins that the hub keeps: who is told, what a site that joins or was away gets, what a restart leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed.core import error_message, rpc

from daskfed.comm.opaque import OpaqueError
from daskfed.hub.owners import Caller, current
from daskfed.hub.server import Hub
from daskfed.messages import Message, SiteHello, SiteStatus
from tests.unit.hub.builders import hello

STATUS = SiteStatus(workers=1, threads=1, memory_limit=1, memory_used=0, running=0, queued=0)


class Site:
    """A site that notes what it is told of plugins; ``away``: its connection is broken."""

    def __init__(self, name: str) -> None:
        self.hello: SiteHello = hello(name)
        self.plugins: dict[tuple[str, str], bytes] = {}
        self.away = False
        self.calls: list[str] = []
        self.leaving: Callable[[], None] | None = None  # called while it is being told of a plugin

    @property
    def connected(self) -> bool:
        return not self.away

    def send(self, message: Message, payload: Any = None) -> None:
        """Nothing but plugins matters here."""

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        if self.away:
            raise OSError("the connection is broken")
        self.calls.append(op)
        return getattr(self, op)(**kwargs)

    def register_plugin(self, kind: str, name: str, plugin: bytes) -> Any:
        if plugin == b"bad":
            raise OpaqueError(error_message(ZeroDivisionError("a bad plugin")))
        self.plugins[kind, name] = plugin
        if self.leaving is not None:
            self.leaving()
        return {f"tcp://{self.hello.site}:1": {"status": "OK"}}

    def unregister_plugin(self, kind: str, name: str) -> Any:
        del self.plugins[kind, name]
        return {f"tcp://{self.hello.site}:1": {"status": "OK"}}

    def agree_on_plugins(self, plugins: list[tuple[str, str, bytes]]) -> None:
        self.plugins = {(kind, name): plugin for kind, name, plugin in plugins}

    async def close(self) -> None:
        """Nothing to end."""


def play(story: Callable[[Hub, Any], Awaitable[None]], state: Path | None = None) -> None:
    async def played() -> None:
        async with await Hub(state=str(state) if state else None).start_at("tcp://127.0.0.1:0") as hub:
            async with rpc(hub.address) as client:
                await story(hub, client)

    asyncio.run(played())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_all_sites_have_a_plugin_until_it_is_unregistered() -> None:
    north, south = Site("north"), Site("south")

    async def story(hub: Hub, client: Any) -> None:
        hub.add_site(north)
        hub.add_site(south)
        replies = await client.register_worker_plugin(plugin=b"1", name="a", idempotent=False)
        assert replies == {f"fed://{name}/{name}:1": {"status": "OK"} for name in ("north", "south")}
        assert await client.register_scheduler_plugin(plugin=b"2", name="a", idempotent=False) is None
        assert north.plugins == south.plugins == {("worker", "a"): b"1", ("scheduler", "a"): b"2"}
        assert await client.register_worker_plugin(plugin=b"3", name="a", idempotent=True) == {}
        await client.unregister_worker_plugin(name="a")
        assert north.plugins == south.plugins == {("scheduler", "a"): b"2"}
        with pytest.raises(ValueError, match="The worker plugin a does not exist"):
            await client.unregister_worker_plugin(name="a")

    play(story)


def test_a_site_that_joins_has_the_plugins_before_the_hub_knows_what_it_offers() -> None:
    north = Site("north")

    async def story(hub: Hub, client: Any) -> None:
        await client.register_worker_plugin(plugin=b"1", name="a", idempotent=False)
        await client.register_nanny_plugin(plugin=b"2", name="b", idempotent=False)
        north.away = True
        hub.add_site(north)
        hub.from_site("north", STATUS)
        await asyncio.sleep(0.05)
        assert hub.core.sites["north"].status is None  # so it gets no work
        north.away = False
        await until(lambda: hub.core.sites["north"].status == STATUS)
        assert list(north.plugins.items()) == [(("worker", "a"), b"1"), (("nanny", "b"), b"2")]

    play(story)


def test_a_site_that_joins_a_hub_without_plugins_is_not_held_up() -> None:
    north = Site("north")

    async def story(hub: Hub, client: Any) -> None:
        hub.add_site(north)
        hub.from_site("north", STATUS)
        assert hub.core.sites["north"].status == STATUS and not north.calls

    play(story)


def test_a_site_that_was_away_is_told_when_it_is_back() -> None:
    north, south = Site("north"), Site("south")

    async def story(hub: Hub, client: Any) -> None:
        hub.add_site(north)
        hub.add_site(south)
        await client.register_worker_plugin(plugin=b"1", name="a", idempotent=False)
        south.away = True
        await client.unregister_worker_plugin(name="a")
        replies = await client.register_worker_plugin(plugin=b"2", name="b", idempotent=False)
        assert list(replies) == ["fed://north/north:1"] and south.plugins == {("worker", "a"): b"1"}
        south.away = False
        await until(lambda: south.plugins == north.plugins == {("worker", "b"): b"2"})
        assert north.calls.count("agree_on_plugins") == 0

    play(story)


def test_of_sites_that_are_gone_nothing_is_left() -> None:
    """Also where one leaves while it is being told; one that comes back is told what there is."""
    north = Site("north")

    async def story(hub: Hub, client: Any) -> None:
        for n in range(3):
            site = Site("south")
            site.hello = replace(site.hello, incarnation=f"south-{n}")
            hub.add_site(site)
            await client.register_worker_plugin(plugin=b"%d" % n, name="a", idempotent=False)
            hub.remove_site(site.hello)
        hub.add_site(north)
        hub.from_site("north", STATUS)
        north.leaving = lambda: hub.remove_site(north.hello)
        await client.register_worker_plugin(plugin=b"last", name="a", idempotent=False)
        assert not hub.plugins.told
        north.leaving = None
        hub.add_site(north)
        hub.from_site("north", STATUS)
        await until(lambda: hub.core.sites["north"].status == STATUS)
        assert north.plugins == {("worker", "a"): b"last"}
        assert list(hub.plugins.told) == [north.hello.incarnation]

    play(story)


def test_a_plugin_that_a_scheduler_cannot_take_is_kept_nowhere() -> None:
    north = Site("north")

    async def story(hub: Hub, client: Any) -> None:
        hub.add_site(north)
        with pytest.raises(ZeroDivisionError, match="a bad plugin"):
            await client.register_scheduler_plugin(plugin=b"bad", name="a", idempotent=False)
        assert not hub.plugins.kept and not hub.journal.things("plugin")

    play(story)


def test_whose_a_plugin_is_outlives_the_hub(tmp_path: Path) -> None:
    async def before(hub: Hub, client: Any) -> None:
        current.set(Caller("alice"))
        await hub.plugins.register("worker", b"1", "a")
        await hub.plugins.register("worker", b"2", "b")
        current.set(None)
        await client.register_worker_plugin(plugin=b"3", name="b", idempotent=False)  # of the hub's own user

    async def after(hub: Hub, client: Any) -> None:
        assert hub.plugins.owners == {("worker", "a"): "alice", ("worker", "b"): hub.owners.mine}
        current.set(Caller("mallory"))
        for name in ("a", "b"):
            with pytest.raises(PermissionError, match=f"worker plugin '{name}' belongs to"):
                await hub.plugins.unregister("worker", name)
        current.set(Caller("alice"))
        await hub.plugins.unregister("worker", "a")
        assert list(hub.plugins.kept) == [("worker", "b")]

    play(before, tmp_path)
    play(after, tmp_path)


def test_plugins_outlive_the_hub(tmp_path: Path) -> None:
    north = Site("north")

    async def before(hub: Hub, client: Any) -> None:
        for name in ("a", "b", "c"):
            await client.register_worker_plugin(plugin=name.encode(), name=name, idempotent=False)
        await client.unregister_worker_plugin(name="b")

    async def after(hub: Hub, client: Any) -> None:
        hub.add_site(north)
        await until(lambda: north.plugins)
        assert list(north.plugins.items()) == [(("worker", "a"), b"a"), (("worker", "c"), b"c")]

    play(before, tmp_path)
    play(after, tmp_path)
