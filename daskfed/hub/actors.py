"""Calls of actors: they go to the site where the actor was made, and there to its worker.

Worker addresses say nothing across sites: two sites may have workers with the same one. So a call is routed by the
actor's key; the address is for the site's scheduler. A call may take long, so it does not keep a channel of its site:
the agent answers when it is done, with a call of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distributed.protocol import to_serialize

from daskfed.comm.opaque import OpaqueError
from daskfed.errors import ActorCallError, SiteLostError
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

OPS = ("actor_execute", "actor_attribute")


class Actors:
    """The calls of actors that are under way."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._calls: dict[int, tuple[str, asyncio.Future[Any]]] = {}  # ticket -> site, its answer
        self._tickets = itertools.count()

    async def proxy(self, worker: str, msg: Mapping[str, Any], serializers: Any = None) -> Any:
        """Do what an actor is asked, and return its worker's reply; an error is a reply too, as callers expect.

        Raises ValueError for anything but a call or an attribute of an actor.
        """
        if msg.get("op") not in OPS:
            raise ValueError(f"a federation passes on {' and '.join(OPS)} to a worker, not {msg.get('op')!r}")
        try:
            return await self._call(self._home(msg["actor"]), worker, dict(msg))
        except SiteLostError as exc:
            return {"status": "error", "exception": to_serialize(exc)}
        except (OpaqueError, OSError) as exc:
            return {"status": "error", "exception": to_serialize(ActorCallError(f"{msg['actor']!r}: {exc}"))}

    def _home(self, key: Key) -> str:
        """Return the site that made an actor; what other sites hold under its key are references to it."""
        state = self.hub.core.ledger.keys.get(key)
        claims = state.holders if state is not None else {}
        site = next((name for name, why in claims.items() if state and state.producer in why), None)
        if site is None or site not in self.hub.ports:
            raise SiteLostError(f"the actor {key!r} is at no site of the federation: create it again")
        return site

    async def _call(self, site: str, worker: str, msg: dict[str, Any]) -> Any:
        ticket, answer = next(self._tickets), asyncio.get_running_loop().create_future()
        self._calls[ticket] = site, answer
        try:
            await self.hub.ports[site].call("call_actor", ticket=ticket, worker=worker, msg=msg)
            return await answer
        finally:
            del self._calls[ticket]

    def answered(self, site: str, ticket: int, reply: Any) -> None:
        """A site has done a call."""
        home, answer = self._calls.get(ticket, ("", None))
        if answer is not None and home == site and not answer.done():
            answer.set_result(reply)

    def site_gone(self, site: str) -> None:
        """A site is lost: its calls will not be answered."""
        for home, answer in self._calls.values():
            if home == site and not answer.done():
                answer.set_exception(SiteLostError(f"site {site!r} was lost while it called an actor"))
