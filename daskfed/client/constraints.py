"""Where and how tasks may run: ``with at("north"):`` and what it leaves on a collection.

A constraint is a set of Dask annotations: Dask's own (workers, allow_other_workers, resources, retries, priority) and
two of ours, ``sites`` (a tuple of names and labels) and ``environment`` (a name). ``at`` sets them,
:func:`constraint_of` reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import dask
from distributed.client import default_client

from daskfed.client import hooks
from daskfed.errors import ConfigurationError, UnknownSiteError
from daskfed.messages import WORKER_SCHEME, Constraint

EMPTY = Constraint()
SCHEMES = ("tcp", "tls", "inproc")  # that a worker may be reached by at its site

SiteChoice: TypeAlias = Callable[[Mapping[str, Any]], Iterable[str] | str]
Sites: TypeAlias = str | Iterable[str] | SiteChoice | None

_DASK_NAMES = {"restrictions": "workers", "loose_restrictions": "allow_other_workers"}  # older names, still understood
CONSTRAINING = frozenset(
    ("sites", "environment", "workers", "allow_other_workers", "resources", "retries", "priority", *_DASK_NAMES)
)

_sites_lookup: Callable[[], Mapping[str, Any]] | None = None


def set_sites_lookup(function: Callable[[], Mapping[str, Any]] | None) -> None:
    """Set what ``at(callable)`` calls to learn the current sites; None goes back to Dask's current client."""
    global _sites_lookup
    _sites_lookup = function


