"""A site's agent as a process of its own: what it is told, in JSON, and how it runs.

::

    {"name": …, "hub": address, "hub_key": "pub-…" or null, "orphan_timeout": seconds or null, "security": …,
     "labels": …, "environments": …, "resources": …, "data": …, "data_binding": …, "directory": …,
     "pickled": …, "forks": …}                  the last two: see ClusterSpec
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskfed.ending import until
from daskfed.errors import SiteLostError
from daskfed.keys import GivenKeys, KeyFolder, parsed

if TYPE_CHECKING:
    from daskfed.profile import SiteOptions
    from daskfed.site.agent import Agent


def spec_of(name: str, hub: str, options: SiteOptions, **more: Any) -> dict[str, Any]:
    """Return what an agent is told; ``more`` are entries of it, such as ``hub_key``."""
    from daskfed.site.clusters import ClusterSpec

    cluster = ClusterSpec.of(options)
    packed = {"pickled": cluster.pickle, "forks": cluster.forks}
    found = options.directory
    directory = None if found is None else str(found if options.remote else found.absolute())
    return {"name": name, "hub": hub, **options.plain(), **packed, "directory": directory, **more}


def agent_of(spec: Mapping[str, Any], find_hub: Callable[[], str] | None = None) -> Agent:
    """Return the agent of a spec, not started; ``find_hub`` returns the hub's address where that may change."""
    from distributed.security import Security

    from daskfed.site.agent import Agent
    from daskfed.site.clusters import ClusterSpec

    directory = spec.get("directory")
    cluster = ClusterSpec(spec["pickled"], Path(directory) if directory else None, forks=spec["forks"])
    return Agent(
        spec["name"], cluster, hub=find_hub or spec["hub"], labels=spec["labels"],
        environments=tuple(spec["environments"]), resources=spec["resources"], data=spec["data"],
        data_binding=spec["data_binding"], directory=directory,
        security=Security(**spec["security"]) if spec.get("security") else None,
        keys=keys_of(spec),
        orphan_timeout_s=spec.get("orphan_timeout"),
    )  # fmt: skip


def keys_of(spec: Mapping[str, Any]) -> KeyFolder | None:
    """Return the keys of a spec for the connection with its hub; None for those that the user has anyway."""
    return GivenKeys(parsed(spec["hub_key"])) if spec.get("hub_key") else None


async def serve(agent: Agent, stop: asyncio.Event, joined: Callable[[], None], ends: Callable[[str], None]) -> None:
    """Start a site, say that it ``joined``, and end it when told to; raises SiteLostError where it cannot go on.

    ``ends`` is told why it ends though nobody asked for it here: the hub did.
    """
    try:
        if await until(stop, _join(agent)):
            joined()
            if await until(stop, agent.finished()) and not agent.failed:
                ends(agent.reason)
    finally:
        await agent.close()
    if agent.failed:
        raise SiteLostError(f"site {agent.name} had to end: {agent.reason}")


async def _join(agent: Agent) -> None:
    await agent.start()
    await agent.joined()
