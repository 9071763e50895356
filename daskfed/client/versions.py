"""Whether a site can open what this process pickles, judged by the versions that the site reports. No I/O.

As in Dask, other versions of dask and distributed give a warning. Functions pickled by one Python cannot be opened by
another, so the hub keeps work from such sites, and work that names only such sites is an error.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from daskfed.messages import Constraint

PYTHON = ".".join(platform.python_version_tuple()[:2])
PACKAGES = ("dask", "distributed", "daskfed")


def differences(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what differs between sites and this process, a line for each site and package."""
    mine = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return [
        f"{package} is {theirs} at site {site!r} and {mine[package]} here"
        for site, facts in sites.items()
        for package, theirs in sorted(facts["versions"].items())
        if package in mine and (foreign(facts) if package == "python" else theirs != mine[package])
    ]


def foreign(facts: Mapping[str, Any]) -> bool:
    """Say whether a site runs another Python, micro versions aside."""
    theirs = facts["versions"].get("python", PYTHON)
    return bool(theirs.split(".")[:2] != PYTHON.split("."))


def unopened(constraint: Constraint, sites: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why nothing that is constrained so can run, in words: each site that it allows runs another Python."""
    if constraint.environment is not None:
        return None
    allowed = allowed_sites(constraint.sites, sites)
    if not allowed or not all(foreign(sites[name]) for name in allowed):
        return None
    found = ", ".join(f"{name!r} runs {sites[name]['versions']['python']}" for name in allowed)
    return (
        f"functions pickled here, by Python {PYTHON}, cannot be opened there: site {found}; use the same minor version "
        "of Python here and there, or name another site or an environment"
    )


def allowed_sites(selectors: Collection[str], sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the sites that names and labels select; all where there are none."""
    return [name for name, facts in sites.items() if _allows(selectors, name, facts["labels"])]


def _allows(selectors: Iterable[str], name: str, labels: Mapping[str, str]) -> bool:
    given = {name, *(f"{label}={value}" for label, value in labels.items())}
    return not selectors or not given.isdisjoint(selectors)
