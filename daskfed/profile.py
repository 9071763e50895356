"""What a user may say of a site, checked: a typo is an error that names what was meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daskfed.config import DEFAULT_CLUSTER, hint_for
from daskfed.errors import ConfigurationError


class SiteOptions(BaseModel):
    """One site of a federation, as written in ``Federation(sites={name: options})`` or on the command line."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    cluster: Any = Field(default=DEFAULT_CLUSTER, description="a Dask Cluster class, or its dotted name")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of the Cluster class")
    labels: dict[str, str] = Field(default_factory=dict, description="name=value pairs that at() can select")
    environments: list[str] = Field(default_factory=lambda: ["default"], description="environments of its workers")
    resources: dict[str, float] = Field(default_factory=dict, description="the most that one worker offers")
    directory: Path | None = Field(default=None, description="working directory of its workers")


def site_options(name: str, given: Mapping[str, Any]) -> SiteOptions:
    """Return the checked options of the site ``name``; raises ConfigurationError naming the site and the option."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(f"{name!r} cannot name a site: use letters, digits, '-', '_' and '.'")
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"site {name!r}: expected a dict of options, got {given!r}")
    try:
        options = SiteOptions.model_validate(dict(given))
    except ValidationError as exc:
        raise ConfigurationError(f"site {name!r}: " + "; ".join(map(_in_words, exc.errors()))) from None
    if options.directory is not None and not options.directory.is_dir():
        raise ConfigurationError(f"site {name!r}: there is no directory {str(options.directory)!r}; create it first")
    return options


def _in_words(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"option {name!r}: {error['msg']}"
    hint = hint_for(name, list(SiteOptions.model_fields), "options are")
    return f"unknown option {name!r}; {hint} (keywords of the Cluster class go into 'options')"
