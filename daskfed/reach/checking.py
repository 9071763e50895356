"""Trying the sites of a profile without starting anything: what is there, and what is wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from daskfed.errors import ConfigurationError
from daskfed.profile import LOCAL, WAITING
from daskfed.reach import probe
from daskfed.reach.hubs import sites_of
from daskfed.reach.sites import PYTHON, environment_problems, python_problems
from daskfed.reach.ssh import Shell
from daskfed.site.clusters import is_address, resolve

if TYPE_CHECKING:
    from daskfed.profile import Profile, SiteOptions

Found = tuple[str, list[str]]


async def check_hub_of(profile: Profile) -> Found:
    """Say what hub a profile has; raises OSError where nobody answers at its address."""
    if profile.embedded:
        return "embedded" + (f", listens at {profile.listen} as well" if profile.listen else ""), []
    sites = await sites_of(profile.hub)
    return f"{profile.hub} answers; its sites: {', '.join(sites) or 'none'}", []


async def check_site(options: SiteOptions, profile: Profile) -> Found:
    """Say what is at a site, and what is wrong; raises SiteStartError where nobody can log in."""
    if options.reach == WAITING:
        problems = [] if profile.listen else ["the profile has no 'listen', so that it cannot dial the hub"]
        if not profile.embedded:
            return f"is invited where the hub runs: daskfed site invite NAME --hub {profile.hub}", []
        return "waits for an agent that dials in; what is there is seen when it has", problems
    asked = {"cluster": _name(options.cluster), "options": options.options, "trial": True}
    if options.reach == LOCAL:
        facts = await asyncio.to_thread(probe.facts, {**asked, "cluster": None})
        return _in_words(facts), [*facts["problems"], *await _local_problems(options)]
    shell = await Shell.connect(options.reach)
    try:
        facts = await shell.facts(options.python or PYTHON, asked)
    finally:
        await shell.close()
    python, found = options.python or PYTHON, f"{options.reach}, {_in_words(facts)}"
    if options.install is not False:
        return f"{found}; daskfed is installed there when it starts", python_problems(facts, python)
    return found, environment_problems(facts, python)


async def _local_problems(options: SiteOptions) -> list[str]:
    if is_address(options.cluster):
        return await _scheduler_problems(options.cluster)
    resolve(options.cluster)
    if isinstance(options.cluster, str):
        return await asyncio.to_thread(probe.cluster_problems, {"cluster": options.cluster, "options": options.options})
    return []


async def _scheduler_problems(address: str) -> list[str]:
    from distributed.core import rpc

    try:
        async with rpc(address, timeout=5) as scheduler:
            await asyncio.wait_for(scheduler.identity(), 5)
    except (OSError, TimeoutError) as exc:
        return [f"no scheduler answers at {address}: {exc}"]
    return []


def _name(cluster: Any) -> str:
    if not isinstance(cluster, str):
        raise ConfigurationError(f"{cluster!r} is no dotted name, which a site on another machine needs")
    return cluster


def _in_words(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("daskfed", "dask", "distributed") if versions[name])
    return f"{facts['host']}: Python {facts['python']}, {known or 'nothing of Dask'}"
