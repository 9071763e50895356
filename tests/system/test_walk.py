"""Ordinary Dask code over two real sites gives what stock Dask gives, and runs where it was told to."""

from __future__ import annotations

import operator
import os
import time
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import as_completed, progress, wait

import daskfed
from daskfed import Client, Federation, at
from daskfed.errors import UnknownSiteError
from tests.system.commands import NO_DASHBOARD

pytestmark = pytest.mark.system

ONE = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Working directories of the two sites."""
    return {name: tmp_path_factory.mktemp(name) for name in ("north", "south")}


@pytest.fixture(scope="module")
def federation(folders: dict[str, Any]) -> Any:
    """Two sites of one worker each."""
    sites = {name: {"options": ONE, "directory": folder, "labels": {"at": name}} for name, folder in folders.items()}
    sites["north"]["labels"] = {"at": "north", "scratch": "era5"}
    with Federation(sites=sites) as fed:
        yield fed


def where(_: Any = None, delay: float = 0.0) -> str:
    """Return the name of the working directory that the task runs in: the site's."""
    time.sleep(delay)
    return os.path.basename(os.getcwd()).rstrip("0123456789")


def test_submit_gather(client: Client) -> None:
    """Futures as arguments, nested too, across sites."""
    x = client.submit(operator.add, 1, 2, site="north")
    y = client.submit(operator.mul, x, 10, site="south")
    total = client.submit(lambda d: sum(d["values"]) + d["more"][0], {"values": [x, y], "more": (x,)})
    assert client.gather([x, y, total]) == [3, 30, 36]
    assert client.submit(sum, [x, y]).result() == 33


def test_site_of_a_call(client: Client) -> None:
    """A call runs at the site that it names, by name, label, or list."""
    assert client.submit(where, 1, site="north").result() == "north"
    assert client.submit(where, 2, site="at=south").result() == "south"
    assert client.submit(where, 3, site=["south"]).result() == "south"
    with at("scratch=era5"):
        assert client.submit(where, 4).result() == "north"


def test_a_function_with_a_parameter_named_site_gets_it(client: Client) -> None:
    """As in Dask: keywords of the function are the function's."""
    assert client.submit(lambda site, environment: site + environment, site="a", environment="b").result() == "ab"


def test_at_callable(client: Client) -> None:
    """A callable over the sites is evaluated by the client at once."""
    with at(lambda sites: [name for name, facts in sites.items() if facts["labels"]["at"] == "south"]):
        assert client.submit(where, 5).result() == "south"


def test_map_uses_both_sites(client: Client) -> None:
    """A map spreads over the sites and keeps the order of its results."""
    futures = client.map(where, range(40), delay=0.02, pure=False)
    assert set(client.gather(futures)) == {"north", "south"}
    assert client.gather(client.map(lambda x: x + 1, range(1000))) == list(range(1, 1001))


def test_map_over_futures(client: Client) -> None:
    """Futures among the arguments of a map."""
    xs = client.map(lambda x: x * 2, range(20))
    assert client.gather(client.map(lambda a, b: a + b, xs, range(20))) == [3 * i for i in range(20)]


def test_errors_keep_type_and_traceback(client: Client) -> None:
    """An error arrives as the original exception with the remote traceback."""

    def guilty() -> None:
        raise ZeroDivisionError("on purpose")

    future = client.submit(guilty, site="south")
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        future.result()
    assert "guilty" in str([entry.name for entry in caught.traceback])
    downstream = client.submit(lambda x: x, future, site="north")
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        downstream.result()


def test_failure_fails_only_dependents_across_sites(client: Client) -> None:
    """What does not depend on a failed key is computed, also in the same block."""
    with at("north"):
        bad = dask.delayed(lambda: 1 / 0)()
        good = dask.delayed(lambda: 5)()
    with at("south"):
        after_bad, after_good = dask.delayed(operator.neg)(bad), dask.delayed(operator.neg)(good)
    f_bad, f_good = client.compute([after_bad, after_good])
    assert f_good.result() == -5
    with pytest.raises(ZeroDivisionError):
        f_bad.result()


def test_scatter(client: Client) -> None:
    """Scattered data is used at either site; a name puts it there."""
    future = client.scatter(np.arange(1000), site="south")
    told = client.explain(future)
    assert told["sites"] == ["south"] == list(told["seen_at"])
    assert (told["seen_at"]["south"]["phase"], told["seen_at"]["south"]["task"]) == ("held", "memory")
    assert client.submit(np.sum, future, site="north").result() == 499500
    many = client.scatter([1, 2, 3])
    assert client.submit(sum, many).result() == 6


