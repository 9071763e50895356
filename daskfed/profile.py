"""What a user may say of sites, checked: a typo is an error that names what was meant.

:class:`SiteOptions` is one site, :class:`Profile` a federation of them, as written below ``daskfed.profiles`` in Dask's
configuration. Names there may be written with ``-`` or ``_``, as everywhere in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import dask
from dask.utils import parse_timedelta
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from daskfed.config import DEFAULT_CLUSTER, hint_for
from daskfed.errors import ConfigurationError
from daskfed.settings import where_set

EMBEDDED = "embedded"
LOCAL, WAITING, SSH = "local", "waiting", "ssh://"
PROFILES = "daskfed.profiles"
DEFAULT_PROFILE = "daskfed.default-profile"
LOOK_S = 1.0  # between two looks of an adaptive cluster, as in Dask

_Model = TypeVar("_Model", bound=BaseModel)


def _seconds(given: Any) -> float:
    try:
        return float(parse_timedelta(given))
    except (KeyError, TypeError, ValueError):
        raise ValueError("Input should be a duration, like '5m' or '30s'") from None


def duration_s(text: str) -> float:
    """Return a duration such as "24h" in seconds; raises ConfigurationError."""
    try:
        return _seconds(text)
    except ValueError as exc:
        raise ConfigurationError(f"{text!r}: {exc}") from None


def _with_hyphens(name: str) -> str:
    return name.replace("_", "-")


class Scale(BaseModel):
    """How many workers a site has, or jobs where its cluster is a batch system's: ``fixed``, or as work needs them."""

    model_config = ConfigDict(extra="forbid", alias_generator=_with_hyphens, populate_by_name=True)

    fixed: int | None = Field(default=None, ge=0, description="so many, always")
    minimum: int | None = Field(default=None, ge=0, description="at least so many, by default 0")
    maximum: int | None = Field(default=None, ge=1, description="at most so many, by default without limit")
    idle_timeout: Annotated[float, BeforeValidator(_seconds)] | None = Field(
        default=None, description="how long one that is not needed stays, like 5m"
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Scale:
        if self.fixed is None and self.maximum is not None and (self.minimum or 0) > self.maximum:
            raise ValueError(f"minimum {self.minimum} is more than maximum {self.maximum}")
        others = {"minimum": self.minimum, "maximum": self.maximum, "idle-timeout": self.idle_timeout}
        given = [name for name, value in others.items() if value is not None]
        if self.fixed is not None and given:
            raise ValueError(f"'fixed' does not go with {', '.join(map(repr, given))}")
        if self.fixed is None and not given:
            raise ValueError("say 'fixed: 4', or 'minimum' and 'maximum'")
        return self

    @property
    def first(self) -> int:
        """How many there are at the start."""
        return self.fixed if self.fixed is not None else self.minimum or 0

    def call(self, jobs: bool) -> tuple[str, dict[str, Any]]:
        """Return the method of a Dask Cluster that does it, and its keywords; ``jobs``: it counts those by name."""
        if self.fixed is not None and jobs:  # to scale is to submit them once, and jobs end
            return "adapt", {"minimum_jobs": self.fixed, "maximum_jobs": self.fixed}
        if self.fixed is not None:
            return "scale", {"n": self.fixed}
        suffix = "_jobs" if jobs else ""
        bounds = {"minimum" + suffix: self.minimum or 0}
        if self.maximum is not None:
            bounds["maximum" + suffix] = self.maximum
        if self.idle_timeout is not None:
            bounds["wait_count"] = max(1, ceil(self.idle_timeout / LOOK_S))
        return "adapt", bounds


def _reach(given: Any) -> Any:
    if given not in (LOCAL, WAITING) and not str(given).startswith(SSH):
        raise ValueError(f"{given!r} is none of local, ssh://[user@]host[:port], waiting")
    return given


class SiteOptions(BaseModel):
    """One site of a federation, as written in ``Federation(sites={name: options})``, in a profile, or for a command."""

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, alias_generator=_with_hyphens, populate_by_name=True
    )

    reach: Annotated[str, BeforeValidator(_reach)] = Field(
        default=LOCAL, description="'local', 'ssh://[user@]host[:port]', or 'waiting' for an agent that dials in"
    )
    python: str = Field(default="", description="over SSH: the Python there that has daskfed, by default python3")
    install: bool | list[str] = Field(
        default=False, description="over SSH: install daskfed there, and the packages that are listed"
    )
    orphan_timeout: Annotated[float, BeforeValidator(_seconds)] | None = Field(
        default=None, description="how long it goes on without a hub, like 1h"
    )
    cluster: Any = Field(
        default=DEFAULT_CLUSTER, description="a Dask Cluster class, its dotted name, or the address of a scheduler"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of the Cluster class")
    scale: Scale | None = Field(default=None, description="how many workers or jobs; by default what the options say")
    labels: dict[str, str] = Field(default_factory=dict, description="name=value pairs that at() can select")
    environments: list[str] = Field(default_factory=lambda: ["default"], description="environments of its workers")
    resources: dict[str, float] = Field(default_factory=dict, description="the most that one worker offers")
    directory: Path | None = Field(default=None, description="working directory of its workers")
    data: list[str] = Field(default_factory=list, description="paths and URLs of data that is at the site")
    data_binding: Literal["prefer", "strict"] = Field(
        default="prefer", description="whether what reads that data may run elsewhere"
    )

    @model_validator(mode="after")
    def _of_others_is_not_scaled(self) -> SiteOptions:
        if self.scale is not None and isinstance(self.cluster, str) and "://" in self.cluster:
            raise ValueError("'scale' does not go with the address of a scheduler, whose workers are somebody else's")
        return self

    @property
    def remote(self) -> bool:
        """Whether it is on another machine, as far as anybody can tell."""
        return self.reach != LOCAL

    def plain(self) -> dict[str, Any]:
        """Return what is needed to start it elsewhere, beside its cluster."""
        names = {"labels", "environments", "resources", "orphan_timeout", "data", "data_binding"}
        return self.model_dump(mode="json", include=names)

    def written(self) -> dict[str, Any]:
        """Return it as it may be written down, in JSON; raises ConfigurationError for what has no such form."""
        given = self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"cluster", "options"})
        given |= {"cluster": self.cluster, "options": self.options}
        try:
            json.dumps(given)
        except (TypeError, ValueError) as exc:
            raise ConfigurationError(f"cluster and options must be plain to be told elsewhere: {exc}") from None
        return given


