"""Placement policies by their names: those of daskfed, and those that plugins register."""

from __future__ import annotations

from importlib.metadata import entry_points

from daskfed.errors import ConfigurationError
from daskfed.hub.placement import POLICIES, Policy


def policy_named(policy: Policy | str | None) -> Policy | None:
    """Return a policy by its name or as given; raises ConfigurationError for a name that nobody registered."""
    if not isinstance(policy, str):
        return policy
    if policy in POLICIES:
        return POLICIES[policy]()
    found = {entry.name: entry for entry in entry_points(group="daskfed.policies")}
    if policy not in found:
        names = ", ".join(sorted({*POLICIES, *found}))
        raise ConfigurationError(f"no placement policy {policy!r}; there are {names}")
    return found[policy].load()()  # type: ignore[no-any-return]
