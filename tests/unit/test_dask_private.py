"""Which releases of Dask daskfed was tested with, and what is said of others."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from daskfed.dask_private import TESTED, untested, warn_untested

ROOT = Path(__file__).resolve().parents[2]


def test_the_tested_releases_are_fine() -> None:
    """Each of them, and dask and distributed of two of them too."""
    assert all(untested({"dask": each, "distributed": each}) is None for each in TESTED)
    assert untested({"dask": TESTED[0], "distributed": TESTED[-1]}) is None


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ({"dask": "2026.6.0", "distributed": TESTED[0]}, ["dask 2026.6.0"]),
        ({"dask": "2027.1.0", "distributed": "2027.1.1"}, ["dask 2027.1.0", "distributed 2027.1.1"]),
        ({"dask": TESTED[-1], "distributed": "2026.8.0+7.gdeadbee"}, ["distributed 2026.8.0+7.gdeadbee"]),
    ],
)
def test_another_release_is_named_with_the_tested_ones_and_what_to_do(
    installed: dict[str, str], named: list[str]
) -> None:
    """Only what is not tested is named as such."""
    said = untested(installed)
    assert said is not None
    assert re.findall(r"(?:dask|distributed) \S+(?= and|,)", said.split("only with")[0]) == named
    assert all(each in said for each in TESTED) and f"pip install dask=={TESTED[-1]}" in said


def test_it_is_said_once() -> None:
    """However many clients a process makes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_untested(("1.0",))
        warn_untested(("1.0",))
    assert [f"distributed {version('distributed')}" in str(each.message) for each in caught] == [True]


def test_the_newest_is_what_ci_installs_and_the_oldest_what_setup_asks_for() -> None:
    """One place more to change with a release would be forgotten."""
    constraints = (ROOT / "ci" / "constraints.txt").read_text()
    assert f"dask=={TESTED[-1]}\n" in constraints and f"distributed=={TESTED[-1]}\n" in constraints
    asked = re.findall(r'"(?:dask|dask\[.*\]|distributed)>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert len(asked) == 3 and len(set(asked)) == 1
    assert tuple(map(int, asked[0].split("."))) <= tuple(map(int, TESTED[0].split(".")))
