"""Sites that join late, drain and go, while clients work; what a Federation is as a Dask Cluster; the embedded default."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import futures_of, get_task_stream, wait

import daskfed
from daskfed import Client, Federation, at
from daskfed.errors import ConfigurationError
from tests.system.commands import NO_DASHBOARD, Command, site

pytestmark = pytest.mark.system
ONE = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
TASK_S = 0.1


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start sites that are killed after the test."""
    commands: list[Command] = []

    def started(name: str, address: str, *options: str) -> Command:
        commands.append(site(name, address, *options))
        return commands[-1]

    yield started
    for command in commands:
        command.kill()


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """One site, which others join."""
    with Federation({"north": {"options": ONE}}) as federation:
        yield federation


@pytest.fixture
def client(federation: Federation) -> Iterator[Client]:
    with Client(federation) as client:
        yield client


def slow(x: Any, *_: Any) -> Any:
    time.sleep(TASK_S)
    return x + 1


def slow_chain(n: int) -> Any:
    """A graph of several stages, none of which is short: n tasks, then n that need two of these each, then a sum."""
    first = [dask.delayed(slow)(i) for i in range(n)]
    second = [dask.delayed(slow)(one, other) for one, other in zip(first, first[1:] + first[:1], strict=True)]
    return dask.delayed(sum)(second)


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def gone(client: Client, name: str) -> Callable[[], bool]:
    return lambda: name not in client.sites()


# -- joining and leaving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "after_s", "least"),
    [(50, 0, 1), pytest.param(300, 10, 60, marks=[pytest.mark.slow, pytest.mark.timeout(240)])],
    ids=["a graph of 10 s", "10 s into a graph of 60 s"],
)
def test_a_site_that_joins_late_gets_work_of_a_running_graph(
    client: Client, federation: Federation, start: Callable[..., Command], n: int, after_s: float, least: int
) -> None:
    """The graph is cut and under way before anybody knows of the site, which then runs ``least`` of its tasks or more."""
    total = client.compute(slow_chain(n))
    wait_until(lambda: client.sites()["north"]["running"])
    time.sleep(after_s)
    late = start("late", federation.scheduler_address)
    late.line("site late joined")
    with get_task_stream(client) as stream:  # sites record their tasks from now on
        assert not total.done(), "the graph was over before the site joined: nothing was tested"
        assert total.result(timeout=100) == sum(range(n)) + 2 * n
    ran = Counter(record["worker"].split("/")[2] for record in stream.data if napped(record))
    assert ran["late"] >= least, f"it got too little to do: {ran}"
    late.press()
    assert late.wait() == 0
    wait_until(gone(client, "late"))
    assert client.submit(operator.add, 1, 1, pure=False).result(timeout=60) == 2


def napped(record: Any) -> bool:
    """Whether a record is of a call of ``slow``, and not of an import, which is a task by the same key."""
    return any(
        each["stop"] - each["start"] > TASK_S / 2 for each in record["startstops"] if each["action"] == "compute"
    )


def test_work_for_a_label_waits_for_the_site_that_will_have_it(
    client: Client, federation: Federation, start: Callable[..., Command]
) -> None:
    """A callable is evaluated now, a label whenever work is placed: also for sites that join later."""
    start("one", federation.scheduler_address, "--label", "disk=fast").line("joined")
    with at("disk=fast"):
        parts = [dask.delayed(slow)(i) for i in range(60)]
    futures = client.compute(parts)
    start("two", federation.scheduler_address, "--label", "disk=fast").line("joined")
    assert client.gather(futures) == list(range(1, 61))
    assert {client.explain(future)["site"] for future in futures} == {"one", "two"}


def test_a_draining_site_hands_its_keys_over_and_leaves(
    client: Client, federation: Federation, start: Callable[..., Command]
) -> None:
    """What it held can still be gathered and used, also what only it had: scattered data."""
    leaver = start("leaver", federation.scheduler_address)
    leaver.line("joined")
    with at("leaver"):
        x = da.random.RandomState(0).random_sample((400, 100), chunks=(100, 100))
        kept = client.persist(x * 2)
    scattered = client.scatter(np.arange(1000), site="leaver")
    wait([*futures_of(kept), scattered])
    values = kept.compute()
    assert all(client.explain(future)["sites"] == ["leaver"] for future in futures_of(kept))
    drain(client, "leaver")
    assert leaver.wait() == 0 and leaver.all_gone()
    assert "ends: drained" in leaver.output
    assert list(client.sites()) == ["north"]
    np.testing.assert_array_equal(kept.compute(), values)
    assert scattered.result().sum() == 499500
    assert client.submit(np.sum, scattered).result() == 499500
    assert float(kept.sum().compute()) == pytest.approx(values.sum())


