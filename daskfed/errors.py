"""Every error that daskfed raises by itself; a message says what was wrong, where, and what to do next."""

from __future__ import annotations

import functools
from typing import Any

from distributed.scheduler import KilledWorker


class DaskfedError(Exception):
    """Base of all errors of daskfed."""


class ConfigurationError(DaskfedError, ValueError):
    """A profile, an option or an argument is wrong."""


class KeyFileError(ConfigurationError):
    """A key file cannot be read, or has something in it that is no key."""


class UnknownSiteError(ConfigurationError):
    """A constraint names a site, a label or an environment that no site of the federation has."""


class UnknownWorkerError(ConfigurationError):
    """``workers=`` names a worker that no site has, or one that several sites have."""


class MissingPackageError(ConfigurationError, ModuleNotFoundError):
    """A function is of a package that no site has at which it may run."""

    def __init__(self, message: str, *, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(MissingPackageError, name=self.name), self.args


class NotCacheable(ConfigurationError, TypeError):
    """A result cannot be kept for later runs: what it is made from cannot be told from something else."""


class ConnectionRefused(DaskfedError, ConnectionError):
    """The hub refused a client or a site: wrong version, a name in use, no credentials."""


class SiteStartError(DaskfedError, RuntimeError):
    """The Cluster class of a site could not be imported, rejected its options, or did not start."""


class SiteLostError(DaskfedError, RuntimeError):
    """Something that cannot be recomputed was at a site that is gone."""


class KilledSite(DaskfedError, KilledWorker):
    """A task was given up: each time it was tried, the workers or the site that ran it died."""

    def __init__(self, reason: str) -> None:
        Exception.__init__(self, reason)

    def __str__(self) -> str:
        return f"{self.args[0]}. Look into the logs of those workers; often a task needs more memory than they have."


class ActorCallError(DaskfedError, RuntimeError):
    """An actor could not be called: its worker is gone, or cannot be reached."""


class CancelledKeyError(DaskfedError):
    """A task needed a key that somebody cancelled."""


class TransferError(DaskfedError, OSError):
    """A key could not be moved from one site to another."""


class IllegalTransition(DaskfedError, AssertionError):
    """A block or key was asked to make a move that its transition table does not have: a bug in daskfed."""


class KeyClash(DaskfedError, ValueError):
    """Two graphs use one key for different things."""
