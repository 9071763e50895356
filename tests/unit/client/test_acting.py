"""What the client has to know itself of workers that belong to sites."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from distributed.versions import get_versions

from daskfed.client.acting import at_sites, mismatches, named_sites
from daskfed.errors import ConfigurationError
from daskfed.messages import Constraint

SITES: dict[str, dict[str, Any]] = {"north": {"labels": {"disk": "fast"}}, "south": {"labels": {}}}


def test_workers_that_name_sites_become_sites() -> None:
    assert at_sites(Constraint(workers=("north",)), SITES) == Constraint(sites=("north",))
    assert at_sites(Constraint(workers=("fed://north",)), SITES) == Constraint(sites=("north",))
    assert at_sites(Constraint(workers=("disk=fast", "south")), SITES) == Constraint(sites=("disk=fast", "south"))
    assert named_sites(["fed://north/10.0.0.1:1", "alice", "south"], SITES) == ["south"]


def test_a_preference_for_a_site_does_not_bind() -> None:
    assert at_sites(Constraint(workers=("north",), allow_other_workers=True), SITES) == Constraint()


def test_workers_stay_workers() -> None:
    constraint = Constraint(workers=("fed://north/10.0.0.1:1",), sites=("north",))
    assert at_sites(constraint, SITES) is constraint


def test_sites_and_workers_at_once_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="names sites and workers: name one or the other"):
        at_sites(Constraint(workers=("north", "alice")), SITES)


def other(package: str, version: str) -> Any:
    found = copy.deepcopy(get_versions())
    found["packages"][package] = version
    return found


def test_versions_that_agree_are_no_news() -> None:
    same = get_versions()
    workers = {"fed://north/10.0.0.1:1": same, "fed://south/10.0.0.1:1": same}
    assert mismatches({"north": same, "south": same}, workers, same) == []


def test_a_mismatch_is_told_of_its_site() -> None:
    same, old = get_versions(), other("numpy", "0.1")
    workers = {"fed://north/10.0.0.1:1": same, "fed://south/10.0.0.1:1": old}
    ((site, warning, error),) = mismatches({"north": same, "south": same}, workers, same)
    assert site == "south" and "numpy" in warning and "0.1" in warning and error == ""


def test_a_mismatch_of_what_must_agree_is_an_error() -> None:
    same, old = get_versions(), other("msgpack", "0.1")
    found = mismatches({"north": same, "south": old}, {}, same)
    assert [site for site, *_ in found] == ["south"] and "msgpack" in "".join(found[0])
