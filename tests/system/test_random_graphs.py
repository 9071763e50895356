"""Random graphs over one to five sites give the result of ``dask.get``."""

from __future__ import annotations

import operator
from typing import Any

import dask
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daskfed import Client, Federation, at

pytestmark = pytest.mark.system

NAMES = ("s0", "s1", "s2", "s3", "s4")
SITE = {"options": {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}}


@pytest.fixture(scope="module")
def client() -> Any:
    """A client of five sites, all in this process."""
    with Federation(sites=dict.fromkeys(NAMES, SITE), in_process=True) as federation, Client(federation) as client:
        yield client


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], str | None]], list[int]]:
    """Draw a number of sites, tasks as (numbers of earlier tasks, site or None), and which results are wanted."""
    sites = draw(st.integers(1, len(NAMES)))
    size = draw(st.integers(1, 30))
    where = st.sampled_from((None, *NAMES[:sites]))
    tasks = []
    for i in range(size):
        inputs = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        tasks.append((inputs, draw(where)))
    wanted = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True))
    return sites, tasks, wanted


def mixed(number: int, salt: int, *values: int) -> int:
    """Return a number that depends on all arguments and their order; the salt keeps examples apart."""
    total = number + 1
    for value in values:
        total = (total * 31 + value) % 1_000_003
    return total


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=programs(), salt=st.integers(0, 2**30))
def test_result_is_that_of_dask_get(
    client: Client, program: tuple[int, list[tuple[list[int], str | None]], list[int]], salt: int
) -> None:
    """Every wanted result, whatever the shape of the graph and the pins of its tasks."""
    sites, tasks, wanted = program
    graph = {f"t{i}": (mixed, i, salt, *(f"t{j}" for j in inputs)) for i, (inputs, _) in enumerate(tasks)}
    lazy: list[Any] = []
    with at(list(NAMES[:sites])):
        for i, (inputs, site) in enumerate(tasks):
            with at(site) if site else at(list(NAMES[:sites])):
                lazy.append(dask.delayed(mixed, pure=True)(i, salt, *(lazy[j] for j in inputs)))
    expected = dask.get(graph, [f"t{i}" for i in wanted])
    assert dask.compute(*(lazy[i] for i in wanted)) == tuple(expected)


def test_nothing_is_left(client: Client) -> None:
    """After all of it the sites hold nothing."""
    assert client.submit(operator.add, 1, 1).result() == 2
    assert not [key for held in client.has_what().values() for key in held if "mixed" in str(key)]