class Profile(BaseModel):
    """A federation: its hub, and its sites by name."""

    model_config = ConfigDict(extra="forbid")

    hub: str = Field(default=EMBEDDED, description="'embedded', in the client's process, or the address of a hub")
    listen: str | None = Field(default=None, description="where an embedded hub listens as well, like zmq://host:8700")
    contact: str | None = Field(default=None, description="the address of 'listen' as others see it")
    policy: str | None = Field(default=None, description="how sites are chosen, where the hub is embedded")
    sites: dict[str, Any] = Field(default_factory=dict, description="options by name of the site")

    @property
    def embedded(self) -> bool:
        """Whether the hub and the sites start and end with the client."""
        return self.hub == EMBEDDED


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written, for errors: in words, and in Dask's configuration if it is from there."""

    words: str
    path: tuple[str, ...] = ()

    def error(self, loc: Sequence[Any], message: str) -> ConfigurationError:
        """Return an error about what is at ``loc`` below this place."""
        written = where_set((*self.path, *map(str, loc))) if self.path else ""
        return ConfigurationError(": ".join(filter(None, (written, self.words, message))))


def site_options(name: str, given: Mapping[str, Any], profile: str = "") -> SiteOptions:
    """Return the checked options of the site ``name``; raises ConfigurationError naming the site and the option.

    Where it is from a ``profile``, the error also names the file and the line.
    """
    words = f"profile {profile!r}, site {name!r}" if profile else f"site {name!r}"
    place = Place(words, (*PROFILES.split("."), profile, "sites", str(name)) if profile else ())
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigurationError(f"{name!r} cannot name a site: use letters, digits, '-', '_' and '.'")
    if given is None and profile:  # "laptop:" alone
        given = {}
    if not isinstance(given, Mapping):
        raise place.error((), f"expected a dict of options, got {given!r}")
    options = _checked(SiteOptions, given, place, " (keywords of the Cluster class go into 'options')")
    if options.directory is not None and not options.remote and not options.directory.is_dir():
        raise place.error(("directory",), f"there is no directory {str(options.directory)!r}; create it first")
    return options