def test_array(client: Client) -> None:
    """Arrays: reductions, transposes, products, rechunk."""
    x = np.arange(400 * 300, dtype=float).reshape(400, 300)
    lazy = da.from_array(x, chunks=(50, 60))
    np.testing.assert_allclose(lazy.mean(axis=0).compute(), x.mean(axis=0))
    np.testing.assert_allclose((lazy @ lazy.T).compute(), x @ x.T)
    np.testing.assert_allclose(((lazy - lazy.mean(axis=0)) / lazy.std(axis=0)).compute(), (x - x.mean(0)) / x.std(0))
    np.testing.assert_array_equal(lazy.rechunk((400, 30)).compute(), x)


def test_delayed_and_bag(client: Client) -> None:
    """Delayed with branching, and bags."""
    parts = [dask.delayed(operator.mul)(i, i) for i in range(20)]
    assert dask.delayed(sum)(parts).compute() == sum(i * i for i in range(20))
    words = db.from_sequence(["a", "b", "a", "c"] * 50, npartitions=8)
    assert dict(words.frequencies().compute()) == {"a": 100, "b": 50, "c": 50}


def test_dataframe(client: Client) -> None:
    """Dataframes: groupby, merge, shuffle."""
    frame = pd.DataFrame({"k": np.arange(2000) % 37, "v": np.arange(2000) * 0.5})
    lazy = dd.from_pandas(frame, npartitions=10)
    pd.testing.assert_series_equal(lazy.groupby("k").v.mean().compute().sort_index(), frame.groupby("k").v.mean())
    other = pd.DataFrame({"k": np.arange(37), "w": np.arange(37) ** 2})
    merged = lazy.merge(dd.from_pandas(other, npartitions=3), on="k").compute()
    expected = frame.merge(other, on="k")
    by = ["k", "v"]
    pd.testing.assert_frame_equal(
        merged.sort_values(by).reset_index(drop=True), expected.sort_values(by).reset_index(drop=True)
    )
    shuffled = lazy.shuffle("k").compute()
    assert len(shuffled) == 2000 and shuffled.v.sum() == frame.v.sum()


def test_persist_and_reuse(client: Client) -> None:
    """A persisted collection is used by later graphs; its keys stay where they were made."""
    x = da.random.RandomState(0).random_sample((200, 200), chunks=50).persist()
    total = x.sum().compute()
    assert abs(total - x.compute().sum()) < 1e-9
    assert float((x + x.T).sum().compute()) == pytest.approx(2 * total)


def test_several_collections_at_once(client: Client) -> None:
    """dask.compute of several kinds together."""
    a, d = da.arange(100, chunks=10), dask.delayed(operator.add)(1, 2)
    frame = dd.from_pandas(pd.DataFrame({"v": range(10)}), npartitions=2)
    total, three, kept = dask.compute(a.sum(), d, frame)
    assert (int(total), three, list(kept.v)) == (4950, 3, list(range(10)))


def test_get_of_a_plain_graph(client: Client) -> None:
    """A dict graph, as Client.get takes it."""
    assert client.get({"x": (operator.add, 1, 2), "y": (operator.mul, "x", 10)}, ["y", "x"]) == [30, 3]


