"""``at``: what may be given, how it nests, and what it leaves as annotations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import pytest

from daskfed.client.constraints import (
    EMPTY,
    annotations_of,
    at,
    constraint_of,
    set_sites_lookup,
    site_selectors,
)
from daskfed.errors import ConfigurationError, UnknownSiteError
from daskfed.messages import Constraint
from tests.unit.client.graph_tools import ALL_FIELDS, FULL

SITES = {"north": {"threads": 64}, "south": {"threads": 8}, "west": {"threads": 96}}


@pytest.fixture
def sites() -> Iterator[None]:
    set_sites_lookup(lambda: SITES)
    yield
    set_sites_lookup(None)


def big(sites: dict[str, Any]) -> list[str]:
    return [name for name, site in sites.items() if site["threads"] > 32]


@pytest.mark.parametrize(
    ("given", "selected"),
    [
        ("north", ("north",)),
        (["north", "south", "north"], ("north", "south")),
        (("south", "north"), ("south", "north")),
        ({"south", "north"}, ("north", "south")),
        ("scratch=era5", ("scratch=era5",)),
        (" scratch = era5 ", ("scratch=era5",)),
    ],
)
def test_site_selectors(given: Any, selected: tuple[str, ...]) -> None:
    assert site_selectors(given) == selected


@pytest.mark.parametrize(
    "wrong", ["", "  ", "=era5", "scratch=", [], (), ["north", 3], 7, b"north", {"north": 1}, None]
)
def test_what_is_no_site_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as failed:
        site_selectors(wrong)
    assert "site" in str(failed.value) or "label" in str(failed.value)


def test_at_sets_annotations_and_the_inner_one_wins_field_by_field() -> None:
    with at("north", retries=2, environment="gpu"):
        with at("south", priority=3):
            assert dask.get_annotations() == {
                "sites": ("south",),
                "environment": "gpu",
                "retries": 2,
                "priority": 3,
            }
        with at(retries=0):  # a zero is something given: it takes the retries back
            assert dask.get_annotations()["retries"] == 0
        assert dask.get_annotations() == {"sites": ("north",), "environment": "gpu", "retries": 2}
    assert dask.get_annotations() == {}


def test_at_reaches_the_layers_that_are_built_inside_and_no_others() -> None:
    before = da.ones(4, chunks=2)
    with at("north"):
        inside = before + 1
    after = inside * 2
    layers = after.dask.layers
    assert layers[before.name].annotations is None
    assert layers[inside.name].annotations == {"sites": ("north",)}
    assert layers[after.name].annotations is None


def test_a_function_chooses_among_the_current_sites_at_once(sites: None) -> None:
    asked = []

    def choose(sites: dict[str, Any]) -> list[str]:
        asked.append(sites)
        return big(sites)

    with at(choose):
        assert dask.get_annotations() == {"sites": ("north", "west")}
        assert dask.get_annotations() == {"sites": ("north", "west")}
    assert asked == [SITES]


def test_a_function_may_give_one_name(sites: None) -> None:
    with at(lambda sites: max(sites, key=lambda name: sites[name]["threads"])):
        assert dask.get_annotations() == {"sites": ("west",)}


@pytest.mark.parametrize(("choice", "said"), [([], "chose no site"), (["north", "east"], "'east'")])
def test_a_function_that_chooses_no_known_site_is_refused(sites: None, choice: list[str], said: str) -> None:
    with pytest.raises(UnknownSiteError, match=said) as failed, at(lambda sites: choice):
        pass
    assert "'north', 'south', 'west'" in str(failed.value)


def test_a_function_needs_a_current_client() -> None:
    with pytest.raises(ConfigurationError, match="current client"), at(big):
        pass


def test_a_function_cannot_ask_an_asynchronous_client() -> None:
    async def later() -> dict[str, Any]:
        return SITES

    set_sites_lookup(later)  # type: ignore[arg-type]
    try:
        with pytest.raises(ConfigurationError, match="asynchronous"), at(big):
            pass
    finally:
        set_sites_lookup(None)


@pytest.mark.parametrize("arguments", [{}, {"sites": None}, {"environment": ""}, {"environment": 3}])
def test_at_refuses_nothing_and_nonsense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError), at(**arguments):
        pass
    assert dask.get_annotations() == {}


def test_at_leaves_the_types_of_dasks_own_annotations_to_dask() -> None:
    with pytest.raises(TypeError, match="retries"), at("north", retries="three"):  # type: ignore[arg-type]
        pass


def test_constraint_of_annotations() -> None:
    annotations = ALL_FIELDS | {"span": {"name": ("load",)}, "colour": "blue"}
    assert constraint_of(annotations) == FULL


def test_annotations_of_a_constraint_are_what_a_stock_scheduler_understands() -> None:
    assert annotations_of(FULL) == {
        "workers": ["tcp://10.0.0.1:1", "node7"],
        "allow_other_workers": True,
        "resources": {"GPU": 1.0, "licence": 2.0},
        "priority": 5,
        "retries": 3,
    }
    assert annotations_of(Constraint(sites=("north",), environment="gpu")) == {}


def test_older_names_of_dask_and_single_values_are_understood() -> None:
    assert constraint_of({"restrictions": "node7", "loose_restrictions": True}) == Constraint(
        workers=("node7",), allow_other_workers=True
    )


def test_no_constraint() -> None:
    assert constraint_of({}) is EMPTY
    assert constraint_of({"colour": "blue", "workers": None}) is EMPTY


@pytest.mark.parametrize(
    "wrong", [{"sites": 3}, {"environment": ""}, {"resources": ["GPU"]}, {"retries": "many"}, {"priority": "x"}]
)
def test_a_wrong_annotation_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        constraint_of(wrong)
