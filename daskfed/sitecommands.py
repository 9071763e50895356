"""``daskfed up``, ``daskfed down`` and ``daskfed site …``: what of a profile runs in the background."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daskfed.commands import guarded, plain_errors
from daskfed.config import hint_for
from daskfed.errors import ConfigurationError, DaskfedError
from daskfed.reach.runs import Run, Start, hub_in_background, running

if TYPE_CHECKING:
    from daskfed.profile import Profile
    from daskfed.reach.background import Background

OF_PROFILE = click.option("--profile", "profile_name", help="by default daskfed.default-profile")
JOINED = "joined"


# -- a whole profile ---------------------------------------------------------------------------------------------------


@click.command("up")
@click.argument("profile", required=False)
@plain_errors
def up(profile: str | None) -> None:
    """Start the hub and the sites of a profile in the background; Client(profile=…) then uses them."""
    from daskfed.reach.background import Background  # what the forks need is imported before them, once
    from daskfed.site.agent import Agent  # noqa: F401

    began = time.monotonic()
    name, found = _profile(profile)
    background = Background(name, found)
    with Run("profiles", name).alone():
        if found.embedded and background.hub.pid() is None:
            addresses = background.start_hub().report()["addresses"]
            click.echo(f"hub of {name} at {', '.join(addresses.values())} ({_since(began)})")
        failed = _start_sites(background, list(found.sites), began)
    if failed:
        raise click.ClickException(
            f"{', '.join(failed)} did not start; the rest of {name} runs: daskfed down {name} ends it"
        )
    click.echo(f"{name} is up after {_since(began)}: Client(profile={name!r}) uses it, daskfed down {name} ends it")


@click.command("down")
@click.argument("profile", required=False)
@plain_errors
def down(profile: str | None) -> None:
    """End what of a profile runs in the background: its sites, their jobs, and its hub."""
    from daskfed.reach.background import Background

    name, found = _profile_or_what_is_left(profile)
    background = Background(name, found)
    with Run("profiles", name).alone():
        known = sorted({*found.sites, *running("profiles", name, "sites")})
        with ThreadPoolExecutor() as pool:
            ended = dict(zip(known, pool.map(lambda site: _stopped(background, site), known), strict=True))
        failed = [site for site in known if not ended[site]]
        if background.stop_hub():
            click.echo(f"the hub of {name} has ended")
    if failed:
        raise click.ClickException(f"{', '.join(failed)} could not be ended; each ends by itself without a hub")


def hub_of(profile: str | None) -> str:
    """Return the address of the hub of a profile that is up; raises ConfigurationError."""
    from daskfed.reach.background import Background

    return Background(*_profile(profile)).addresses()["local"]


def _start_sites(background: Background, sites: list[str], began: float) -> list[str]:
    """Start sites side by side, tell how that goes, and return those that did not start."""
    starting: dict[str, Start] = {}
    failed = []
    for site in sites:
        try:
            if background.profile.sites[site].reach == "waiting":
                _tell_how_to_join(background, site)
            elif background.site(site).pid() is not None:
                click.echo(f"site {site} runs already")
            else:
                starting[site] = background.start_site(site)
        except (DaskfedError, OSError) as exc:
            failed.append(_told(site, exc))
    for site, start in starting.items():
        try:
            start.report()
            click.echo(f"site {site} joined ({_since(began)})")
        except (DaskfedError, OSError) as exc:
            failed.append(_told(site, exc))
    return failed


def _told(site: str, exc: Exception) -> str:
    click.echo(f"site {site} did not start: {exc}", err=True)
    return site


def _tell_how_to_join(background: Background, site: str) -> None:
    from daskfed.reach.hubs import sites_of

    there = asyncio.run(sites_of(background.addresses()["local"]))
    if site in there:
        click.echo(f"site {site} is connected already")
    else:
        command = background.invitation(site)
        click.echo(f"site {site} is waited for; run there, once, within a day (an earlier command is void):\n")
        click.echo(f"    {command}\n")


def _stopped(background: Background, site: str) -> bool:
    try:
        if background.stop_site(site):
            click.echo(f"site {site} has ended")
    except (DaskfedError, OSError) as exc:
        click.echo(f"site {site}: {exc}", err=True)
        return False
    return True


# -- one site ----------------------------------------------------------------------------------------------------------


@click.command("start")
@click.argument("name")
@OF_PROFILE
@plain_errors
def start(name: str, profile_name: str | None) -> None:
    """Start one site of a profile in the background."""
    from daskfed.reach.background import Background

    began = time.monotonic()
    profile, found = _profile(profile_name)
    _known(name, found)
    background = Background(profile, found)
    with Run("profiles", profile).alone():
        background.addresses()
        if _start_sites(background, [name], began):
            sys.exit(1)


@click.command("stop")
@click.argument("name")
@OF_PROFILE
@plain_errors
def stop(name: str, profile_name: str | None) -> None:
    """End one site of a profile, or one that has joined from here with a token."""
    from daskfed.reach.background import Background

    joined = Run(JOINED, name)
    if profile_name is None and joined.read("spec") is not None:
        _tell_stopped(name, joined.stop())
        return
    profile, found = _profile_of_site(name, profile_name)
    with Run("profiles", profile).alone():
        _tell_stopped(name, Background(profile, found).stop_site(name))


def _tell_stopped(site: str, ran: bool) -> None:
    click.echo(f"site {site} has ended" if ran else f"site {site} does not run in the background here")


@click.command("logs")
@click.argument("name")
@OF_PROFILE
@click.option("-n", "--lines", default=50, show_default=True, help="so many of the last lines")
@click.option("-f", "--follow", is_flag=True, help="go on with what is written, until Ctrl-C")
@plain_errors
def logs(name: str, profile_name: str | None, lines: int, follow: bool) -> None:
    """Show what a site has logged, wherever it runs."""
    from daskfed.reach.background import Background

    run = Run(JOINED, name)
    if profile_name is not None or not run.log.exists():
        profile, found = _profile_of_site(name, profile_name)
        run = Background(profile, found).site(name)
    reached = run.read("reached") or {}
    if "log" in reached:
        asyncio.run(_remote_log(reached, lines, follow))
    elif not run.log.exists():
        raise click.ClickException(f"site {name} has not run in the background here: there is no {run.log}")
    else:
        os.execvp("tail", ["tail", "-n", str(lines), *(["-f"] if follow else []), str(run.log)])


async def _remote_log(reached: dict[str, Any], lines: int, follow: bool) -> None:
    from daskfed.reach.ssh import Shell

    shell = await Shell.connect(reached["reach"])
    try:
        await shell.show(f"tail -n {lines}{' -f' if follow else ''}", reached["log"])
    finally:
        await shell.close()


@click.command("invite")
@click.argument("name")
@OF_PROFILE
@click.option("--hub", "address", help="address at which the site dials the hub; by default the profile's 'listen'")
@click.option("--valid", default="24h", show_default=True, help="how long the token may be used")
@plain_errors
def invite(name: str, profile_name: str | None, address: str | None, valid: str) -> None:
    """Print the command by which a waiting site joins, once; where the hub runs."""
    from daskfed.profile import duration_s, named_profile, site_options
    from daskfed.reach.background import Background
    from daskfed.reach.listening import command_to_join

    valid_s = guarded(lambda: duration_s(valid))
    if address is not None:
        options = site_options(name, {"reach": "waiting"})
        if profile_name:
            found = named_profile(profile_name)
            _known(name, found)
            options = found.sites[name]
        click.echo(command_to_join(name, options, address, valid_s))
        return
    profile, found = _profile(profile_name)
    _known(name, found)
    click.echo(Background(profile, found).invitation(name, valid_s))


@click.command("join")
@click.argument("token")
@click.option("--detach", is_flag=True, help="go on in the background")
@plain_errors
def join(token: str, detach: bool) -> None:
    """Join a hub with a token, and run the site that it is for; "-": read the token from standard input."""
    from daskfed.reach.joining import joined_spec

    text = sys.stdin.readline() if token == "-" else token
    spec = asyncio.run(joined_spec(text))
    run = Run(JOINED, spec["name"])
    run.write("spec", spec)
    click.echo(
        f"this is site {spec['name']} from now on; daskfed site run {spec['name']} runs it again, without a token"
    )
    _run_joined(run, spec, detach)


@click.command("run")
@click.argument("name")
@click.option("--detach", is_flag=True, help="go on in the background")
@plain_errors
def run(name: str, detach: bool) -> None:
    """Run a site again that has joined from here with a token."""
    _run_joined(*_joined(name), detach)


@click.command("install-service")
@click.argument("name")
@plain_errors
def install_service(name: str) -> None:
    """Have systemd run a site that has joined from here with a token, from each start of the machine on."""
    from daskfed.reach.joining import service_unit, unit_file

    _joined(name)
    file = unit_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(service_unit(name))
    click.echo(f"wrote {file}; now do:\n")
    click.echo(f"    systemctl --user daemon-reload && systemctl --user enable --now {file.name}")
    click.echo("    loginctl enable-linger    # so that it runs while you are not logged in")


@click.command("end", hidden=True)
@click.argument("run_name")
@click.option("--json", "as_json", is_flag=True)
def end(run_name: str, as_json: bool) -> None:
    """End an agent that somebody has started here over SSH."""
    place = Run(JOINED, run_name)
    ran = place.stop()
    place.remove()
    click.echo("\n" + json.dumps({"ran": ran}) if as_json else f"{run_name} {'has ended' if ran else 'did not run'}")


COMMANDS = (start, stop, logs, invite, join, run, install_service, end)


def start_detached(spec: dict[str, Any]) -> dict[str, Any]:
    """Run an agent in the background, or go on with the one that runs by that name; return what it reports."""
    from daskfed.reach.background import run_agent

    place = Run(JOINED, spec["run"])
    with place.alone():
        pid, before = place.pid(), place.read("spec")
        if pid is not None and _same(before, spec):
            place.write("address", spec["hub"])
            return {"joined": spec["name"], "pid": pid, "folder": str(place.folder), "log": str(place.log)}
        if pid is not None:
            place.stop()
        place.write("spec", spec)
        return place.start(lambda report: run_agent(report, place, spec)).report()


def _same(before: dict[str, Any] | None, spec: dict[str, Any]) -> bool:
    return before is not None and {**before, "hub": ""} == {**spec, "hub": ""}


def _run_joined(place: Run, spec: dict[str, Any], detach: bool) -> None:
    from daskfed.reach.background import run_agent

    if spec["directory"] and not Path(spec["directory"]).is_dir():
        raise ConfigurationError(
            f"there is no directory {spec['directory']!r} here: create it, then daskfed site run {spec['name']}"
        )
    with place.alone():
        if place.pid() is not None:
            raise ConfigurationError(f"site {spec['name']!r} runs already: daskfed site stop {spec['name']} ends it")
        if not detach:
            place.write_own_process()
    if detach:
        told = place.start(lambda report: run_agent(report, place, spec)).report()
        click.echo(f"site {spec['name']} joined {spec['hub']} and goes on in the background; its log is {told['log']}")
        return
    told_once: Callable[[dict[str, Any]], None] = lambda told: click.echo(f"site {told['joined']} joined {spec['hub']}")  # noqa: E731
    try:
        asyncio.run(run_agent(told_once, place, spec))
    finally:
        place.forget("process")


def _joined(name: str) -> tuple[Run, dict[str, Any]]:
    place = Run(JOINED, name)
    spec = place.read("spec")
    if spec is None:
        raise ConfigurationError(f"no site {name!r} has joined from here: daskfed site join TOKEN does that")
    return place, spec


def _profile(name: str | None) -> tuple[str, Profile]:
    """Return a profile and its name; the default one where none is given."""
    import dask

    from daskfed.profile import DEFAULT_PROFILE, named_profile

    found = named_profile(name)
    return str(name or dask.config.get(DEFAULT_PROFILE)), found


def _profile_of_site(site: str, name: str | None) -> tuple[str, Profile]:
    """Return the profile that has a site which has not joined from here, and its name."""
    try:
        profile, found = _profile(name)
    except ConfigurationError as exc:
        if name is not None:
            raise
        raise ConfigurationError(f"no site {site!r} has joined from here; and for one of a profile: {exc}") from exc
    _known(site, found)
    return profile, found


def _profile_or_what_is_left(name: str | None) -> tuple[str, Profile]:
    """Return a profile, or, where it is configured no more but something of it runs, an empty one of its name."""
    from daskfed.profile import Profile

    try:
        return _profile(name)
    except ConfigurationError:
        if name is None or (hub_in_background(name) is None and not running("profiles", name, "sites")):
            raise
        return name, Profile()


def _known(site: str, profile: Profile) -> None:
    if site not in profile.sites:
        raise ConfigurationError(
            f"no site {site!r} in this profile: {hint_for(site, list(profile.sites), 'sites are')}"
        )


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
