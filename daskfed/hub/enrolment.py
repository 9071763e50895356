"""Letting in the keys of sites: with a token, once, or because who asks may have sites."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed.comm.core import Comm

from daskfed.errors import KeyFileError
from daskfed.hub.peers import key_holder
from daskfed.keys import Authorized, KeyFolder, Role, parsed
from daskfed.reach.tokens import enrolled


async def enrol(comm: Comm, public: str) -> dict[str, Any]:
    """Let in the key of a site from now on, for the owner of the key at the other end, as long as that one.

    Returns the site's name and options where that key is a token's; ``{"error": why}`` where it cannot be. Raises
    PermissionError for somebody who may not: who has no key, or one that is a site's only.
    """
    if (who := key_holder(comm)) is None:
        raise PermissionError("who has sites let in must have shown a key: connect over zmq://")
    if Role.JOIN not in who.roles and not (who.may(Role.SITE) and who.may(Role.CLIENT)):
        raise PermissionError(f"the key of {who.owner!r} must be let in as client and site, to have sites let in")
    try:
        return await asyncio.to_thread(_enrol, KeyFolder(), who, public)  # others may have the files locked
    except KeyFileError as exc:
        return {"error": str(exc)}


def _enrol(folder: KeyFolder, who: Authorized, public: str) -> dict[str, Any]:
    if Role.JOIN in who.roles:
        return enrolled(folder, who.public, parsed(public))
    folder.admit(Authorized(parsed(public), frozenset({Role.SITE}), who.owner, who.expires))
    return {}
