"""The command line: ``daskfed hub``, ``daskfed site``, ``daskfed status``; also ``dask fed …``."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from daskfed.cachecommands import cache
from daskfed.commands import guarded
from daskfed.config import DEFAULT_CLUSTER, calm, check_listen, parse_labels
from daskfed.dask_private import warn_untested
from daskfed.ending import stop_on_signals, until
from daskfed.errors import ConfigurationError, DaskfedError, SiteLostError
from daskfed.keycommands import keys, share
from daskfed.keys import KeyFolder
from daskfed.profilecommands import profile
from daskfed.reach.agents import agent_of, serve
from daskfed.reach.hubs import check_hub, sites_of
from daskfed.sitecommands import COMMANDS, down, hub_of, start_detached, up

if TYPE_CHECKING:
    from daskfed.profile import SiteOptions


@click.group("fed", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="daskfed")
@click.option("-v", "--verbose", is_flag=True, help="say more on standard error")
def cli(verbose: bool) -> None:
    """Run Dask on many sites at once: the hub, the sites, and what they do."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)


@cli.command()
@click.option("--listen", default="tcp://127.0.0.1:8700", show_default=True, help="address; port 0: any free one")
@click.option("--state", type=click.Path(file_okay=False), help="folder for what must survive a restart")
@click.option("--policy", default="lowest-cost", show_default=True, help="how sites are chosen")
@click.option("--tls-ca-file", type=click.Path(exists=True), help="certificate of the authority")
@click.option("--tls-cert", type=click.Path(exists=True), help="certificate of this hub")
@click.option("--tls-key", type=click.Path(exists=True), help="key of this hub")
def hub(listen: str, state: str | None, policy: str, **tls: str | None) -> None:
    """Run a hub until Ctrl-C."""
    warn_untested()
    security = _security(tls)
    _checked_usage(lambda: check_listen(listen, security, KeyFolder().has_hub_key))
    _run(lambda stop: _run_hub(listen, state, policy, security, stop))


@cli.group(invoke_without_command=True)
@click.option("--name", help="name of the site, unique in the federation")
@click.option("--hub", "hub_address", help="address of the hub")
@click.option("--cluster", default=DEFAULT_CLUSTER, show_default=True, help="a Dask Cluster class")
@click.option("--options", default="{}", help="keywords of the Cluster class, as JSON")
@click.option("--label", "labels", multiple=True, help="name=value; may be repeated")
@click.option("--environment", "environments", multiple=True, help="environment of its workers; may be repeated")
@click.option("--directory", type=click.Path(), help="working directory of its workers")
@click.option("--data", multiple=True, help="path or URL of data that is at the site; may be repeated")
@click.option(
    "--data-binding",
    type=click.Choice(["prefer", "strict"]),
    default="prefer",
    show_default=True,
    help="whether what reads that data may run elsewhere",
)
@click.option("--spec", hidden=True, help="'-': read everything as a JSON line from standard input")
@click.option("--detach", is_flag=True, hidden=True, help="with --spec: go on in the background, and print what became")
@click.option("--tls-ca-file", type=click.Path(exists=True), help="certificate of the authority")
@click.option("--tls-cert", type=click.Path(exists=True), help="certificate of this site")
@click.option("--tls-key", type=click.Path(exists=True), help="key of this site")
@click.pass_context
def site(context: click.Context, /, spec: str | None, detach: bool, **given: Any) -> None:
    """Run a site until Ctrl-C: start its cluster and join the hub."""
    if context.invoked_subcommand is not None:
        return
    security = _security({name: given.pop(name) for name in ("tls_ca_file", "tls_cert", "tls_key")})
    if spec == "-" and detach:
        click.echo("\n" + json.dumps(_reported(lambda: start_detached(json.loads(sys.stdin.readline())))))
        return
    if spec == "-":
        _run(lambda stop: _run_child_site(json.loads(sys.stdin.readline()), stop))
        return
    warn_untested()
    name, address, options = _site_arguments(**given)
    _run(lambda stop: _run_site(name, address, options, security, stop))


for command in (share, *COMMANDS):
    site.add_command(command)
for command in (cache, keys, up, down, profile):
    cli.add_command(command)


@cli.command()
@click.argument("profile", required=False)
@click.option("--hub", "hub_address", help="address of the hub, where no profile names it")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@click.option("--tls-ca-file", type=click.Path(exists=True), help="certificate of the authority")
@click.option("--tls-cert", type=click.Path(exists=True), help="certificate of this client")
@click.option("--tls-key", type=click.Path(exists=True), help="key of this client")
def status(profile: str | None, hub_address: str | None, as_json: bool, **tls: str | None) -> None:
    """Show the sites of a federation and what they do: of a profile that is up, or of the hub at an address."""
    if profile is not None and hub_address is not None:
        raise click.UsageError("name a profile or --hub, not both")
    security = _security(tls)
    sites = guarded(lambda: asyncio.run(sites_of(hub_address or hub_of(profile), security)))
    click.echo(json.dumps(sites, indent=1) if as_json else _table(sites))


