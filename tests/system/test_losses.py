"""Sites and workers are killed while a client works: what can be had again is not lost, of the rest the error says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import wait
from distributed.scheduler import KilledWorker

from daskfed.errors import SiteLostError, UnknownSiteError
from tests.system.killable import Killable, killable

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

SOON_S = 60.0  # for what takes a few seconds on a quiet machine


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Killable]:
    with killable(tmp_path, "north", "south") as federation:
        yield federation


def slow_inc(x: int, delay_s: float = 0.2) -> int:
    time.sleep(delay_s)
    return x + 1


class Counter:
    """An actor."""

    def __init__(self) -> None:
        self.n = 0

    def add(self) -> int:
        """Count."""
        self.n += 1
        return self.n


def die(n: int, bad: int) -> int:
    if n == bad:
        os._exit(1)
    time.sleep(0.02)
    return n


def wait_all(client: Any, futures: Any) -> None:
    """Wait until all futures are settled; say what is missing where that takes too long."""
    deadline = time.monotonic() + SOON_S
    while pending := [future for future in futures if future.status == "pending"]:
        assert time.monotonic() < deadline, [*map(client.explain, pending[:3]), client.sites()]
        time.sleep(0.2)


def site_of(client: Any, key: Any) -> str:
    (site,) = client.explain(key)["sites"]
    return str(site)


def test_a_job_goes_on_when_a_site_dies(fed: Killable) -> None:
    with fed.client() as client:
        first = client.map(slow_inc, range(40), pure=False)
        second = client.map(slow_inc, first, pure=False, delay_s=0.0)
        total = client.submit(sum, second)
        wait(first[:10], timeout=SOON_S)
        fed.kill_site("north")
        assert total.result(timeout=SOON_S) == sum(range(40)) + 80
        assert client.gather(first) == [n + 1 for n in range(40)]
        assert client.sites().keys() == {"south"}


def test_scattered_data_is_brought_again_by_its_client(fed: Killable) -> None:
    with fed.client() as client:
        data = client.scatter(np.arange(100_000), site="north")
        again = client.scatter(np.arange(100_000), site="north")  # the same key, once more
        del again
        fed.kill_site("north")
        assert client.submit(np.sum, data).result(timeout=SOON_S) == sum(range(100_000))
        assert site_of(client, data) == "south"


def test_scattered_data_waits_for_a_site_that_can_take_it(fed: Killable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "daskfed.client.client")
    with dask.config.set({"daskfed.client.grace": "1s"}), fed.client() as client:
        data = client.scatter(np.arange(100_000), site="north")
        total = client.submit(np.sum, data)
        assert total.result(timeout=SOON_S) == sum(range(100_000))
        total = client.submit(lambda x: x.size, data)  # submitted while its site is not gone yet
        fed.kill_site("south")
        fed.kill_site("north")
        deadline = time.monotonic() + SOON_S
        while caplog.text.count("no site has taken data that was lost") < 2:
            assert time.monotonic() < deadline, "the hub did not refuse the data twice"
            time.sleep(0.1)
        fed.add("east")
        assert total.result(timeout=SOON_S) == 100_000
        assert site_of(client, data) == "east"


def test_data_with_replicas_survives_without_its_client(fed: Killable) -> None:
    with fed.client() as reader:
        with fed.client() as writer:
            one, two = writer.scatter([10, 20], site="north", hash=False), None
            two = writer.scatter({"kept": 30}, site="north", replicas=2)["kept"]
            writer.publish_dataset(one=one[0], two=two)
            while len(writer.explain("kept")["sites"]) < 2:
                time.sleep(0.05)
        one, two = reader.get_dataset("one"), reader.get_dataset("two")
        fed.kill_site("north")
        assert two.result(timeout=SOON_S) == 30
        with pytest.raises(SiteLostError, match="was at site 'north', which is gone.* replicas=2"):
            one.result(timeout=SOON_S)


def test_replicas_must_be_a_number(fed: Killable) -> None:
    with fed.client() as client, pytest.raises(ValueError, match="replicas=0 must be the number of sites"):
        client.scatter(1, replicas=0)


def test_an_actor_ends_with_its_site(fed: Killable) -> None:
    with fed.client() as client:
        future = client.submit(Counter, actor=True)
        wait(future, timeout=SOON_S)
        home = site_of(client, future)
        assert client.submit(slow_inc, 1).result(timeout=SOON_S) == 2
        fed.kill_site(home)
        with pytest.raises(SiteLostError, match=f"was at site '{home}', which is gone.* create the actor again"):
            wait(future, timeout=SOON_S)
            future.result(timeout=SOON_S)


def test_work_for_a_site_that_is_gone_says_so_or_waits(fed: Killable) -> None:
    with dask.config.set({"daskfed.client.site-timeout": "1s"}), fed.client() as client:
        futures = client.map(slow_inc, range(20), site="north", pure=False)
        fed.kill_site("north")
        with pytest.raises(UnknownSiteError, match="no site matches 'north'; sites are south; waited 1 s"):
            client.gather(futures)
    with fed.client() as client:
        fed.add("north")
        futures = client.map(slow_inc, range(20), site="north", pure=False)
        fed.kill_site("north")
        fed.add("north")
        assert client.gather(futures) == [n + 1 for n in range(20)]


def test_a_task_that_kills_workers_is_given_up_and_its_neighbours_finish(fed: Killable) -> None:
    with fed.client() as client:
        futures = client.map(die, range(40), bad=13, pure=False)
        after = client.submit(sum, [futures[13]])
        wait_all(client, futures)
        assert [n for n, future in enumerate(futures) if future.status == "error"] == [13]
        with pytest.raises(KilledWorker):
            futures[13].result()
        with pytest.raises(KilledWorker):
            after.result(timeout=SOON_S)


def kill_worker(client: Any, site: str) -> None:
    """Kill the only worker of a site, once there is one."""
    deadline = time.monotonic() + SOON_S
    while not (pids := client.run(os.getpid, workers=site) if client.sites()[site]["workers"] else {}):
        assert time.monotonic() < deadline, client.sites()
        time.sleep(0.1)
    os.kill(next(iter(pids.values())) if isinstance(pids, dict) else pids, signal.SIGKILL)


def test_a_worker_that_is_killed_again_and_again_comes_back(tmp_path: Path) -> None:
    """Dask looks 15 s after a loss whether the worker is back; so this one is killed shortly before."""
    with killable(tmp_path, "north") as fed, fed.client() as client:
        kill_worker(client, "north")
        time.sleep(13.5)
        kill_worker(client, "north")
        time.sleep(5)
        assert client.submit(slow_inc, 1, pure=False).result(timeout=SOON_S) == 2


def test_work_leaves_a_site_that_gets_no_workers(fed: Killable) -> None:
    with fed.client() as client:
        client.wait_for_workers(2, timeout=SOON_S)
        futures = client.map(slow_inc, range(100), pure=False)
        bound = client.submit(slow_inc, 1, site="north", pure=False)
        bound.result(timeout=SOON_S)
        client.sync(client.scheduler.fed_cluster, site="north", method="scale", kwargs={"n": 0})
        assert sum(client.gather(futures)) == sum(range(1, 101))
        assert client.sites()["north"]["workers"] == 0
        only_north = client.submit(slow_inc, 2, site="north", pure=False)
        assert client.gather(client.map(slow_inc, range(4), pure=False)) == [1, 2, 3, 4]
        assert only_north.status == "pending"
        client.sync(client.scheduler.fed_cluster, site="north", method="scale", kwargs={"n": 1})
        assert only_north.result(timeout=SOON_S) == 3
