"""A hub that sites on other machines reach: where it listens, and how one that waits joins it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from daskfed.errors import ConfigurationError
from daskfed.hub.peers import own_user
from daskfed.profile import SSH
from daskfed.reach.tokens import VALID_S, invite

if TYPE_CHECKING:
    from daskfed.profile import SiteOptions


def tunnelled(sites: Iterable[SiteOptions]) -> bool:
    """Whether a hub has to listen for tunnels: some of its sites are reached over SSH."""
    return any(options.reach.startswith(SSH) for options in sites)


async def listen_also(hub: Any, address: str) -> str:
    """Have a hub that runs listen at another address; return how others reach it."""
    await hub.listen(address)
    return str(hub.listeners[-1].contact_address)


def command_to_join(site: str, options: SiteOptions, address: str | None, valid_s: float = VALID_S) -> str:
    """Return the command by which a waiting site joins the hub at an address; raises ConfigurationError without one."""
    if address is None:
        raise ConfigurationError(
            f"site {site!r} waits, but its hub listens on this machine only: give the profile "
            "'listen: zmq://HOST:PORT', where the site can dial it"
        )
    if not address.startswith("zmq://"):
        raise ConfigurationError(f"sites join with tokens at a hub's zmq:// address, not at {address}")
    token = invite(site, options.written(), address, own_user(), valid_s)
    return f"daskfed site join {token.text()}"
