"""``daskfed profile check|show|template``: what is configured, whether it would work, and how to begin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import yaml

from daskfed.commands import plain_errors
from daskfed.config import hint_for
from daskfed.errors import ConfigurationError, DaskfedError

if TYPE_CHECKING:
    from daskfed.profile import SiteOptions

HIDDEN = "…"


@click.group("profile")
def profile() -> None:
    """Profiles in Dask's configuration: federations with their sites, named once."""


@profile.command("check")
@click.argument("name", required=False)
@plain_errors
def check(name: str | None) -> None:
    """Try each site of a profile: login, Python, versions, Cluster class, and whether it would take jobs."""
    from daskfed.profile import named_profile
    from daskfed.reach.checking import check_hub_of, check_site

    found = named_profile(name)
    wrong = asyncio.run(_shown("hub", check_hub_of(found)))
    for site, options in found.sites.items():
        wrong += asyncio.run(_shown(f"site {site}", check_site(options, found)))
    if wrong:
        raise click.ClickException(f"{wrong} thing{'s' if wrong > 1 else ''} to mend")


async def _shown(what: str, checking: Any) -> int:
    """Show what came out of a check; return how many things are wrong."""
    try:
        facts, problems = await checking
    except (DaskfedError, OSError) as exc:
        facts, problems = "", [str(exc)]
    click.echo(f"{what}: {facts}" if facts else f"{what}:")
    for problem in problems:
        click.echo(f"  wrong: {problem}")
    return len(problems)


@profile.command("show")
@click.argument("name", required=False)
@plain_errors
def show(name: str | None) -> None:
    """Show a profile with all defaults; values that may be secret are left out. Without a name: all names."""
    import dask

    from daskfed.profile import DEFAULT_PROFILE, named_profile, profile_names

    if name is None:
        default = dask.config.get(DEFAULT_PROFILE, None)
        for each in profile_names():
            click.echo(f"{each} (the default)" if each == default else each)
        return
    found = named_profile(name)
    plain = found.model_dump(mode="json", exclude={"sites"}, exclude_none=True)
    plain["sites"] = {site: _plain(options) for site, options in found.sites.items()}
    click.echo(yaml.safe_dump({name: plain}, sort_keys=False, allow_unicode=True), nl=False)


def _plain(options: SiteOptions) -> dict[str, Any]:
    plain = options.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"cluster", "options"})
    return {**plain, "cluster": str(options.cluster), "options": _without_secrets(options.options)}


def _without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    from daskfed.site.clusters import PLAIN, SECRET

    def is_plain(value: Any) -> bool:
        """Whether it may be shown: a setting within a text, as in lines of a job script, may be of any kind."""
        if isinstance(value, list):
            return all(map(is_plain, value))
        return isinstance(value, PLAIN) and not (isinstance(value, str) and (SECRET.search(value) or "export" in value))

    return {name: value if is_plain(value) and not SECRET.search(name) else HIDDEN for name, value in options.items()}


@profile.command("template")
@click.argument("kind")
@plain_errors
def template(kind: str) -> None:
    """Print a profile to begin with, for a kind of site: local, slurm, pbs, sge, lsf, htcondor, oar, ssh, waiting."""
    from daskfed.reach.templates import TEMPLATES

    if kind not in TEMPLATES:
        raise ConfigurationError(f"no template {kind!r}: {hint_for(kind, list(TEMPLATES), 'there are')}")
    click.echo(TEMPLATES[kind], nl=False)