def test_as_completed_wait_progress(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """The ways to wait."""
    futures = client.map(lambda x: x + 0.5, range(10))
    assert sorted(f.result() for f in as_completed(futures)) == [i + 0.5 for i in range(10)]
    done, not_done = wait(client.map(operator.neg, range(5)))
    assert len(done) == 5 and not not_done
    futures = client.map(where, range(8), delay=0.05, pure=False)
    progress(futures)
    assert "100% Completed" in capsys.readouterr().out


def test_release_frees_every_site(client: Client) -> None:
    """When the last future goes, the sites hold nothing of it."""
    x = client.map(lambda i: np.ones(10_000) * i, range(10))
    y = client.submit(lambda xs: sum(map(np.sum, xs)), x, site="south")
    y.result()
    keys = [f.key for f in x]
    assert all(client.explain(key)["phase"] == "held" for key in keys)
    del x, y
    deadline = time.monotonic() + 20
    while _held(client, keys):
        assert time.monotonic() < deadline, "keys are still held"
        time.sleep(0.05)


def _held(client: Client, keys: list[str]) -> bool:
    has_what = client.has_what()
    return any(key in held for held in has_what.values() for key in keys)


def test_priority(client: Client) -> None:
    """Higher priority runs first at a busy site."""
    blockers = client.map(where, range(4), delay=0.5, pure=False, site="north")
    low = client.submit(time.time_ns, pure=False, priority=-10, site="north")
    high = client.submit(time.time_ns, pure=False, priority=10, site="north")
    wait(blockers)
    order = [name for _, name in sorted([(low.result(), "low"), (high.result(), "high")])]
    assert order == ["high", "low"]


def test_two_clients(client: Client, federation: Federation) -> None:
    """A second client does not disturb the first, and each keeps its own keys."""
    mine = client.submit(operator.add, 1, 1)
    with Client(federation, set_as_default=False) as other:
        same = other.submit(operator.add, 1, 1)
        assert same.key == mine.key and same.result() == 2
        different = other.submit(operator.add, 40, 2)
        assert different.result() == 42
    assert mine.result() == 2
    assert client.submit(operator.add, mine, 1).result() == 3


async def _async_work(address: str) -> tuple[int, float]:
    async with Client(address, asynchronous=True, set_as_default=False) as client:
        three = await client.submit(operator.add, 1, 2)
        total = await client.compute(da.ones((100, 100), chunks=10).sum())
        assert set(await client.sites()) == {"north", "south"}
        return three, float(total)


def test_async_client(federation: Federation, client: Client) -> None:
    """An asynchronous client in a loop of its own."""
    import asyncio

    assert asyncio.run(_async_work(federation.scheduler_address)) == (3, 10_000.0)


def test_unknown_site_is_an_error_at_once(client: Client) -> None:
    """A wrong name or label raises from the call that has it and says what there is."""
    with pytest.raises(UnknownSiteError, match="north"):
        client.submit(operator.add, 1, 2, site="nroth")
    with pytest.raises(UnknownSiteError, match="environment 'gpu'"):
        client.submit(operator.add, 1, 2, environment="gpu")
    with at("scratch=nope"):
        x = da.ones(10, chunks=5)
    with pytest.raises(UnknownSiteError, match="scratch=nope"):
        x.compute()
    assert client.submit(operator.add, 20, 2).result() == 22


def test_unpicklable_task(client: Client) -> None:
    """What cannot be pickled fails in the submitting call, as in Dask, and harms nothing."""
    import threading

    with pytest.raises(TypeError, match="Could not serialize"):
        client.submit(lambda lock: 1, threading.Lock())
    assert client.submit(operator.add, 30, 3).result() == 33


def test_missing_module(client: Client, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the sites lack is an error that names it, before anything is sent."""
    (tmp_path / "only_here_module.py").write_text("def f(x):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here_module  # type: ignore[import-not-found]

    with pytest.raises(ModuleNotFoundError, match="has the package 'only_here_module'.*client.upload_package"):
        client.submit(only_here_module.f, 1)
    assert client.submit(operator.add, 31, 3).result() == 34


def test_sites_transfers_explain(client: Client) -> None:
    """What a user can ask of the federation."""
    sites = client.sites()
    assert set(sites) == {"north", "south"}
    assert {
        "status",
        "workers",
        "threads",
        "memory_limit",
        "environments",
        "labels",
        "held",
        "running",
        "queued",
    } <= set(sites["north"])
    data = client.submit(np.ones, 100_000, site="north")
    before = client.transfers().get(("north", "south"), {"nbytes": 0})["nbytes"]
    assert client.submit(np.sum, data, site="south").result() == 100_000
    assert client.transfers()["north", "south"]["nbytes"] - before >= 800_000
    facts = client.explain(data)
    assert facts["phase"] == "held" and "north" in facts["sites"] and facts["site"] == "north"


def test_backend(client: Client) -> None:
    """daskfed.get as a scheduler."""
    assert dask.compute(dask.delayed(operator.add)(1, 2), scheduler=daskfed.get) == (3,)


def test_final_assembly_does_not_cross_sites(client: Client) -> None:
    """compute() of a large array brings each chunk home once, and none from site to site."""
    with at("north"):
        x = da.random.random((1000, 500), chunks=(250, 500))
    with at("south"):
        y = da.random.random((1000, 500), chunks=(250, 500))
    before = sum(link["nbytes"] for link in client.transfers().values())
    result = da.concatenate([x, y]).compute()
    assert result.shape == (2000, 500)
    assert sum(link["nbytes"] for link in client.transfers().values()) - before < 100_000


async def _released(address: str, wait_for_it: bool) -> list[int]:
    """Return how many futures an asynchronous client has with those of an array, and in the next turn of its loop."""
    import asyncio

    async with Client(address, asynchronous=True, set_as_default=False) as client:
        parts = da.ones((40, 40), chunks=10).map_blocks(_slow, delay=0.0 if wait_for_it else 0.3, meta=np.ones((0, 0)))
        whole = client.compute(parts)
        if wait_for_it:
            await whole
        counts = [len(client.futures)]
        whole.release()
        await asyncio.sleep(0)
        return [*counts, len(client.futures)]


def _slow(block: Any, delay: float) -> Any:
    time.sleep(delay)
    return block


@pytest.mark.parametrize("wait_for_it", [True, False])
def test_what_a_result_is_put_together_from_is_released_with_it(
    federation: Federation, client: Client, wait_for_it: bool
) -> None:
    """At once, and also while it is being computed: Dask's names may stand for something else the next time."""
    import asyncio

    assert asyncio.run(_released(federation.scheduler_address, wait_for_it)) == [17, 0]
