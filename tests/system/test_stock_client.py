"""A stock, unmodified ``distributed.Client`` works over a hub of two sites: all its work is done at its home site."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, Event, Future, Lock, MultiLock, Queue, Semaphore, Variable, as_completed, wait
from distributed.client import FutureCancelledError

from tests.system import commands

pytestmark = pytest.mark.system

SITES = ("north", "south")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub and two sites in processes of their own."""
    with commands.hub_and_sites({name: tmp_path_factory.mktemp(name) for name in SITES}) as where:
        yield where


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    """A stock client, once both sites have their worker."""
    with Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def where(*_: Any) -> str:
    """Return the name of the site that the task runs at."""
    return os.path.basename(os.getcwd()).rstrip("0123456789")


def inc(x: int) -> int:
    """Return one more."""
    return x + 1


def nap(seconds: float, *_: Any) -> float:
    """Sleep."""
    time.sleep(seconds)
    return seconds


def fail(text: str) -> None:
    """Raise."""
    raise ValueError(text)


def test_it_is_stock(client: Client) -> None:
    assert type(client).__module__ == "distributed.client"


def test_all_its_work_is_done_at_one_site(client: Client) -> None:
    places = set(client.gather(client.map(where, range(20), pure=False)))
    assert len(places) == 1 and places <= set(SITES)


def test_submit_map_gather(client: Client) -> None:
    first = client.submit(inc, 1)
    later = client.map(inc, [first, 10, first])
    assert client.submit(sum, later).result() == 3 + 11 + 3
    assert client.gather({"a": first, "b": [later[1]]}) == {"a": 2, "b": [11]}
    assert client.gather(client.map(inc, range(100), batch_size=10)) == list(range(1, 101))


def test_a_task_that_raises(client: Client) -> None:
    failed = client.submit(fail, "no such luck")
    with pytest.raises(ValueError, match="no such luck"):
        client.submit(inc, failed).result()
    assert failed.status == "error" and client.gather([failed], errors="skip") == []


def test_scatter(client: Client) -> None:
    one = client.scatter(np.arange(10))
    several = client.scatter({"x": 1, "y": 2})
    assert client.submit(np.sum, one).result() == 45
    assert client.submit(sum, [several["x"], several["y"]]).result() == 3
    assert client.submit(sum, client.scatter([5, 6], broadcast=True)).result() == 11


def test_collections(client: Client) -> None:
    x = da.random.random((60, 60), chunks=20)
    assert float((x + x.T - x.mean(axis=0)).sum().compute()) == pytest.approx(float(x.sum().compute()))
    assert db.from_sequence(range(10), npartitions=3).map(inc).sum().compute() == 55
    assert dask.delayed(sum)([dask.delayed(inc)(i) for i in range(5)]).compute() == 15
    assert client.get({"a": 1, "b": (inc, "a")}, "b") == 2


def test_p2p_rechunk(client: Client) -> None:
    x = da.arange(400, chunks=20).reshape(20, 20)
    with dask.config.set({"array.rechunk.method": "p2p"}):
        np.testing.assert_array_equal(x.rechunk((20, 3)).compute(), np.arange(400).reshape(20, 20))


def test_p2p_shuffle_and_merge(client: Client) -> None:
    frame = pd.DataFrame({"a": np.arange(60) % 7, "b": np.arange(60.0)})
    ddf = dd.from_pandas(frame, npartitions=4)
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        shuffled = ddf.shuffle("a").compute()
        merged = ddf.merge(ddf.rename(columns={"b": "c"}), on="a").groupby("a").c.sum().compute()
    pd.testing.assert_frame_equal(shuffled.sort_index(), frame)
    expected = frame.merge(frame.rename(columns={"b": "c"}), on="a").groupby("a").c.sum()
    pd.testing.assert_series_equal(merged.sort_index(), expected)


def test_persist_and_reuse(client: Client) -> None:
    x = client.persist(da.ones((40, 40), chunks=10))
    wait(x)
    assert float((x + 1).sum().compute()) == 3200
    assert client.compute(x.mean()).result() == 1.0


def test_as_completed_and_wait(client: Client) -> None:
    futures = client.map(inc, range(8), pure=False)
    assert sorted(result for _, result in as_completed(futures, with_results=True)) == list(range(1, 9))
    assert not wait(futures, timeout=30).not_done


def test_cancel(client: Client) -> None:
    blocker = client.submit(nap, 2, pure=False)
    later = client.submit(inc, blocker)
    client.cancel([blocker, later])
    with pytest.raises(FutureCancelledError):
        later.result(timeout=30)
    assert client.submit(inc, 100).result(timeout=30) == 101


