"""A hub, and a user whose two sites have workers with the same address: it prints what became of their calls."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from daskfed import Client
from daskfed.hub.server import Hub

SITES = ("north", "south")


class Tally:
    """An actor that knows where it is."""

    name = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self) -> str:
        return self.name


def ask(tally: Any) -> str:
    return str(tally.ask().result(timeout=20))


async def calls(client: Any) -> dict[str, Any]:
    """Make an actor at each site and call both, from here and from tasks at both sites."""
    sites: dict[str, Any] = {}
    while not all(sites.get(site, {}).get("workers") for site in SITES):
        await asyncio.sleep(0.1)
        sites = await client.sites()
    tallies = {site: await client.submit(Tally, site, actor=True, site=site, pure=False) for site in SITES}
    info = await client.scheduler.identity(n_workers=-1)
    return {
        "workers": sorted(info["workers"]),
        "addresses": [tally._address for tally in tallies.values()],
        "called": {site: await tally.ask() for site, tally in tallies.items()},
        "attributes": {site: await tally.name for site, tally in tallies.items()},
        "from tasks": {
            f"{there} from {here}": await client.submit(ask, tally, site=here, pure=False)
            for there, tally in tallies.items()
            for here in SITES
        },
    }


async def main(address: str) -> None:
    """Start a hub, say where, wait for the sites, and say what was found."""
    hub = await Hub().start_at(address)
    print("HUB", hub.address, flush=True)
    async with asyncio.timeout(80), Client(hub.address, asynchronous=True) as client:
        print("RESULT", json.dumps(await calls(client)), flush=True)
    await hub.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
