"""Which profile of Dask's configuration a client is made from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import dask
import distributed

from daskfed.profile import DEFAULT_PROFILE, Profile, named_profile
from daskfed.reach.runs import hub_in_background

OF_CLIENTS = frozenset(inspect.signature(distributed.Client.__init__).parameters) - {"self", "kwargs"}
"""Keywords of any client; others are for the LocalCluster that it starts."""


def profile_for(address: Any, name: str | None, kwargs: Mapping[str, Any]) -> Profile | None:
    """Return the profile that is named, or the default one where nothing says what to connect to or to start.

    Where it is up (``daskfed up``), its hub is the one that runs.

    Raises TypeError where something else says so as well, ConfigurationError where something is wrong in the profile.
    """
    given = {"address": address, "scheduler_file": kwargs.get("scheduler_file")}
    others = [word for word, value in given.items() if value is not None]
    others += sorted(kwargs.keys() - OF_CLIENTS)
    if name is not None:
        if others:
            raise TypeError(
                f"profile= does not go with {', '.join(others)}: the profile says what is started, and where"
            )
        return _found(name)
    default = dask.config.get(DEFAULT_PROFILE, None)
    if others or dask.config.get("scheduler-address", None) or not default:
        return None
    return _found(default)


def _found(name: str) -> Profile:
    """Return a profile; of one that is up (``daskfed up``), the hub is the one that runs."""
    found = named_profile(name)
    if found.embedded and (address := hub_in_background(name)) is not None:
        return found.model_copy(update={"hub": address})
    return found
