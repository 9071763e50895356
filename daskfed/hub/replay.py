"""Running a task again in the client, to debug it: where its recipe and its inputs come from.

A site's scheduler gives the recipe (Dask's ``run_spec``), which passes unopened. Inputs that the federation knows are
gathered like any results. Others never left the inside of a block: their client submits that part of the block anew;
where the block was a whole graph that nobody materialised, its site makes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from daskfed.comm.opaque import OpaqueError
from daskfed.hub.fanout import answers_errors
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub


class Replay:
    """Answers to clients that want to run a task again by themselves."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        handlers: dict[str, Callable[..., Any]] = {
            "get_error_cause": self.get_error_cause,
            "get_runspec": self.get_runspec,
            "fed_known": self.known,
            "fed_make_again": self.make_again,
        }
        return {op: answers_errors(handler) for op, handler in handlers.items()}

    async def get_error_cause(self, keys: Collection[Key]) -> Key | None:
        """Return the key of the task that is to blame for the failure of the first of ``keys`` that failed."""
        for key in keys:
            told = await self._blamed(key)
            if told:
                return await self._first_cause(key, told)
        return None

    async def _blamed(self, key: Key) -> list[Key]:
        """Return whom the sites blame for the failure of ``key``, each site one."""
        replies = await self.hub.fanout.ask("get_error_cause", self.hub.fanout.everywhere(keys=[key]))
        return [blamed for blamed in replies.values() if blamed is not None]

    async def _first_cause(self, key: Key, told: list[Key]) -> Key:
        """Follow the blame from site to site: where a failed key was only imported, the key itself is blamed."""
        seen = {key}
        while farther := [blamed for blamed in told if blamed not in seen]:
            key = farther[0]
            seen.add(key)
            told = await self._blamed(key)
        return key

    async def get_runspec(self, key: Key) -> Any:
        """Return the recipe of a task, unopened; raises KeyError where no site knows it any more."""
        site = self._made_at(key)
        calls = self.hub.fanout.everywhere(key=key)
        asked = {site: calls[site]} if site in calls else calls
        replies = await self.hub.fanout.ask("get_runspec", asked, keep_errors=True)
        for reply in replies.values():
            if not isinstance(reply, OpaqueError):
                return reply
        raise KeyError(f"no site knows how {key!r} was made any more: keep a future of what depends on it")

    def _made_at(self, key: Key) -> str | None:
        """Return the site where a key was made, as far as the hub knows: elsewhere it may be an import."""
        state = self.hub.core.ledger.keys.get(key)
        block = self.hub.core.ledger.blocks.get(state.producer or "") if state is not None else None
        return block.site if block is not None else None

    async def known(self, keys: Collection[Key]) -> list[Key]:
        """Return those of ``keys`` that the federation knows: a client gathers them like any results."""
        return [key for key in keys if key in self.hub.core.ledger.keys]

    async def make_again(self, key: Key, keys: Collection[Key]) -> dict[Key, Any]:
        """Return the values of ``keys``, which only the site of the task ``key`` knows, unopened.

        Raises TransferError where the site cannot make one again, KeyError where no site knows the task.
        """
        site = await self._site_that_runs(key)
        return await self.hub.ports[site].call("make_again", keys=list(keys))  # type: ignore[no-any-return]

    async def _site_that_runs(self, key: Key) -> str:
        """Return a site whose scheduler knows the task ``key``; raises KeyError where none does."""
        if (site := self._made_at(key)) in self.hub.fanout.everywhere() and site is not None:
            return site
        replies = await self.hub.fanout.ask("get_task_status", self.hub.fanout.everywhere(keys=[key]))
        for site, reply in replies.items():
            if reply[key] is not None:
                return site
        raise KeyError(f"no site knows the task {key!r} any more")
