"""The plugins of the federation at one site."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed.core import error_message

from daskfed.comm.opaque import OpaqueError
from daskfed.site.plugins import SitePlugins


class Scheduler:
    """What a site's scheduler has; it cannot take ``bad`` plugins."""

    def __init__(self) -> None:
        self.plugins: dict[tuple[str, str], bytes] = {}
        self.calls: list[str] = []

    async def ask(self, op: str, name: str, plugin: bytes = b"", idempotent: bool = False) -> Any:
        act, kind, _ = op.split("_")
        self.calls.append(f"{act} {kind} {name}")
        if plugin == b"bad" or (act == "unregister" and (kind, name) not in self.plugins):
            raise OpaqueError(error_message(ValueError(name)))
        if act == "register":
            self.plugins[kind, name] = plugin
        else:
            del self.plugins[kind, name]
        return {"worker": name}


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def site(scheduler: Scheduler) -> SitePlugins:
    return SitePlugins(scheduler.ask)


def test_a_plugin_comes_and_goes(site: SitePlugins, scheduler: Scheduler) -> None:
    assert asyncio.run(site.register("worker", "a", b"1")) == {"worker": "a"}
    asyncio.run(site.register("worker", "a", b"1"))  # asked for again: it is set up again, as in Dask
    assert asyncio.run(site.unregister("worker", "a")) == {"worker": "a"}
    assert scheduler.calls == ["register worker a"] * 2 + ["unregister worker a"] and not scheduler.plugins


def test_only_what_differs_is_changed(site: SitePlugins, scheduler: Scheduler) -> None:
    asyncio.run(site.agree([("worker", "a", b"1"), ("nanny", "a", b"1"), ("scheduler", "b", b"1")]))
    scheduler.calls.clear()
    asyncio.run(site.agree([("worker", "a", b"1"), ("nanny", "a", b"2"), ("worker", "c", b"1")]))
    assert scheduler.calls == ["unregister scheduler b", "register nanny a", "register worker c"]
    assert scheduler.plugins == {("worker", "a"): b"1", ("nanny", "a"): b"2", ("worker", "c"): b"1"}


def test_a_plugin_that_fails_does_not_keep_others_away(site: SitePlugins, scheduler: Scheduler) -> None:
    asyncio.run(site.agree([("worker", "a", b"bad"), ("worker", "b", b"1")]))
    assert scheduler.plugins == {("worker", "b"): b"1"}
    with pytest.raises(OpaqueError):
        asyncio.run(site.register("worker", "a", b"bad"))
    asyncio.run(site.agree([("worker", "a", b"1"), ("worker", "b", b"1")]))  # mended
    assert scheduler.plugins["worker", "a"] == b"1"


def test_what_others_registered_is_left_alone(site: SitePlugins, scheduler: Scheduler) -> None:
    scheduler.plugins["worker", "own"] = b"1"
    asyncio.run(site.agree([]))
    assert scheduler.plugins and not scheduler.calls
