"""``daskfed cache …``: the results of this user that ``cache=True`` keeps between runs."""

from __future__ import annotations

import click
from dask.utils import format_bytes

from daskfed.commands import plain_errors
from daskfed.config import cache_directory, cache_size
from daskfed.data.memo import Memo


@click.group("cache")
def cache() -> None:
    """Results that calls and graphs with cache=True keep between runs."""


@cache.command("show")
@click.argument("prefix", required=False)
@plain_errors
def show(prefix: str | None) -> None:
    """Say how much is kept, of all functions or of those whose names begin with PREFIX."""
    store = Memo(cache_directory(), cache_size())
    found = store.contents(prefix)
    store.close()
    click.echo(f"{store.folder}: {found.entries} results, {format_bytes(found.nbytes)} of {format_bytes(store.size)}")


@cache.command("clear")
@click.argument("prefix", required=False)
@plain_errors
def clear(prefix: str | None) -> None:
    """Forget all results, or those of functions whose names begin with PREFIX."""
    store = Memo(cache_directory(), cache_size())
    count = store.clear(prefix)
    store.close()
    click.echo(f"{count} results forgotten")
