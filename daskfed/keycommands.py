"""``daskfed keys …`` and ``daskfed site share``: the key files of this user."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click
from dask.utils import parse_timedelta

from daskfed.commands import plain_errors
from daskfed.errors import KeyFileError
from daskfed.keys import Authorized, KeyFolder, moment, owner_named, parsed, roles_named, written

NAMES = click.Choice(["id", "hub"])


@click.group("keys")
def keys() -> None:
    """Keys of zmq:// connections: your own, those of hubs that you trust, and those that your hub lets in."""


@keys.command("new")
@click.argument("name", type=NAMES, default="id")
@plain_errors
def new(name: str) -> None:
    """Make your key, or with "hub" that of a hub that you run, and print its public half."""
    folder = KeyFolder()
    click.echo(written(folder.new(name).public))
    click.echo(f"the secret half is {folder.path / name}.secret: give it to nobody", err=True)


@keys.command("show")
@click.argument("name", type=NAMES, default="id")
@plain_errors
def show(name: str) -> None:
    """Print the public half of your key, or of your hub's."""
    folder = KeyFolder()
    pair = folder.own(name)
    if pair is None:
        raise KeyFileError(f"{folder.path} has no key {name!r}: daskfed keys new {name} makes one")
    click.echo(written(pair.public))


@keys.command("authorize")
@click.argument("key")
@click.option("--owner", required=True, help="the user for whom its holder acts")
@click.option("--role", "roles", default="client+site", show_default=True, help="client, site, admin; join with +")
@click.option("--expires", help="when it ends: a time such as 2027-01-31T12:00, or from now, as 30d or 12h")
@plain_errors
def authorize(key: str, owner: str, roles: str, expires: str | None) -> None:
    """Have your hub let in a public key; at once, also if it runs."""
    ends = None if expires is None else _ends(expires)
    KeyFolder().authorize(Authorized(parsed(key), roles_named(roles), owner_named(owner), ends))


@keys.command("revoke")
@click.argument("which")
@plain_errors
def revoke(which: str) -> None:
    """Have your hub let in a public key, or all keys of an owner, no more; their connections end at once."""
    for entry in KeyFolder().revoke(which):
        click.echo(f"{written(entry.public)} of {entry.owner} is let in no more")


@keys.command("list")
@plain_errors
def listed() -> None:
    """Show whom your hub lets in, and which hubs you trust."""
    folder, now = KeyFolder(), datetime.now(UTC)
    for entry in folder.authorized().values():
        click.echo(entry.line() + ("" if entry.valid(now) else "  (expired)"))
    for address, public in folder.hubs().items():
        click.echo(f"{written(public)} hub {address}")


@keys.command("trust")
@click.argument("address")
@click.argument("key")
@plain_errors
def trust(address: str, key: str) -> None:
    """Trust the hub at an address if it has this public key."""
    KeyFolder().trust(address, parsed(key))


@click.command("share")
@click.argument("which")
@click.option("--with", "whom", multiple=True, required=True, help='an owner, or "*" for everybody; may be repeated')
@click.option("--stop", is_flag=True, help="serve them no more")
@plain_errors
def share(which: str, whom: tuple[str, ...], stop: bool) -> None:
    """Have the sites of an owner, or the one with a public key, serve others as well; at the hub's machine."""
    names = [name if name == "*" else owner_named(name) for name in whom]
    for entry in KeyFolder().share(which, names, shared=not stop):
        click.echo(entry.line())


def _ends(text: str) -> datetime:
    """Return a time that is given as such, or as how long from now."""
    try:
        return datetime.now(UTC) + timedelta(seconds=float(parse_timedelta(text)))
    except (ValueError, KeyError):
        return moment(text)