def main() -> None:
    """Run the command line."""
    cli(prog_name="daskfed")


# -- what the commands do ----------------------------------------------------------------------------------------------


async def _run_hub(listen: str, state: str | None, policy: str, security: Any, stop: asyncio.Event) -> None:
    from daskfed.hub.server import Hub
    from daskfed.policies import policy_named

    server = await Hub(policy=policy_named(policy), security=security, state=state).start_at(listen)
    click.echo(f"daskfed hub at {server.address}")
    if server.dashboard.link:
        click.echo(f"its page is {server.dashboard.link}")
    await until(stop, server.finished())
    await server.close()


async def _run_site(name: str, hub: str, options: SiteOptions, security: Any, stop: asyncio.Event) -> None:
    from daskfed.site.agent import Agent
    from daskfed.site.clusters import ClusterSpec

    if not await until(stop, check_hub(hub, security, name)):
        return
    agent = Agent(
        name, ClusterSpec.of(options), hub=hub, labels=options.labels, environments=tuple(options.environments),
        resources=options.resources, data=options.data, data_binding=options.data_binding, directory=options.directory,
        security=security, orphan_timeout_s=options.orphan_timeout,
    )  # fmt: skip
    await serve(agent, stop, lambda: click.echo(f"daskfed site {name} joined {hub}"), lambda why: _ends(name, why))


async def _run_child_site(spec: dict[str, Any], stop: asyncio.Event) -> None:
    """Run a site for a parent process: tell it on standard output how the start went, end when it ends."""
    agent = agent_of(spec)
    watching = asyncio.create_task(_stop_without_parent(stop))
    try:
        joined = json.dumps({"joined": spec["name"]})
        await serve(agent, stop, lambda: click.echo(joined), lambda why: _ends(spec["name"], why))
    except SiteLostError:
        raise
    except (DaskfedError, OSError) as exc:  # for the parent to raise
        click.echo(json.dumps({"error": str(exc), "kind": type(exc).__name__}))
    finally:
        watching.cancel()


def _ends(name: str, reason: str) -> None:
    click.echo(f"daskfed site {name} ends: {reason}", err=True)


async def _stop_without_parent(stop: asyncio.Event) -> None:
    """Ask the site to end when standard input does: the process that started it has ended."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop.set()


# -- helpers -----------------------------------------------------------------------------------------------------------


def _run(work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``work`` until it ends or a signal asks it to; a second signal ends the process at once."""

    async def until_told() -> None:
        await work(stop_on_signals())

    calm(tick="250ms", system_monitor="5s")
    guarded(lambda: asyncio.run(until_told()))


def _reported(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns, or the error for who reads it."""
    try:
        return work()
    except (DaskfedError, OSError) as exc:
        return {"error": str(exc), "kind": type(exc).__name__}


def _checked_usage(check: Callable[[], None]) -> None:
    try:
        check()
    except ConfigurationError as exc:
        raise click.UsageError(f"{exc} (--tls-ca-file, --tls-cert and --tls-key)") from None


def _site_arguments(
    name: str,
    hub_address: str,
    cluster: str,
    options: str,
    labels: Any,
    environments: Any,
    directory: str | None,
    **data: Any,
) -> tuple[str, str, SiteOptions]:
    from daskfed.profile import site_options

    if not name or not hub_address:
        raise click.UsageError("a site needs --name and --hub")
    try:
        keywords = json.loads(options)
    except ValueError as exc:
        raise click.UsageError(f"--options is no JSON object: {exc}") from None
    given = {"cluster": cluster, "options": keywords, "directory": directory, **data}
    given |= {"environments": list(environments)} if environments else {}

    def checked() -> SiteOptions:
        return site_options(name, {**given, "labels": parse_labels(labels)})

    return name, hub_address, guarded(checked)


def _security(tls: dict[str, str | None]) -> Any:
    if not any(tls.values()):
        return None
    if not all(tls.values()):
        raise click.UsageError("TLS needs all of --tls-ca-file, --tls-cert and --tls-key")
    from distributed.security import Security

    ca, cert, key = tls["tls_ca_file"], tls["tls_cert"], tls["tls_key"]
    roles = {f"tls_{role}_{part}": file for role in ("scheduler", "client", "worker") for part, file in
             (("cert", cert), ("key", key))}  # fmt: skip
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _table(sites: dict[str, Any]) -> str:
    if not sites:
        return "no sites have joined"
    columns = ("status", "workers", "threads", "running", "queued", "blocks", "held")
    rows = [("site", *columns)] + [(name, *(str(facts[c]) for c in columns)) for name, facts in sites.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
