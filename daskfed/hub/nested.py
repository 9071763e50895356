"""Keys that tasks made at their site with a client of their own: the hub learns of them when others name them.

A task's client (``get_client``, ``worker_client``) talks to its site's scheduler, so what it submits stays there and
the hub does not know it. Its futures may get out: returned by the task, put into a Variable or a Queue, published. Then
the hub *claims* the key: it counts as made by a block that runs where the key is already. From there on it is like any
other, but for one thing: only the task that made it could make it again, so it ends with its site.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from daskfed.hub import events as ev
from daskfed.hub.recovery import is_promise
from daskfed.messages import BlockKind, BlockSpec, Constraint, Key

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

logger = logging.getLogger(__name__)

ANSWER_S = 5.0  # a site that takes longer to say which keys it knows is not waited for
AGAIN_S = (0.05, 0.2, 0.5, 1.0, 2.0)  # pauses before it is looked again for what nobody knows yet
URGENT = 2**31  # the priority of a claim: it takes no time, and what it claims may be released soon


class Nested:
    """Finds and claims keys that tasks made."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._numbers = itertools.count()

    @asynccontextmanager
    async def known(self, keys: Iterable[Key], owner: str) -> AsyncIterator[None]:
        """Look for those of ``keys`` that the hub does not know, and claim what is found, at least while inside."""
        known = self.hub.core.ledger.keys
        unknown = [key for key in dict.fromkeys(keys) if key not in known]
        if not unknown:
            yield
            return
        holder = f"finder-{next(self._numbers)}"
        found = await self._claim_what_is_found(unknown, holder, owner)
        try:
            yield
        finally:
            self.hub.take(ev.KeysReleased(holder, tuple(found)))
        if missing := [key for key in unknown if key not in found]:
            self.hub.in_background(self._look_again, missing, owner)

    async def _claim_what_is_found(self, keys: Collection[Key], holder: str, owner: str) -> list[Key]:
        claimed: list[Key] = []
        for site, there in (await self._find(keys, owner)).items():
            if nobody_makes := list(filter(self._nobody_makes, there)):
                self.claim(site, nobody_makes, holder, owner)
                claimed += nobody_makes
        return claimed

    def _nobody_makes(self, key: Key) -> bool:
        state = self.hub.core.ledger.keys.get(key)
        return state is None or is_promise(state)

    async def _look_again(self, keys: list[Key], owner: str) -> None:
        """Look for keys that somebody wants: a task's client may have named one before its scheduler heard of it."""
        known = self.hub.core.ledger.keys
        for pause in AGAIN_S:
            await asyncio.sleep(pause)
            keys = [key for key in keys if key in known and self._nobody_makes(key)]
            if not keys:
                return
            holder = f"finder-{next(self._numbers)}"
            found = await self._claim_what_is_found(keys, holder, owner)
            self.hub.take(ev.KeysReleased(holder, tuple(found)))

    async def _find(self, keys: Collection[Key], owner: str) -> dict[str, list[Key]]:
        """Return site -> those of ``keys`` that its scheduler knows, each at one site; its agent holds them now.

        Sites whose tasks are another owner's, or of several, are not asked: what is found there might be another's.
        """
        owners = self.hub.owners
        ports = {name: p for name, p in self.hub.ports.items() if p.connected and owners.alone_at(name, owner)}
        calls = [asyncio.wait_for(port.call("find_keys", keys=list(keys)), ANSWER_S) for port in ports.values()]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        homes: dict[Key, str] = {}
        for site, reply in zip(ports, replies, strict=True):
            if isinstance(reply, BaseException):
                logger.warning("site %s did not say which keys its tasks made: %s", site, reply)
                continue
            for key in reply:
                homes.setdefault(key, site)
        found: dict[str, list[Key]] = defaultdict(list)
        for key, site in homes.items():
            found[site].append(key)
        return found

    def claim(self, site: str, keys: Collection[Key], holder: str, owner: str) -> None:
        """Count ``keys``, which the scheduler of a site knows, as made there, and want them for ``holder``."""
        spec = BlockSpec(
            id=f"nested/{site}/{self.hub.core.ledger.epoch}/{next(self._numbers)}",
            client=holder,
            owner=owner,
            kind=BlockKind.NESTED,
            inputs=(),
            outputs=tuple(keys),
            ntasks=len(keys),
            prefixes=(),
            constraint=Constraint(sites=(site,), priority=URGENT),
            label=f"made by tasks at {site}",
            stateful=True,
        )
        payload: dict[str, Any] = {"claim": True}
        self.hub.stores.keep_payloads((spec,), (payload,))
        self.hub.take(ev.BlocksSubmitted(holder, (spec,), spec.outputs, wait=True))