def test_a_site_that_drains_while_work_runs_loses_nothing(
    client: Client, federation: Federation, start: Callable[..., Command]
) -> None:
    """Blocks that it has not started are taken back, the others are finished; then it leaves, before the work is over."""
    leaver = start("leaver", federation.scheduler_address)
    leaver.line("joined")
    calls = client.map(slow, range(200), pure=False)
    total = client.submit(sum, calls)
    wait_until(lambda: client.sites()["leaver"]["running"])
    drain(client, "leaver")
    wait_until(gone(client, "leaver"))
    assert not total.done(), "the work was over before the site had gone: nothing was tested"
    assert leaver.wait() == 0 and leaver.all_gone()
    assert total.result(timeout=100) == sum(range(200)) + 200


def drain(client: Client, name: str) -> None:
    client.sync(client.scheduler.fed_cluster, site=name, method="drain", kwargs={})


def test_a_federation_drains_one_of_its_sites() -> None:
    with Federation({"north": {"options": ONE}, "south": {"options": ONE}}) as federation:
        with Client(federation, set_as_default=False) as client:
            futures = client.map(operator.neg, range(20))
            assert len(client.gather(futures)) == 20
            federation.drain("south")
            wait_until(gone(client, "south"))
            assert client.gather(futures) == [-i for i in range(20)]
            with pytest.raises(ConfigurationError, match="no site.*'west'"):
                federation.drain("west")
        assert "sites: north, south" in repr(federation)


# -- a Dask Cluster ----------------------------------------------------------------------------------------------------


def test_scale_adapt_logs_and_repr(client: Client, federation: Federation) -> None:
    assert federation.name in repr(federation) and federation.scheduler_address in repr(federation)
    assert "sites: north" in repr(federation)
    federation.scale(2)
    wait_until(lambda: client.sites()["north"]["workers"] == 2)
    wait_until(lambda: "workers: 2" in repr(federation))
    assert len(federation.scheduler_info["workers"]) == 2
    client.wait_for_workers(2, timeout=60)
    logs = federation.get_logs(cluster=False, scheduler=False)
    assert len(logs) == 2 and all("127.0.0.1" in name for name in logs)
    federation.scale({"north": 1})
    wait_until(lambda: client.sites()["north"]["workers"] == 1)
    federation.scale(2, site="north")
    wait_until(lambda: client.sites()["north"]["workers"] == 2)
    federation.adapt(minimum=1, maximum=1)
    wait_until(lambda: client.sites()["north"]["workers"] == 1)
    with pytest.raises(ConfigurationError, match="no site.*'west'"):
        federation.scale(2, site="west")
    with pytest.raises(ConfigurationError, match="no site.*'west'"):
        federation.adapt(site="west")
    assert client.submit(operator.add, 1, 1, pure=False).result(timeout=60) == 2


def test_a_site_of_another_cluster_class(
    client: Client, federation: Federation, start: Callable[..., Command], tmp_path: Path
) -> None:
    """Its scheduler and workers are given by name, as JSON can say; it scales, and a site of another class takes its keys."""
    where = {"host": "127.0.0.1", "dashboard_address": ":0"}
    worker = {"cls": "distributed.Nanny", "options": {**where, "nthreads": 1}}
    scheduler = {"cls": "distributed.Scheduler", "options": {**where, "port": 0}}
    options = json.dumps({"scheduler": scheduler, "workers": {"first": worker}, "worker": worker})
    given = ("--cluster", "distributed.SpecCluster", "--options", options, "--directory", str(tmp_path))
    spec = start("spec", federation.scheduler_address, *given)
    spec.line("joined")
    assert client.submit(os.getcwd, site="spec", pure=False).result(timeout=60) == str(tmp_path)
    for n in (2, 1):
        client.sync(client.scheduler.fed_cluster, site="spec", method="scale", kwargs={"n": n})
        wait_until(lambda n=n: client.sites()["spec"]["workers"] == n)
    numbers = client.map(operator.neg, range(10), site="spec")
    assert client.submit(sum, numbers, site="north").result(timeout=60) == -45
    assert ("spec", "north") in client.transfers()
    spec.press()
    assert spec.wait() == 0 and spec.all_gone()


def test_options_that_a_cluster_refuses_to_scale_with(client: Client, federation: Federation) -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'minimum'"):
        federation.adapt(minimun=1, maximum=1)
    assert client.submit(operator.add, 1, 2, pure=False).result(timeout=60) == 3


def test_a_closed_federation_leaves_its_clients_with_an_error() -> None:
    federation = Federation({"here": {"options": {**ONE, "processes": False}}}, in_process=True)
    client = Client(federation, set_as_default=False)
    assert client.submit(operator.add, 1, 2).result() == 3
    federation.close()
    federation.close()
    assert federation.status.name == "closed"
    with pytest.raises(Exception, match="(?i)client (is|has) closed"):  # cancelled: it crossed the end
        client.submit(operator.add, 1, 3).result(timeout=20)
    client.close()
    with pytest.raises(OSError):
        Client(federation.scheduler_address, timeout=1, set_as_default=False)


