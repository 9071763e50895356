"""Letting in the keys of sites: with a token, once, or because who asks may have sites."""

from __future__ import annotations

from typing import Any

from distributed.comm.core import Comm

from daskfed.errors import KeyFileError
from daskfed.hub.peers import key_holder
from daskfed.keys import Authorized, KeyFolder, Role, parsed
from daskfed.reach.tokens import enrolled


async def enrol(comm: Comm, public: str) -> dict[str, Any]:
    """Let in the key of a site from now on, for the owner of the key at the other end.

    Returns the site's name and options where that key is a token's; ``{"error": why}`` where it cannot be. Raises
    PermissionError for somebody without a key.
    """
    if (who := key_holder(comm)) is None:
        raise PermissionError("who has sites let in must have shown a key: connect over zmq://")
    folder = KeyFolder()
    try:
        if Role.JOIN in who.roles:
            return enrolled(folder, who.public, parsed(public))
        folder.admit(Authorized(parsed(public), frozenset({Role.SITE}), who.owner))
    except KeyFileError as exc:
        return {"error": str(exc)}
    return {}
