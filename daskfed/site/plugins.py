"""The plugins of the federation at one site: the agent registers them at its scheduler, which opens them.

The scheduler gives worker and nanny plugins to workers that join it later. The agent remembers what it has registered:
so a hub that started anew, or one that the site comes back to, can say all that there is, and nothing is set up twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeAlias

from daskfed.comm.opaque import OpaqueError

logger = logging.getLogger(__name__)

PluginName: TypeAlias = tuple[str, str]
"""``scheduler``, ``worker`` or ``nanny``, and the name of the plugin."""


class SitePlugins:
    """What of the federation's plugins is registered here; ``ask`` calls an RPC of the site's scheduler."""

    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        self._ask = ask
        self._digests: dict[PluginName, bytes] = {}

    async def register(self, kind: str, name: str, plugin: bytes) -> Any:
        """Register a pickled plugin, in place of one of that name, and return what the scheduler says.

        Raises OpaqueError where the scheduler cannot take it.
        """
        self._digests.pop((kind, name), None)
        reply = await self._ask(f"register_{kind}_plugin", plugin=plugin, name=name, idempotent=False)
        self._digests[kind, name] = _digest(plugin)
        return reply

    async def unregister(self, kind: str, name: str) -> Any:
        """Take a plugin away and return what the scheduler says; raises OpaqueError, also where there is none."""
        self._digests.pop((kind, name), None)
        return await self._ask(f"unregister_{kind}_plugin", name=name)

    async def agree(self, plugins: Collection[tuple[str, str, bytes]]) -> None:
        """Have just these plugins, (kind, name, pickled) in order; one that fails is logged and left out."""
        wanted = {(kind, name) for kind, name, _ in plugins}
        for kind, name in [each for each in self._digests if each not in wanted]:
            await self._try(self.unregister, kind, name)
        for kind, name, plugin in plugins:
            if self._digests.get((kind, name)) != _digest(plugin):
                await self._try(self.register, kind, name, plugin)

    async def _try(self, act: Callable[..., Awaitable[Any]], kind: str, name: str, *plugin: bytes) -> None:
        try:
            await act(kind, name, *plugin)
        except OpaqueError as exc:
            logger.warning("could not %s the %s plugin %r here: %s", act.__name__, kind, name, exc)


def _digest(plugin: bytes) -> bytes:
    return hashlib.sha256(plugin).digest()