def test_a_client_within_the_process_of_its_hub_needs_no_socket_to_it(federation: Federation) -> None:
    """And what it has submitted stays as it was then, as with one that has a socket."""
    with (
        Client(federation, set_as_default=False) as within,
        Client(federation.scheduler_address, set_as_default=False) as apart,
    ):
        assert within.scheduler_comm.comm.peer_address.startswith("inproc://")
        assert within.scheduler.address == apart.scheduler.address == federation.scheduler_address
        assert apart.scheduler_comm.comm.peer_address == federation.scheduler_address
        for client in (within, apart):
            values, deeper = [1], {"x": [1]}
            futures = [client.submit(sum, values, pure=False), *client.map(str, [values], pure=False)]
            futures += [client.submit(str, deeper, pure=False), client.compute(dask.delayed(str)(deeper, pure=False))]
            values.append(10)
            deeper["x"].append(10)
            assert client.gather(futures) == [1, "[1]", "{'x': [1]}", "{'x': [1]}"]
            with pytest.raises(ZeroDivisionError) as caught:
                client.submit(operator.truediv, 1, 0, pure=False).result(timeout=60)
            assert caught.traceback


def test_several_clients_at_once(federation: Federation) -> None:
    """Each has its own keys; what two want lives until both let go."""
    clients = [Client(federation, set_as_default=False) for _ in range(3)]
    try:
        mine = [client.map(pow, range(20), [i] * 20) for i, client in enumerate(clients)]
        shared = [client.submit(operator.add, 20, 22) for client in clients]
        for i, client in enumerate(clients):
            assert client.gather(mine[i]) == [x**i for x in range(20)]
            assert shared[i].result() == 42
        key = shared[0].key
        clients[0].close()
        assert shared[1].result() == 42 and clients[1].explain(key)["phase"] == "held"
        with pytest.raises(Exception, match="(?i)clos|cancel|not exist"):
            shared[0].result(timeout=5)
    finally:
        for client in clients:
            client.close()


# -- transfers ---------------------------------------------------------------------------------------------------------


def test_transfers_are_counted_with_their_bytes(
    client: Client, federation: Federation, start: Callable[..., Command]
) -> None:
    start("counted", federation.scheduler_address).line("joined")
    link = ("north", "counted")
    assert link not in client.transfers()
    data = client.map(np.full, [100_000] * 3, [1.0, 2.0, 3.0], site="north")
    total = client.submit(lambda parts: sum(part.sum() for part in parts), data, site="counted")
    assert total.result() == 600_000
    facts = client.transfers()[link]
    assert facts["count"] == 3 and 2_400_000 <= facts["nbytes"] < 2_500_000 and facts["seconds"] > 0
    assert ("counted", "north") not in client.transfers()


# -- the embedded default ----------------------------------------------------------------------------------------------

EMBEDDED = """
import dask, dask.array as da
from daskfed import Client

if __name__ == "__main__":
    client = Client()
    x = da.ones((100, 100), chunks=50)
    assert float((x + x.T).sum().compute()) == 20000
    (name,) = client.sites()
    workers = client.scheduler_info(n_workers=-1)["workers"]
    assert client.submit(abs, -1, workers=[next(iter(workers))]).result() == 1
    print("site", name, "workers", len(workers), "name", client.cluster.name)
    {end}
"""
BACKEND = """
import operator
import dask, dask.array as da, daskfed

if __name__ == "__main__":
    assert dask.compute(dask.delayed(operator.add)(1, 2), scheduler=daskfed.get) == (3,)
    with dask.config.set(scheduler=daskfed.get):
        assert float(da.ones((100, 100), chunks=50).sum().compute()) == 10000
    print("done")
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Command]]:
    """Run a program in an empty folder, without any configuration."""
    commands: list[Command] = []

    def run(text: str) -> Command:
        script = tmp_path / "program.py"
        script.write_text(text)
        commands.append(Command(sys.executable, str(script), cwd=tmp_path))
        return commands[-1]

    yield run
    for command in commands:
        command.kill()


@pytest.mark.parametrize("end", ["client.close()", "pass"], ids=["closed", "left open"])
def test_the_embedded_default(program: Callable[[str], Command], end: str) -> None:
    """No argument, no configuration; it ends with the program and leaves nothing behind."""
    command = program(EMBEDDED.replace("{end}", end))
    assert command.wait() == 0, command.output
    assert command.all_gone()
    command.line("site local workers [1-9]")
    assert "Traceback" not in command.output


def test_the_backend_without_a_client(program: Callable[[str], Command]) -> None:
    command = program(BACKEND)
    assert command.wait() == 0, command.output
    assert command.all_gone()
    assert "done" in command.output and "Traceback" not in command.output


def test_the_backend_uses_the_current_client(client: Client) -> None:
    with at("north"):
        call = dask.delayed(os.getpid)()
    (worker,) = client.scheduler_info(n_workers=-1)["workers"]
    (pid,) = dask.compute(call, scheduler=daskfed.get)
    assert pid == client.submit(os.getpid, workers=[worker], pure=False).result() != os.getpid()


def test_an_embedded_client_in_an_event_loop() -> None:
    async def work() -> int:
        async with Client(asynchronous=True, processes=False, n_workers=1, **NO_DASHBOARD) as client:
            assert list(await client.sites()) == ["local"]
            return await client.submit(operator.add, 20, 22)  # type: ignore[no-any-return]

    assert asyncio.run(asyncio.wait_for(work(), 60)) == 42
