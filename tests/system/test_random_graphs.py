"""Random graphs give the result of ``dask.get``: over one to five sites, and while processes are killed at random."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dask
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from daskfed import Client, Federation
from tests.system.chaos import Killer, Siege, plan, told
from tests.system.commands import NO_DASHBOARD
from tests.system.random_programs import Program, programs

pytestmark = pytest.mark.system

NAMES = ("s0", "s1", "s2", "s3", "s4")
SITE = {"options": {"n_workers": 1, "threads_per_worker": 1, "processes": False, **NO_DASHBOARD}}
BESIEGED = ("north", "south")
NAP_S = 0.1  # of a task, so that something is going on when processes are killed
LARGE = 8  # tasks of a graph that is not a trifle
LEAST = 15  # tasks of a graph while processes are killed
WITHIN_S = 100.0  # a result must be there, whatever was killed


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of five sites, all in this process."""
    with Federation(sites=dict.fromkeys(NAMES, SITE), in_process=True) as federation, Client(federation) as client:
        yield client


@pytest.fixture(scope="module")
def lone() -> Iterator[Client]:
    """A client of one site."""
    sites = dict.fromkeys(NAMES[:1], SITE)
    with Federation(sites=sites, in_process=True) as federation, Client(federation, set_as_default=False) as client:
        yield client


def mostly_large(names: Sequence[str]) -> st.SearchStrategy[Program]:
    """Draw programs over these sites, three of four of which are no trifles."""
    return st.sampled_from((LARGE, LARGE, LARGE, 1)).flatmap(partial(programs, names))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=mostly_large(NAMES), salt=st.integers(0, 2**30))
def test_result_is_that_of_dask_get(client: Client, program: Program, salt: int) -> None:
    """Every wanted result, whatever the shape of the graph and the pins of its tasks."""
    assert list(dask.compute(*program.lazy(salt))) == program.expected(salt)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=mostly_large(NAMES[:1]), salt=st.integers(0, 2**30))
def test_result_is_that_of_dask_get_where_there_is_one_site(lone: Client, program: Program, salt: int) -> None:
    with lone.as_current():
        assert list(dask.compute(*program.lazy(salt))) == program.expected(salt)


def test_nothing_is_left(client: Client, lone: Client) -> None:
    """After all of it the sites hold nothing."""
    for each in (client, lone):
        assert each.submit(operator.add, 1, 1).result() == 2
        assert not [key for held in each.has_what().values() for key in held if "mixed" in str(key)]


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Siege, Client]]:
    """A federation of two sites in processes of their own, which come back when they are killed, and its client."""
    folder: Path = tmp_path_factory.mktemp("siege")
    siege = Siege(BESIEGED, folder / "state", threads=2)
    try:
        with Client(siege.address, timeout=30) as client:
            yield siege, client
        assert siege.close() == []
    finally:
        siege.destroy()


@pytest.mark.timeout(600)
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(program=programs(BESIEGED, LEAST), salt=st.integers(0, 2**30))
def test_result_is_that_of_dask_get_whoever_is_killed(
    besieged: tuple[Siege, Client], program: Program, salt: int
) -> None:
    """The salt says which processes are killed, and when."""
    siege, client = besieged
    with Killer(siege, plan(salt, len(BESIEGED))) as killer:
        futures: list[Any] = client.compute(program.lazy(salt, NAP_S))
        try:
            found = client.sync(client._gather, futures, callback_timeout=WITHIN_S)
        except Exception as exc:
            raise AssertionError(f"{exc!r}\n{told(siege, client, futures, killer)}") from exc
    assert list(found) == program.expected(salt), killer.story
