"""The side of a site that dials in by itself: it joins with a token, and is run again without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from daskfed.dask_private import FatalCommClosedError
from daskfed.errors import ConnectionRefused
from daskfed.keys import KeyFolder, written
from daskfed.profile import site_options
from daskfed.reach.agents import spec_of
from daskfed.reach.hubs import enrol
from daskfed.reach.tokens import Token

UNIT = """\
[Unit]
Description=daskfed site {name}
After=network-online.target

[Service]
ExecStart={command} site run {name}
{environment}Restart=always
RestartSec=30
KillMode=mixed
TimeoutStopSec=60

[Install]
WantedBy=default.target
"""


async def joined_spec(text: str) -> dict[str, Any]:
    """Have this user's key let in with a token; return what the agent of its site is told.

    Raises ConfigurationError for what is no token, ConnectionRefused where it is of no use any more, OSError where the
    hub does not answer.
    """
    token = Token.read(text)
    key = KeyFolder().ensured("id").public
    try:
        told = await enrol(token.hub, key, token.keys)
    except FatalCommClosedError as exc:
        raise ConnectionRefused(
            f"{token.hub} knows this token no more: it was used or taken back, or has expired; ask for another"
        ) from exc
    options = site_options(told["site"], {**told["options"], "reach": "waiting"})
    return spec_of(told["site"], token.hub, options, hub_key=written(token.hub_key))


def service_unit(name: str) -> str:
    """Return a unit of systemd, for one user, that runs a site which has joined from here."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(("DASK_CONFIG", "DASK_DASKFED__"))}
    lines = (f'Environment="{variable}={value}"\n' for variable, value in sorted(ours.items()))
    return UNIT.format(name=name, command=_command(), environment="".join(lines))


def unit_file(name: str) -> Path:
    """Return where that belongs."""
    return Path("~/.config/systemd/user").expanduser() / f"daskfed-{name}.service"


def _command() -> str:
    return f'"{sys.executable}" -m daskfed'
