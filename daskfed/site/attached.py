"""What the plugins of ours have in common that watch a site's stock scheduler for the agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback


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