def profile_names() -> list[str]:
    """Return the names of all profiles that are configured."""
    return sorted(map(str, _configured()))


def named_profile(name: str | None = None) -> Profile:
    """Return the profile of this name, by default ``daskfed.default-profile``, with each of its sites checked.

    Raises ConfigurationError, which names file and line, for what is misspelt or missing.
    """
    profiles = _configured()
    if name is None:
        name = dask.config.get(DEFAULT_PROFILE, None)
        if name is None:
            raise ConfigurationError(f"no profile named; give a name, or set {DEFAULT_PROFILE} in Dask's configuration")
    if name not in profiles:
        have = hint_for(name, profile_names(), "there are") if profiles else f"there are none below {PROFILES}"
        raise ConfigurationError(f"no profile {name!r}; {have} in Dask's configuration ({_folders()})")
    place = Place(f"profile {name!r}", (*PROFILES.split("."), name))
    if not isinstance(profiles[name], Mapping):
        raise place.error((), f"expected 'hub' and 'sites', got {profiles[name]!r}")
    profile = _checked(Profile, profiles[name], place)
    if not profile.embedded and "://" not in profile.hub:
        raise place.error(("hub",), f"hub {profile.hub!r} is neither 'embedded' nor an address like tls://host:8700")
    if profile.listen is not None and not profile.listen.startswith("zmq://"):
        raise place.error(("listen",), f"listen {profile.listen!r} is no address like zmq://0.0.0.0:8700")
    sites = {site: site_options(site, given, name) for site, given in profile.sites.items()}
    if profile.embedded and not sites:
        raise place.error((), "it has no sites; name at least one below 'sites'")
    return profile.model_copy(update={"sites": sites})


def _configured() -> Mapping[str, Any]:
    profiles = dask.config.get(PROFILES, None) or {}
    if not isinstance(profiles, Mapping):
        written = where_set(tuple(PROFILES.split(".")))
        raise ConfigurationError(f"{written}: {PROFILES} should map names to profiles, not {profiles!r}")
    return profiles


def _folders() -> str:
    return ", ".join(str(path) for path in dask.config.paths)


def _checked(model: type[_Model], given: Mapping[Any, Any], place: Place, hint: str = "") -> _Model:
    try:
        return model.model_validate(dict(given))
    except ValidationError as exc:
        errors = exc.errors()
    words = [_in_words(model, error, hint) for error in errors]
    raise place.error(errors[0]["loc"], "; ".join(words)) from None


def _in_words(model: type[BaseModel], error: Any, hint: str) -> str:
    *above, last = error["loc"] or ("",)
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        message = str(error["msg"]).removeprefix("Value error, ")
        return f"option {name!r}: {message}" if name else message
    nearest = hint_for(str(last), _options_of(model, above), "options are")
    return f"unknown option {name!r}; {nearest}{'' if above else hint}"


def _options_of(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the names that may be written at ``loc`` in a model."""
    for step in loc:
        annotation = model.model_fields[str(step)].annotation
        model = next(each for each in (annotation, *getattr(annotation, "__args__", ())) if _is_model(each))
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