def test_release_frees_the_site(client: Client) -> None:
    future = client.submit(bytes, 1000)
    wait(future)
    key = future.key
    assert client.who_has()[key]
    del future
    until(lambda: key not in client.who_has())


def test_fire_and_forget(client: Client, tmp_path: Path) -> None:
    from distributed import fire_and_forget

    fire_and_forget(client.submit(Path.touch, tmp_path / "done", pure=False))
    until((tmp_path / "done").exists)


def test_executor(client: Client) -> None:
    with client.get_executor(pure=False) as executor:
        assert list(executor.map(inc, range(4))) == [1, 2, 3, 4]


def test_variables_queues_and_futures_in_them(client: Client, address: str) -> None:
    name = uuid.uuid4().hex
    future = client.submit(inc, 41)
    Variable(name, client=client).set(future)
    Queue(name, client=client).put([1, "two"])
    with Client(address, set_as_default=False) as other:
        found = Variable(name, client=other).get(timeout=10)
        assert isinstance(found, Future) and found.result() == 42
        assert list(Queue(name, client=other).get(timeout=10)) == [1, "two"]
    Variable(name, client=client).delete()


def test_locks_semaphores_and_events_shared_with_tasks(client: Client) -> None:
    name = uuid.uuid4().hex

    def locked_out(name: str) -> bool:
        return not Lock(name).acquire(timeout=0.2)

    with Lock(name):
        assert client.submit(locked_out, name, pure=False).result(timeout=60)
    semaphore = Semaphore(2, name=f"{name}-2")
    assert semaphore.acquire(timeout=10) and semaphore.get_value() == 1
    semaphore.release()
    multi = MultiLock([name, "b"], client=client)
    assert multi.acquire(timeout=10)
    multi.release()
    future = client.submit(lambda name: Event(name).wait(timeout=30), name, pure=False)
    Event(name, client=client).set()
    assert future.result(timeout=60)


def test_datasets_between_two_clients_of_one_user(client: Client, address: str) -> None:
    name = uuid.uuid4().hex
    client.publish_dataset(client.persist(da.arange(10, chunks=5)), name=name)
    with Client(address, set_as_default=False) as other:
        assert name in other.list_datasets()
        assert int(other.compute(other.get_dataset(name).sum()).result()) == 45
        other.unpublish_dataset(name)
    assert name not in client.list_datasets()


def test_what_daskfeds_client_of_the_same_user_published(client: Client, address: str) -> None:
    """Its parts are at both sites, and come to the home of the stock client with the first graph that may need them."""
    import daskfed

    name = uuid.uuid4().hex
    with daskfed.Client(address, set_as_default=False) as other:
        parts = [other.submit(inc, n, site=site) for n, site in enumerate(SITES)]
        other.publish_dataset(parts, name=name)
        found = client.get_dataset(name)
        assert client.submit(sum, found).result(timeout=60) == 3
        assert client.gather(found) == [1, 2]
        client.unpublish_dataset(name)


def test_metadata_and_events(client: Client) -> None:
    client.set_metadata(["stock", "x"], 1)
    assert client.get_metadata(["stock", "x"]) == 1
    topic, heard = uuid.uuid4().hex, []
    client.subscribe_topic(topic, lambda event: heard.append(event[1]))
    until(lambda: client.log_event(topic, "hello") or "hello" in heard)  # calls and stream may overtake each other
    assert {message for _, message in client.get_events(topic)} == {"hello"}
    client.unsubscribe_topic(topic)


def test_what_it_sees_of_the_federation(client: Client) -> None:
    future = client.submit(inc, 7)
    wait(future)
    info = client.scheduler_info()
    assert info["n_workers"] == 2 and info["type"] == "Hub"
    assert all(worker.startswith("fed://") for worker in client.nthreads())
    (holder,) = client.who_has(future)[future.key]
    assert future.key in client.has_what()[holder]
    assert client.nbytes([future.key], summary=False)[future.key] > 0
    assert "threads=2" in repr(client)


def test_work_in_tasks(client: Client) -> None:
    def nested(n: int) -> int:
        from distributed import get_client, worker_client

        with worker_client() as inner:
            doubled = inner.gather(inner.map(lambda x: 2 * x, range(n)))
            return sum(doubled) + get_client().submit(inc, n).result()

    assert client.submit(nested, 4, pure=False).result(timeout=60) == 12 + 5


def test_two_clients_at_once_and_close(client: Client, address: str) -> None:
    with Client(address, set_as_default=False) as other:
        ours, theirs = client.submit(inc, 900), other.submit(inc, 900)
        assert ours.result() == theirs.result() == 901
    assert other.status == "closed"
    assert ours.result() == 901 and client.submit(inc, ours).result() == 902


def until(condition: Any, timeout_s: float = 30.0) -> None:
    """Wait until a condition holds; it must within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
