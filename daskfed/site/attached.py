"""What the plugins of ours have in common that watch a site's stock scheduler for the agent."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from daskfed.messages import Key


class Attached(SchedulerPlugin):
    """A scheduler's plugin that acts now and then, until the agent's ``client`` goes or the scheduler ends."""

    kind: ClassVar[str]

    def __init__(self, client: str) -> None:
        self.client = client
        self.name = f"daskfed-{self.kind}-{client}"

    def begin(self, scheduler: Any, *timers: tuple[Callable[[], Any], float]) -> None:
        """Call each of ``timers`` every so many seconds from now on."""
        self.scheduler = scheduler
        self._callbacks = [PeriodicCallback(call, seconds * 1000) for call, seconds in timers]
        for callback in self._callbacks:
            callback.start()

    def stop(self) -> None:
        """Call nothing any more."""
        for callback in self._callbacks:
            callback.stop()

    async def close(self) -> None:
        """End with the scheduler; called by it."""
        self.stop()

    def remove_client(self, scheduler: Any, client: str) -> None:
        """End with the agent's client; called by the scheduler."""
        if client == self.client:
            self.stop()
            scheduler.remove_plugin(self.name)

    async def at_workers(self, function: bytes, keys: Collection[Key], workers: Collection[str] | None = None) -> None:
        """Have workers, by default all, call a pickled function with ``keys``; what it returns or raises is dropped."""
        message = {"op": "run", "function": function, "args": pickle.dumps((list(keys),))}
        await self.scheduler.broadcast(msg=message, workers=workers, on_error="ignore")