@contextmanager
def at(
    sites: Sites = None,
    *,
    environment: str | None = None,
    workers: Any = None,
    allow_other_workers: bool | None = None,
    resources: Mapping[str, float] | None = None,
    retries: int | None = None,
    priority: int | None = None,
    **annotations: Any,
) -> Iterator[None]:
    """Constrain the tasks of every collection built inside: ``with at("north"): ds = xr.open_zarr(path)``.

    ``sites`` is a site's name, a label ``"name=value"`` (the hub evaluates it, also for sites that join later), several
    of these (any of them will do), or a function that gets what ``client.sites()`` returns and gives names: it is
    called once, now. Other annotations are passed on as ``dask.annotate`` does. Inside another ``at``, what is given
    here replaces what was given there, field by field.

    Raises ConfigurationError for a name that is not one, UnknownSiteError where the function gives no known site.
    """
    fields = {
        "sites": None if sites is None else _chosen(sites),
        "environment": None if environment is None else environment_name(environment),
        "workers": workers,
        "allow_other_workers": allow_other_workers,
        "resources": None if resources is None else dict(resources),
        "retries": retries,
        "priority": priority,
        **annotations,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    if not given:
        raise ConfigurationError('at() was given nothing: name a site, at("north"), or another constraint')
    hooks.install()
    with dask.annotate(**given):
        yield


def site_selectors(value: Any) -> tuple[str, ...]:
    """Return site names and labels as a tuple without repetitions, from one of them or several.

    Raises ConfigurationError where one is not a string, is empty, or is a label without a name or a value.
    """
    if isinstance(value, str):
        value = (value,)
    elif isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    elif not isinstance(value, (list, tuple)):
        raise ConfigurationError(f"a site is given by name, as a str or several of them, not as {value!r}")
    if not value:
        raise ConfigurationError("an empty list of sites allows no site at all; leave it out to allow every one")
    return tuple(dict.fromkeys(map(_selector, value)))


def environment_name(value: Any) -> str:
    """Return the name of an environment; raises ConfigurationError where it is not a non-empty string."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"an environment is given by its name, a non-empty str, not as {value!r}")
    return value.strip()


def constraint_of(annotations: Mapping[str, Any]) -> Constraint:
    """Return the constraint that annotations of one task express; others than constraints are left alone.

    Workers given by their addresses across sites (``fed://site/host:port``) bind to their sites as well.

    Raises ConfigurationError where a value is of the wrong type.
    """
    given = {_DASK_NAMES.get(name, name): value for name, value in annotations.items() if value is not None}
    given = {name: _READERS[name](name, value) for name, value in given.items() if name in _READERS}
    if "workers" in given and "sites" not in given and not given.get("allow_other_workers"):
        given["sites"] = _sites_of(given["workers"])
    return Constraint(**given) if given else EMPTY


def annotations_of(constraint: Constraint) -> dict[str, Any]:
    """Return the part of a constraint that a site's own Dask scheduler understands, as annotations."""
    given: dict[str, Any] = {}
    if constraint.workers:
        given["workers"] = [name for worker in constraint.workers for name in _names_at_site(worker)]
        if constraint.allow_other_workers:
            given["allow_other_workers"] = True
    if constraint.resources:
        given["resources"] = dict(constraint.resources)
    if constraint.retries:
        given["retries"] = constraint.retries
    if constraint.priority:
        given["priority"] = constraint.priority
    return given


def _chosen(sites: Any) -> tuple[str, ...]:
    if not callable(sites):
        return site_selectors(sites)
    known = _current_sites()
    names = sites(known)
    if not names:
        raise UnknownSiteError(f"{sites!r} chose no site; there are {_listed(known)}")
    selected = site_selectors(list(names) if not isinstance(names, str) else names)
    unknown = [name for name in selected if name not in known]
    if unknown:
        raise UnknownSiteError(f"{sites!r} chose {_listed(unknown)}, but there are {_listed(known)}")
    return selected


def _current_sites() -> Mapping[str, Any]:
    lookup = _sites_lookup or _sites_of_default_client
    sites = lookup()
    if inspect.isawaitable(sites):
        close = getattr(sites, "close", None)
        if close is not None:  # else Python complains later that it was never awaited
            close()
        raise ConfigurationError(
            "at(function) cannot ask an asynchronous client for its sites; "
            "call the function yourself: at(function(await client.sites()))"
        )
    return sites


def _sites_of_default_client() -> Mapping[str, Any]:
    try:
        client = default_client()
    except ValueError as exc:
        raise ConfigurationError("at(function) needs a current client: create daskfed.Client() first") from exc
    if not hasattr(client, "sites"):
        raise ConfigurationError("at(function) needs a daskfed.Client; the current client is of stock Dask")
    return client.sites()  # type: ignore[no-any-return]


def _selector(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"a site is given by its name or by a label 'name=value', not as {value!r}")
    name, equals, wanted = value.strip().partition("=")
    if equals and not (name.strip() and wanted.strip()):
        raise ConfigurationError(f"a label is written 'name=value', not {value!r}")
    return f"{name.strip()}={wanted.strip()}" if equals else name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, names))) or "no sites"


def _workers(name: str, value: Any) -> tuple[str, ...]:
    return (str(value),) if isinstance(value, (str, int)) else tuple(map(str, value))


def _sites_of(workers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sites of workers that are all given by their addresses across sites; nothing if one is not."""
    if not all(worker.startswith(WORKER_SCHEME) for worker in workers):
        return ()
    return tuple(dict.fromkeys(worker.removeprefix(WORKER_SCHEME).split("/")[0] for worker in workers))


def _names_at_site(worker: str) -> list[Any]:
    """Return what the scheduler of its site may know a worker as; names that no worker has do no harm there."""
    if worker.startswith(WORKER_SCHEME):
        address = worker.removeprefix(WORKER_SCHEME).partition("/")[2]
        return [f"{scheme}://{address}" for scheme in SCHEMES]
    return [int(worker), worker] if worker.isdecimal() else [worker]


def _resources(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"resources are given as a dict of name and amount, not as {value!r}")
    return tuple(sorted((str(key), float(amount)) for key, amount in value.items()))


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(f"{name} is a whole number, not {value!r}") from exc


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "sites": lambda name, value: site_selectors(value),
    "environment": lambda name, value: environment_name(value),
    "workers": _workers,
    "allow_other_workers": lambda name, value: bool(value),
    "resources": _resources,
    "retries": _whole,
    "priority": _whole,
}
