"""Plugins that users register, kept as they were pickled: all sites have them, also those that join later.

A plugin is sent to all sites and kept, and journalled, until it is unregistered. A site that joins gets all of them
before it gets work; one that missed a change, since its connection was broken, is told again and again until it has
taken it or is gone. Within a site, Dask's scheduler gives worker and nanny plugins to workers that join.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from daskfed.comm.opaque import OpaqueError
from daskfed.hub.fanout import answers_errors
from daskfed.hub.ports import SitePort
from daskfed.messages import SiteHello, SiteStatus

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

logger = logging.getLogger(__name__)

KINDS = ("scheduler", "worker", "nanny")
JOURNALLED = "plugin"  # (kind, name) -> pickled
OWNERS = "plugin-owner"  # (kind, name) -> whose it is, where that is not the hub's own user
RETRY_S = 0.5  # pause before a site that could not be reached is told again

PluginName: TypeAlias = tuple[str, str]


class Told:
    """What a site was told; the lock is held while it is being told."""

    def __init__(self) -> None:
        self.taken: dict[PluginName, int] = {}  # numbers of the plugins that it has
        self.lock = asyncio.Lock()


class Plugins:
    """The plugins of a federation."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.kept: dict[PluginName, bytes] = {}
        self.owners: dict[PluginName, str] = {}  # of what is kept
        self._numbers: dict[PluginName, int] = {}  # of what is kept: another one for each change
        self._counter = itertools.count(1)
        self.told: dict[str, Told] = {}  # by the incarnation of a site that is here
        self._joining: dict[str, SiteStatus | None] = {}  # site that has not taken all -> the status that waits for it

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        found: dict[str, Callable[..., Any]] = {}
        for kind in KINDS:
            found[f"register_{kind}_plugin"] = answers_errors(partial(self.register, kind))
            found[f"unregister_{kind}_plugin"] = answers_errors(partial(self.unregister, kind))
        return found

    def restore(self) -> None:
        """Read back what an earlier hub kept."""
        owners = dict(self.hub.journal.things(OWNERS))
        for plugin_name, plugin in self.hub.journal.things(JOURNALLED):
            self._keep(plugin_name, plugin, owners.get(plugin_name, self.hub.owners.mine))

    def _keep(self, plugin_name: PluginName, plugin: bytes, owner: str) -> None:
        self.owners[plugin_name] = owner
        self.kept.pop(plugin_name, None)  # the order is that of registration
        self.kept[plugin_name] = plugin
        self._numbers[plugin_name] = next(self._counter)

    def _forget(self, plugin_name: PluginName) -> None:
        for known in (self.kept, self.owners, self._numbers):
            known.pop(plugin_name, None)
        with self.hub.journal.together():
            self.hub.journal.forget(JOURNALLED, plugin_name)
            self.hub.journal.forget(OWNERS, plugin_name)

    def _journal(self, plugin_name: PluginName, plugin: bytes, owner: str) -> None:
        with self.hub.journal.together():
            self.hub.journal.keep(JOURNALLED, plugin_name, plugin)
            self.hub.journal.forget(OWNERS, plugin_name)
            if owner != self.hub.owners.mine:
                self.hub.journal.keep(OWNERS, plugin_name, owner)

    def _check_owner(self, kind: str, name: str) -> None:
        """Raise PermissionError where a plugin of this name is another's than the present caller's."""
        theirs = self.owners.get((kind, name), self.hub.owners.calling())
        if theirs != self.hub.owners.calling() and not self.hub.owners.rules():
            raise PermissionError(
                f"the {kind} plugin {name!r} belongs to {theirs!r}, and stays as it is: give yours another name"
            )

    # -- for clients -------------------------------------------------------------------------------------------------

    async def register(self, kind: str, plugin: bytes, name: str, idempotent: bool = False) -> dict[str, Any] | None:
        """Keep a plugin and give it to all sites; returns worker -> reply, or None for one of schedulers.

        Raises PermissionError where another owner registered one of this name, OpaqueError where the scheduler of a
        site cannot take it: then no site has it.
        """
        self._check_owner(kind, name)
        if idempotent and (kind, name) in self.kept:
            return None if kind == "scheduler" else {}
        owner = self.hub.owners.calling()
        self._journal((kind, name), plugin, owner)
        self._keep((kind, name), plugin, owner)
        try:
            return await self._at_all_sites(kind, name, "register_plugin", plugin=plugin)
        except OpaqueError:
            self._forget((kind, name))
            for site in self.hub.ports:
                self._tell_soon(site)
            raise

    async def unregister(self, kind: str, name: str) -> dict[str, Any] | None:
        """Take a plugin away from all sites; returns worker -> reply, or None for one of schedulers.

        Raises ValueError where no such plugin was registered, PermissionError where another owner did it.
        """
        self._check_owner(kind, name)
        if (kind, name) not in self.kept:
            raise ValueError(f"The {kind} plugin {name} does not exist")
        self._forget((kind, name))
        return await self._at_all_sites(kind, name, "unregister_plugin")

    async def _at_all_sites(self, kind: str, name: str, op: str, **kwargs: Any) -> dict[str, Any] | None:
        ports = dict(self.hub.ports)
        told = [self.told[port.hello.incarnation] for port in ports.values()]
        calls = [self._at_site(*each, kind, name, op, kwargs) for each in zip(ports.values(), told, strict=True)]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        for site, reply in zip(ports, replies, strict=True):
            if isinstance(reply, OSError):
                self._tell_soon(site)
            elif isinstance(reply, BaseException):
                raise reply
        if kind == "scheduler":
            return None
        answered = {site: reply for site, reply in zip(ports, replies, strict=True) if isinstance(reply, dict)}
        return self.hub.fanout.merged(answered)

    async def _at_site(self, port: SitePort, told: Told, kind: str, name: str, op: str, kwargs: dict[str, Any]) -> Any:
        number = self._numbers.get((kind, name))
        async with told.lock:
            reply = await port.call(op, kind=kind, name=name, **kwargs)
            told.taken.pop((kind, name), None)
            if number is not None:
                told.taken[kind, name] = number
        return reply

    # -- sites that join ---------------------------------------------------------------------------------------------

    def site_joined(self, hello: SiteHello) -> None:
        """A site is here: before it gets work, it gets the plugins, and takes part in what is being recorded."""
        told = self.told.setdefault(hello.incarnation, Told())
        if self._numbers != told.taken or self.hub.gateway.observing.recording:
            self._joining[hello.site] = None
            self._tell_soon(hello.site)

    def site_left(self, hello: SiteHello) -> None:
        """A site is gone; if it comes back, it is told all, and has what it has."""
        self._joining.pop(hello.site, None)
        self.told.pop(hello.incarnation, None)

    def holds_back(self, site: str, status: SiteStatus) -> bool:
        """Whether the hub is not to know yet what a site has to offer; it is told once the site has the plugins."""
        if site in self._joining:
            self._joining[site] = status
            return True
        return False

    def _tell_soon(self, site: str) -> None:
        self.hub._ongoing_background_tasks.call_soon(self._tell, site)

    async def _tell(self, site: str) -> None:
        """Tell a site which plugins there are until it has them, or is gone."""
        incarnation = self.hub.ports[site].hello.incarnation if site in self.hub.ports else None
        while (port := self.hub.ports.get(site)) is not None and port.hello.incarnation == incarnation:
            if self._numbers == self.told[incarnation].taken:
                break
            with suppress(OSError):
                await self._agree(site)
                continue
            await asyncio.sleep(RETRY_S)
        else:
            return
        await self.hub.gateway.observing.record_at(site)
        if (status := self._joining.pop(site, None)) is not None:
            self.hub.from_site(site, status)

    async def _agree(self, site: str) -> None:
        port = self.hub.ports[site]
        told = self.told[port.hello.incarnation]
        async with told.lock:
            numbers = dict(self._numbers)
            plugins = [(kind, name, plugin) for (kind, name), plugin in self.kept.items()]
            try:
                await port.call("agree_on_plugins", plugins=plugins)
            except OpaqueError as exc:
                logger.warning("site %s could not take the plugins: %s", site, exc)
            told.taken = numbers
