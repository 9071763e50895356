"""``timeout=`` on submit and map and as an annotation: in lanes and at schedulers, at one site and at two."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import get_client, get_worker, secede

from daskfed import Client, Federation
from daskfed.errors import ConfigurationError
from tests.system.commands import NO_DASHBOARD

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

TWO = {"options": {"n_workers": 1, "threads_per_worker": 2, **NO_DASHBOARD}}


@pytest.fixture(scope="module", params=["one site", "two sites"])
def federation(request: pytest.FixtureRequest) -> Iterator[Federation]:
    names = ["north"] if request.param == "one site" else ["north", "south"]
    with Federation(sites=dict.fromkeys(names, TWO)) as fed:
        yield fed


@pytest.fixture(params=["always", "never"])
def client(federation: Federation, request: pytest.FixtureRequest) -> Iterator[Client]:
    with dask.config.set({"daskfed.client.lanes": request.param}), Client(federation) as found:
        yield found


def nap(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return seconds


class Counter:
    def __init__(self) -> None:
        self.n = 0


def test_calls_that_take_too_long_fail_and_the_others_do_not(client: Client) -> None:
    futures = client.map(nap, [0.0, 30.0, 0.01, 30.0], timeout=0.5, pure=False)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nap took longer than its timeout of 0\.5 s"):
        futures[1].result(timeout=20)
    assert client.gather([futures[0], futures[2]]) == [0.0, 0.01]
    assert isinstance(futures[3].exception(timeout=20), TimeoutError)
    assert time.monotonic() - began < 15
    assert client.submit(nap, 0.02, timeout=5, pure=False).result(timeout=20) == 0.02


def test_a_thread_is_free_again_also_where_the_call_cannot_be_interrupted(client: Client) -> None:
    late = client.map(time.sleep, [20] * 4, timeout=0.3, pure=False, site="north")  # two for each thread
    assert all(isinstance(each.exception(timeout=10), TimeoutError) for each in late)
    assert client.submit(nap, 0.0, pure=False, site="north").result(timeout=5) == 0.0


def test_each_try_has_the_whole_time(client: Client, tmp_path: Path) -> None:
    def first_is_slow(folder: str) -> int:
        tries = len(list(Path(folder).iterdir()))
        (Path(folder) / str(tries)).touch()
        nap(0.3 if tries else 30)
        return tries

    assert client.submit(first_is_slow, str(tmp_path), timeout=1, retries=2, pure=False).result(timeout=30) == 1


def test_the_key_is_that_of_the_call_without_a_timeout(client: Client) -> None:
    first = client.submit(nap, 0.25)
    assert client.submit(nap, 0.25, timeout=9).key == first.key


def test_asynchronous_functions(client: Client) -> None:
    async def slowly(seconds: float) -> float:
        import asyncio

        await asyncio.sleep(seconds)
        return seconds

    assert client.submit(slowly, 0.01, timeout=5, pure=False).result(timeout=20) == 0.01
    with pytest.raises(TimeoutError, match="slowly took longer"):
        client.submit(slowly, 30, timeout=0.3, pure=False).result(timeout=20)


def test_what_a_call_finds_around_it(client: Client) -> None:
    def looks() -> tuple[Any, ...]:
        own = get_client()
        future = own.submit(nap, 0.0, pure=False)
        secede()
        return get_worker().address.startswith("tcp"), future.result(timeout=20)

    futures = [client.submit(looks, timeout=30, pure=False, site="north") for _ in range(6)]
    assert client.gather(futures) == [(True, 0.0)] * 6


def test_a_function_with_such_a_parameter_gets_it(client: Client) -> None:
    assert client.submit(lambda timeout: timeout, timeout=3, pure=False).result(timeout=20) == 3
    assert client.submit(lambda **names: names, timeout=3, pure=False).result(timeout=20) == {"timeout": 3}
    with dask.annotate(timeout=0.3):
        future = client.submit(lambda **names: time.sleep(names["seconds"]), seconds=20, pure=False)
    assert isinstance(future.exception(timeout=10), TimeoutError)


def test_graphs(client: Client) -> None:
    with dask.annotate(timeout=0.3):
        late, early = dask.delayed(nap)(30), dask.delayed(nap)(0.0)
    usual = dask.delayed(nap)(0.4)
    assert client.compute(dask.delayed(sum)([early, usual])).result(timeout=20) == 0.4
    with pytest.raises(TimeoutError, match=r"timeout of 0\.3 s"):
        client.compute(dask.delayed(sum)([late, usual])).result(timeout=20)
    with dask.annotate(timeout=30):
        assert float(client.compute(da.ones(8, chunks=2).sum()).result(timeout=20)) == 8
    with dask.annotate(timeout=0.3), pytest.raises(TimeoutError):
        client.compute(dask.delayed(nap)(20)).result(timeout=20)


def test_what_cannot_be(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="timeout='soon': expected seconds"):
        client.submit(nap, 1, timeout="soon")
    with pytest.raises(ConfigurationError, match="an actor lives"):
        client.submit(Counter, actor=True, timeout=3)
