"""What the commands share: how they show errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from daskfed.errors import DaskfedError


def guarded(work: Callable[[], Any]) -> Any:
    """Run ``work``; what a user caused ends the process with one line and status 1."""
    try:
        return work()
    except (DaskfedError, OSError) as exc:
        raise click.ClickException(str(exc)) from None


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: what a user caused ends it with one line and status 1."""

    @wraps(command)
    def run(**given: Any) -> None:
        guarded(lambda: command(**given))

    return run
