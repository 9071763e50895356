"""Acting on workers: run, plugins, restarts and their like, over two sites and over the embedded default.

Each scenario runs with a synchronous and with an asynchronous client; ``await got(…)`` takes what either gives.
"""

from __future__ import annotations

import asyncio
import inspect
import operator
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from distributed import Nanny, NannyPlugin, SchedulerPlugin, Worker, WorkerPlugin, get_worker, wait
from distributed.core import Status

from daskfed import Client, Federation
from daskfed.errors import UnknownWorkerError
from tests.system import commands
from tests.system.canary import Canary, CanaryError, opened_by
from tests.system.commands import NO_DASHBOARD
from tests.system.killable import killable

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

SOON_S = 60.0  # for what takes a few seconds on a quiet machine
NORTH, SOUTH = 2, 1  # workers
LOST_WORKER = "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT"  # after which Dask's cluster gives up one that restarts

Scenario = Callable[[Any], Awaitable[Any]]
Do = Callable[[Scenario], Any]


def options(workers: int) -> dict[str, Any]:
    return {"n_workers": workers, "threads_per_worker": 1, **NO_DASHBOARD}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites, the workers of which have the same names."""
    os.environ[LOST_WORKER] = "1h"
    sites: dict[str, Any] = {
        name: {"options": options(count), "directory": tmp_path_factory.mktemp(name), "labels": {"at": name}}
        for name, count in (("north", NORTH), ("south", SOUTH))
    }
    with Federation(sites) as federation:
        yield federation
    del os.environ[LOST_WORKER]


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest, federation: Federation) -> Do:
    """Run a scenario with a client of either kind, once all workers are there."""
    return doing(request.param, federation.scheduler_address)


def doing(kind: str, address: str, workers: int = NORTH + SOUTH) -> Do:
    async def asynchronously(scenario: Scenario) -> Any:
        async with Client(address, asynchronous=True) as client:
            await client.wait_for_workers(workers, timeout=SOON_S)
            return await scenario(client)

    def do(scenario: Scenario) -> Any:
        if kind == "async":
            return asyncio.run(asynchronously(scenario))
        with Client(address) as client:
            client.wait_for_workers(workers, timeout=SOON_S)
            return asyncio.run(scenario(client))  # type: ignore[arg-type]

    return do


async def got(result: Any) -> Any:
    """Return what a method gives, of whichever client."""
    return await result if inspect.isawaitable(result) else result


async def addresses(client: Client) -> list[str]:
    """Return the addresses of all workers, those of north first."""
    return sorted(await got(client.nthreads()))


async def waited(futures: Any) -> None:
    await got(wait(futures, timeout=SOON_S))


async def put(client: Any, data: Any, **where: Any) -> Any:
    """Scatter data and return its future, which :func:`got` would take for its value."""
    future = client.scatter(data, **where)
    return await future if client.asynchronous else future


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    deadline = time.monotonic() + SOON_S
    while not await condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.05)


def site_of(address: str) -> str:
    return address.removeprefix("fed://").split("/")[0]


def plain(address: str) -> str:
    return "tcp://" + address.split("/")[-1]


def my_site() -> str:
    """Return the name of the working directory: the site's."""
    return os.path.basename(os.getcwd()).rstrip("0123456789")


def address_here(dask_worker: Any = None) -> str:
    return str(dask_worker.address)


def fails_at(site: str) -> str:
    if my_site() == site:
        raise ZeroDivisionError(f"on purpose at {site}")
    return my_site()


# -- run ---------------------------------------------------------------------------------------------------------------


def test_run_asks_every_worker_of_every_site(do: Do) -> None:
    async def scenario(client: Any) -> None:
        found = await got(client.run(address_here))
        assert {address: plain(address) for address in found} == found
        assert sorted(map(site_of, found)) == ["north"] * NORTH + ["south"] * SOUTH

    do(scenario)


def test_run_takes_workers_by_address_name_and_site(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *_, south = await addresses(client)
        for named in ([south], south, [plain(south)], [plain(south).removeprefix("tcp://")], ["south"], ["at=south"]):
            assert await got(client.run(my_site, workers=named)) == {south: "south"}, named
        assert set(await got(client.run(my_site, workers="north"))) == set(await addresses(client)) - {south}
        assert list((await got(client.run(my_site, workers=["1"]))).values()) == ["north"]  # the only one of that name
        assert await got(client.run(my_site, workers=[])) == {}

    do(scenario)


def test_a_name_of_several_sites_is_an_error_that_names_the_candidates(do: Do) -> None:
    async def scenario(client: Any) -> None:
        known = await addresses(client)
        for name in (0, "0"):
            with pytest.raises(ValueError, match="a worker named '0' is at several sites") as caught:
                await got(client.run(my_site, workers=[name]))
            candidates = [address for address in known if address in str(caught.value)]
            assert sorted(map(site_of, candidates)) == ["north", "south"]
        with pytest.raises(ValueError, match=r"a host '127.0.0.1' is at several sites"):
            await got(client.run(my_site, workers=["127.0.0.1"]))

    do(scenario)


def test_an_unknown_worker_is_an_error_that_names_those_there_are(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *_, south = await addresses(client)
        for act in (client.run, client.nthreads, client.has_what, client.processing, client.retire_workers):
            function = (my_site,) if act == client.run else ()
            with pytest.raises(UnknownWorkerError, match=f"no worker 'bob'; there are .*{south}"):
                await got(act(*function, workers=["bob"]))
        with pytest.raises(UnknownWorkerError, match="no worker 'bob'"):
            await got(client.restart_workers(["bob"]))

    do(scenario)


def test_run_on_nannies_and_with_coroutines(do: Do) -> None:
    async def pid() -> int:
        return os.getpid()

    async def scenario(client: Any) -> None:
        workers = await got(client.run(pid))
        nannies = await got(client.run(os.getpid, nanny=True))
        assert workers.keys() == nannies.keys() and not set(workers.values()) & set(nannies.values())

    do(scenario)


def test_run_without_waiting(do: Do, tmp_path: Path) -> None:
    async def touch(folder: Path) -> None:
        await asyncio.sleep(0.2)
        (folder / str(os.getpid())).touch()

    async def scenario(client: Any) -> None:
        assert await got(client.run(touch, tmp_path, wait=False)) is None

        async def all_did() -> bool:
            return len(list(tmp_path.iterdir())) == NORTH + SOUTH

        await until(all_did)

    do(scenario)


def test_a_function_that_fails_at_one_site(do: Do) -> None:
    async def scenario(client: Any) -> None:
        with pytest.raises(ZeroDivisionError, match="on purpose at south") as caught:
            await got(client.run(fails_at, "south"))
        assert "fails_at" in [entry.name for entry in caught.traceback]
        found = await got(client.run(fails_at, "south", on_error="return"))
        assert sorted(str(each) for each in found.values()) == ["north"] * NORTH + ["on purpose at south"] * SOUTH
        assert [type(each) for address, each in found.items() if site_of(address) == "south"] == [ZeroDivisionError]
        assert list((await got(client.run(fails_at, "south", on_error="ignore"))).values()) == ["north"] * NORTH
        with pytest.raises(ValueError, match="on_error must be 'raise'"):
            await got(client.run(fails_at, "south", on_error="nonsense"))

    do(scenario)


def test_functions_run_at_the_schedulers_of_sites(do: Do) -> None:
    def workers(dask_scheduler: Any = None) -> tuple[int, int]:
        return os.getpid(), len(dask_scheduler.workers)

    def failing(dask_scheduler: Any = None) -> None:
        if len(dask_scheduler.workers) == SOUTH:
            raise ZeroDivisionError("at the scheduler")

    async def scenario(client: Any) -> None:
        found = await got(client.run_on_scheduler(workers))
        assert {site: count for site, (_, count) in found.items()} == {"north": NORTH, "south": SOUTH}
        assert len({os.getpid(), *(pid for pid, _ in found.values())}) == 3  # the hub is in this process
        with pytest.raises(ZeroDivisionError, match="at the scheduler"):
            await got(client.run_on_scheduler(failing))

    do(scenario)


# -- what there is -----------------------------------------------------------------------------------------------------


def test_scheduler_info_and_threads(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        if not client.asynchronous:
            info = client.scheduler_info()
            assert sorted(info["workers"]) == [*north, south] and info["n_workers"] == NORTH + SOUTH
            assert {facts["status"] for facts in info["workers"].values()} == {"running"}
        assert await got(client.nthreads()) == dict.fromkeys([*north, south], 1) == await got(client.ncores())
        assert await got(client.nthreads(workers="north")) == dict.fromkeys(north, 1)
        assert await got(client.nthreads(workers=[south])) == {south: 1}
        with pytest.raises(TimeoutError):
            await got(client.wait_for_workers(NORTH + SOUTH + 1, timeout=0.5))

    do(scenario)


def test_where_keys_are(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        x = client.submit(bytes, 1000, workers=[north[0]], key="bytes-1")
        y = client.submit(bytes, 2000, workers=[south], key="bytes-2")
        await waited([x, y])
        assert await got(client.who_has([x, y])) == {"bytes-1": (north[0],), "bytes-2": (south,)}
        assert (await got(client.who_has()))["bytes-2"] == (south,)
        held = await got(client.has_what())
        assert held[north[0]] == ("bytes-1",) and held[south] == ("bytes-2",) and set(held) == {*north, south}
        assert await got(client.has_what(workers=[south])) == {south: ("bytes-2",)}
        sizes = await got(client.nbytes(summary=False))
        assert sizes["bytes-1"] >= 1000 and sizes["bytes-2"] >= 2000
        assert await got(client.nbytes()) == {"bytes": sum(sizes.values())}
        assert await got(client.nbytes(keys=["bytes-1"], summary=False)) == {"bytes-1": sizes["bytes-1"]}

    do(scenario)


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def test_what_runs_and_where_in_its_code(do: Do, tmp_path: Path) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        x = client.submit(wait_for_file, tmp_path / "go", workers=[south], key="x")
        after = client.submit(lambda _: 1, x, key="after")

        async def runs() -> bool:
            return bool((await got(client.processing()))[south])

        await until(runs)
        assert await got(client.processing()) == {south: ("x",)} | dict.fromkeys(north, ())
        assert await got(client.processing(workers="north")) == dict.fromkeys(north, ())
        for stacks in (client.call_stack([x]), client.call_stack(after), client.call_stack(keys=["x"])):
            found = await got(stacks)
            assert set(found) == {south} and set(found[south]) == {"x"}
            assert any("wait_for_file" in line for line in found[south]["x"])
        assert "x" in (await got(client.call_stack()))[south]
        (tmp_path / "go").touch()
        assert await got(after.result()) == 1
        assert await got(client.call_stack([x])) == {}

    do(scenario)


def test_logs(do: Do) -> None:
    def shout(dask_worker: Any = None) -> None:
        import logging

        logging.getLogger("distributed.worker").warning("a shout")

    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        await got(client.run(shout, workers=[south]))
        logs = await got(client.get_worker_logs())
        assert set(logs) == {*north, south} and any("a shout" in line for _, line in logs[south])
        assert set(await got(client.get_worker_logs(n=1, workers="south"))) == {south}
        nannies = await got(client.get_worker_logs(workers=[south], nanny=True))
        assert any("nanny" in line for _, line in nannies[south])
        lines = [line for _, line in await got(client.get_scheduler_logs())]
        assert {line.split(":")[0] for line in lines} == {"north", "south"}
        assert len(await got(client.get_scheduler_logs(n=1))) == 2

    do(scenario)


def test_the_active_memory_managers(do: Do) -> None:
    def running(dask_scheduler: Any = None) -> bool:
        return bool(dask_scheduler.extensions["amm"].running)

    async def scenario(client: Any) -> None:
        await got(client.amm.stop())
        assert await got(client.amm.running()) is False
        assert await got(client.run_on_scheduler(running)) == {"north": False, "south": False}
        await got(client.amm.start())
        assert await got(client.amm.running()) is True
        assert await got(client.amm.run_once()) is None

    do(scenario)


def test_versions(do: Do) -> None:
    async def scenario(client: Any) -> None:
        found = await got(client.get_versions(check=True, packages=["pytest"]))
        assert set(found["scheduler"]) == {"north", "south"} and set(found["workers"]) == set(await addresses(client))
        everybody = (*found["scheduler"].values(), *found["workers"].values(), found["client"])
        assert {each["packages"]["pytest"] for each in everybody} == {pytest.__version__}

    do(scenario)


def test_versions_that_differ_are_told_by_site(do: Do) -> None:
    async def old(dask_worker: Any = None) -> None:
        own = type(dask_worker).versions

        async def versions(packages: Any = None) -> Any:
            found = await got(own(dask_worker, packages=packages))
            return {**found, "packages": {**found["packages"], "numpy": "0.1"}}

        dask_worker.handlers["versions"] = versions

    async def mended(dask_worker: Any = None) -> None:
        dask_worker.handlers["versions"] = dask_worker.versions

    async def scenario(client: Any) -> None:
        await got(client.run(old, workers=["south"]))
        try:
            with pytest.warns(UserWarning, match="(?s)At site 'south': .*numpy.*0.1") as warned:
                await got(client.get_versions(check=True))
            assert not [each for each in warned if "north" in str(each.message)]
        finally:
            await got(client.run(mended, workers=["south"]))

    do(scenario)


# -- tasks at workers --------------------------------------------------------------------------------------------------


def ran_at(*_: Any) -> str:
    return str(get_worker().address)


def test_tasks_run_at_the_workers_that_they_name(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        for worker in (north[0], south, plain(south), plain(north[0]).removeprefix("tcp://")):
            found = await got(client.submit(ran_at, pure=False, workers=worker).result())
            assert found == "tcp://" + worker.split("/")[-1]
        assert await got(client.submit(ran_at, pure=False, workers=["1"]).result()) in map(plain, north)
        found = await got(client.gather(client.map(ran_at, range(4), pure=False, workers=[south, plain(north[0])])))
        assert set(found) <= {plain(south), plain(north[0])}
        for site, there in (("north", north), ("south", [south])):
            found = await got(client.gather(client.map(ran_at, range(4), pure=False, workers=site)))
            assert set(found) <= set(map(plain, there))

    do(scenario)


def test_collections_run_at_the_workers_that_they_name(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        x = da.ones(20, chunks=5)
        persisted = client.persist(x + 1, workers=[south])
        await waited(persisted)
        assert set((await got(client.who_has(persisted))).values()) == {(south,)}
        assert await got(client.compute((x + 1).sum(), workers="north").result()) == 40
        with dask.annotate(workers=plain(north[1])):
            chosen = dask.delayed(ran_at)(1)
        with dask.annotate(workers="south"):
            south_too = dask.delayed(ran_at)(chosen)
        assert await got(client.compute(chosen).result()) == plain(north[1])
        assert await got(client.compute(south_too).result()) == plain(south)

    do(scenario)


def test_data_is_put_at_the_workers_that_are_named(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        for n, worker in enumerate((north[1], plain(north[0]), south, "1")):
            future = await put(client, f"data {n} {client.id}", workers=worker)
            ((there,),) = (await got(client.who_has(future))).values()
            assert there == worker or plain(there) == worker or (worker == "1" and there in north)
        future = await put(client, f"data {client.id}", workers="south")
        assert list((await got(client.who_has(future))).values()) == [(south,)]
        with pytest.raises(ValueError, match="no worker 'bob'"):
            await put(client, 1, workers=["bob"])

    do(scenario)


@pytest.mark.parametrize("worker", ["bob", "0", "fed://south/127.0.0.1:1"])
def test_tasks_for_a_worker_that_none_or_several_sites_have_fail(do: Do, worker: str) -> None:
    async def scenario(client: Any) -> None:
        problem = f"worker.* '{worker}'.*fed://"
        with pytest.raises(UnknownWorkerError, match=problem):
            await got(client.submit(ran_at, pure=False, workers=[worker]).result())
        with pytest.raises(UnknownWorkerError, match=problem):
            await got(client.compute(da.ones(4, chunks=2).sum(), workers=[worker]).result())
        with dask.annotate(workers=worker):
            lazy = dask.delayed(ran_at)(2)
        with pytest.raises(UnknownWorkerError, match=problem):
            await got(client.compute(lazy).result())
        assert await got(client.submit(operator.add, 1, 1, pure=False).result()) == 2

    do(scenario)


def test_a_preference_for_workers_is_none_for_sites(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *_, south = await addresses(client)
        preferred = client.submit(ran_at, pure=False, workers=[south], allow_other_workers=True)
        assert await got(preferred.result()) in map(plain, await addresses(client))

    do(scenario)


# -- plugins -----------------------------------------------------------------------------------------------------------


class Badge(WorkerPlugin):
    """Marks its worker; fails at the site ``bad_site``."""

    def __init__(self, badge: str, bad_site: str = "") -> None:
        self.name = "badge"
        self.badge = badge
        self.bad_site = bad_site

    def setup(self, worker: Worker) -> None:
        if my_site() == self.bad_site:
            raise ZeroDivisionError(f"no badge at {self.bad_site}")
        worker.badges = [*getattr(worker, "badges", ()), self.badge]  # type: ignore[attr-defined]

    def teardown(self, worker: Worker) -> None:
        worker.badges = []  # type: ignore[attr-defined]


def badges(dask_worker: Any = None) -> list[str]:
    return list(getattr(dask_worker, "badges", ()))


def test_worker_plugins(do: Do) -> None:
    async def scenario(client: Any) -> None:
        known = await addresses(client)
        assert await got(client.register_plugin(Badge("one"))) == dict.fromkeys(known, {"status": "OK"})
        assert await got(client.run(badges)) == dict.fromkeys(known, ["one"])
        await got(client.register_plugin(Badge("two")))  # in place of the other
        assert await got(client.run(badges)) == dict.fromkeys(known, ["two"])
        gone = await got(client.unregister_worker_plugin("badge"))
        assert gone == dict.fromkeys(known, {"status": "OK"})
        assert await got(client.run(badges)) == dict.fromkeys(known, [])
        with pytest.raises(ValueError, match="The worker plugin badge does not exist"):
            await got(client.unregister_worker_plugin("badge"))

    do(scenario)


def test_a_worker_plugin_that_fails_at_one_site(do: Do) -> None:
    async def scenario(client: Any) -> None:
        with pytest.raises(ZeroDivisionError, match="no badge at south"):
            await got(client.register_plugin(Badge("one", bad_site="south")))
        assert sorted(map(len, (await got(client.run(badges))).values())) == [0] * SOUTH + [1] * NORTH
        await got(client.unregister_worker_plugin("badge"))

    do(scenario)


class Sign(NannyPlugin):
    name = "sign"

    def setup(self, nanny: Nanny) -> None:
        nanny.sign = "here"  # type: ignore[attr-defined]

    def teardown(self, nanny: Nanny) -> None:
        del nanny.sign  # type: ignore[attr-defined]


def signs(dask_worker: Any = None) -> str:
    return getattr(dask_worker, "sign", "")


def test_nanny_plugins(do: Do) -> None:
    async def scenario(client: Any) -> None:
        known = await addresses(client)
        assert await got(client.register_plugin(Sign())) == dict.fromkeys(known, {"status": "OK"})
        assert await got(client.run(signs, nanny=True)) == dict.fromkeys(known, "here")
        await got(client.unregister_worker_plugin("sign", nanny=True))
        assert await got(client.run(signs, nanny=True)) == dict.fromkeys(known, "")

    do(scenario)


class Counting(SchedulerPlugin):
    name = "counting"
    idempotent = True

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.count = 0

    async def start(self, scheduler: Any) -> None:
        if self.fails and len(scheduler.workers) == SOUTH:
            raise ZeroDivisionError("it does not start at south")

    def transition(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def counts(dask_scheduler: Any = None) -> int:
    plugin = dask_scheduler.plugins.get("counting")
    return -1 if plugin is None else plugin.count


def test_scheduler_plugins(do: Do) -> None:
    async def scenario(client: Any) -> None:
        await got(client.register_plugin(Counting()))
        await waited([client.submit(ran_at, pure=False, workers=site) for site in ("north", "south")])
        assert all(count > 0 for count in (await got(client.run_on_scheduler(counts))).values())
        await got(client.register_plugin(Counting()))  # it is idempotent: the one that counts stays
        assert all(count > 0 for count in (await got(client.run_on_scheduler(counts))).values())
        await got(client.unregister_scheduler_plugin("counting"))
        assert await got(client.run_on_scheduler(counts)) == {"north": -1, "south": -1}
        with pytest.raises(ValueError, match="The scheduler plugin counting does not exist"):
            await got(client.unregister_scheduler_plugin("counting"))

    do(scenario)


def test_a_scheduler_plugin_that_one_site_cannot_start_is_nowhere(do: Do) -> None:
    async def scenario(client: Any) -> None:
        with pytest.raises(ZeroDivisionError, match="it does not start at south"):
            await got(client.register_plugin(Counting(fails=True)))

        async def nowhere() -> bool:
            return bool(await got(client.run_on_scheduler(counts)) == {"north": -1, "south": -1})

        await until(nowhere)

    do(scenario)


def test_a_file_is_uploaded_to_all_sites(do: Do, tmp_path: Path) -> None:
    def value(name: str, _: int) -> str:
        return str(__import__(name).VALUE)

    async def scenario(client: Any) -> None:
        name = f"uploaded_{os.getpid()}_{client.id.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text("VALUE = 'it came'\n")
        found = await got(client.upload_file(str(tmp_path / f"{name}.py")))
        assert set(found) == set(await addresses(client))
        for site in ("north", "south"):
            assert await got(client.submit(value, name, 1, pure=False, workers=site).result()) == "it came"
        assert await got(client.run_on_scheduler(lambda n: __import__(n).VALUE, name)) == {
            "north": "it came",
            "south": "it came",
        }
        assert name not in sys.modules

    do(scenario)


def test_sites_that_join_later_have_the_plugins_before_they_get_work(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "module_for_late.py").write_text("VALUE = 41\n")
    with Client(federation) as client:
        client.register_plugin(Badge("one"))
        client.register_plugin(Counting())
        client.register_plugin(Sign())
        client.upload_file(str(tmp_path / "module_for_late.py"))
        late = commands.site("late", federation.scheduler_address)
        try:
            assert late.line("site late joined")
            assert client.submit(lambda: __import__("module_for_late").VALUE, site="late").result(timeout=SOON_S) == 41
            assert list(client.run(badges, workers="late").values()) == [["one"]]
            assert list(client.run(signs, workers="late", nanny=True).values()) == ["here"]
            assert client.run_on_scheduler(counts)["late"] >= 0
            client.unregister_worker_plugin("badge")
            assert list(client.run(badges, workers="late").values()) == [[]]
        finally:
            late.press()
            late.wait()
            late.kill()
        client.unregister_scheduler_plugin("counting")
        client.unregister_worker_plugin("sign", nanny=True)


def test_workers_that_join_later_have_the_plugins(federation: Federation) -> None:
    with Client(federation) as client:
        client.register_plugin(Badge("one"))
        federation.scale(NORTH + 1, site="north")
        client.wait_for_workers(NORTH + SOUTH + 1, timeout=SOON_S)
        assert list(client.run(badges).values()) == [["one"]] * (NORTH + SOUTH + 1)
        federation.scale(NORTH, site="north")
        deadline = time.monotonic() + SOON_S
        while len(client.nthreads()) > NORTH + SOUTH:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.unregister_worker_plugin("badge")  # a worker that is closing no longer has it: KeyError, as in Dask


# -- restarting and retiring -------------------------------------------------------------------------------------------


def test_restart_cancels_everything_and_renews_all_workers(do: Do) -> None:
    async def scenario(client: Any) -> None:
        pids = set((await got(client.run(os.getpid))).values())
        done, running = client.submit(operator.add, 1, 2), client.submit(time.sleep, 100)
        data = await put(client, f"data {client.id}")
        assembled = client.compute(da.ones(4, chunks=2))
        await waited([done, assembled])
        await got(client.restart(timeout=SOON_S))
        assert {future.status for future in (done, running, data, assembled)} == {"cancelled"}
        assert len(pids | set((await got(client.run(os.getpid))).values())) == 2 * (NORTH + SOUTH)
        assert await got(client.who_has()) == {} and await got(client.nbytes()) == {}
        assert await got(client.submit(operator.add, 1, 2).result()) == 3
        assert list(await got(client.compute(da.ones(4, chunks=2)).result())) == [1] * 4
        for site in ("north", "south"):
            assert await got(client.submit(ran_at, pure=False, workers=site).result())

    do(scenario)


def test_another_client_hears_of_a_restart(federation: Federation) -> None:
    with Client(federation) as client, Client(federation) as other:
        future = other.submit(operator.add, 2, 2)
        assert future.result() == 4
        client.restart(timeout=SOON_S)
        assert future.status == "cancelled"
        assert other.submit(operator.add, 2, 2).result() == 4


def test_what_restarted_workers_held_is_made_again(do: Do) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        x = client.submit(operator.add, 40, 1, workers="north", pure=False)
        y = client.submit(operator.add, x, 1, workers="south", pure=False)  # south holds a copy of x too
        await waited(y)
        assert await got(client.restart_workers([south], timeout=SOON_S)) == {south: "OK"}
        assert await got(client.gather([x, y])) == [41, 42]
        assert await got(client.restart_workers(["south"], timeout=SOON_S)) == {"south": "OK"}
        found = await got(client.restart_workers(["north"], timeout=SOON_S))
        assert found == dict.fromkeys(north, "OK")
        assert await got(client.gather([x, y])) == [41, 42]
        assert await got(client.submit(operator.add, y, 1, pure=False).result()) == 43

    do(scenario)


def test_retired_workers_leave_their_keys(do: Do, federation: Federation) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)
        ran = client.submit(lambda: os.getpid(), workers=[north[0]], pure=False)
        data = await put(client, f"data {client.id}", workers=[north[0]])
        await waited(ran)
        pid = await got(ran.result())
        assert set(await got(client.retire_workers([north[0]]))) == {north[0]}
        assert await addresses(client) == [north[1], south]
        assert await got(client.gather([ran, data])) == [pid, f"data {client.id}"]  # it did not run again
        assert set((await got(client.who_has([ran, data]))).values()) == {(north[1],)}

    do(scenario)
    federation.scale(1, site="north")  # its Dask cluster still counts the one that is gone
    federation.scale(NORTH, site="north")


def test_a_number_of_workers_to_retire_is_one_of_all_sites(federation: Federation) -> None:
    with Client(federation) as client:
        client.wait_for_workers(NORTH + SOUTH, timeout=SOON_S)
        (gone,) = client.retire_workers(n=1)
        assert site_of(gone) == "north"
        assert sorted(map(site_of, client.nthreads())) == ["north", "south"]
        assert client.retire_workers(minimum=2) == {}
        with pytest.raises(TypeError, match="mutually exclusive"):
            client.retire_workers([gone], names=["0"])
    federation.scale(1, site="north")
    federation.scale(NORTH, site="north")


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keeping_copies(federation: Federation) -> Iterator[None]:
    """Keep the memory managers from dropping what looks like one copy too many."""
    with Client(federation) as client:
        client.wait_for_workers(NORTH + SOUTH, timeout=SOON_S)
        client.amm.stop()
        yield
        client.amm.start()


def test_replicate(do: Do, keeping_copies: None) -> None:
    async def scenario(client: Any) -> None:
        *north, south = await addresses(client)

        async def at(future: Any) -> list[str]:
            ((workers),) = (await got(client.who_has(future))).values()
            return sorted(workers)

        x = client.submit(operator.add, 1, 1, workers=[south], pure=False)
        y = client.submit(operator.add, 1, 2, workers=[north[0]], pure=False)
        await waited([x, y])
        await got(client.replicate([x]))
        assert await at(x) == [*north, south]
        await got(client.replicate([y], n=2))
        assert await at(y) == north  # the site that has it comes first
        await got(client.replicate([y], workers=[south]))
        assert await at(y) == [*north, south]
        assembled = client.compute(da.ones(4, chunks=2))
        await got(client.replicate([assembled]))
        with pytest.raises(ValueError, match="Can not use replicate to delete data"):
            await got(client.replicate([x], n=0))

    do(scenario)


def test_rebalance(do: Do, keeping_copies: None) -> None:
    async def scenario(client: Any) -> None:
        *north, _ = await addresses(client)
        futures = client.map(os.urandom, [20_000_000] * 6, workers=[north[0]], pure=False)
        await waited(futures)
        values = await got(client.gather(futures))
        await got(client.rebalance(futures))
        await got(client.rebalance(workers="north"))
        holders = (await got(client.who_has(futures))).values()
        assert all(len(workers) == 1 and site_of(workers[0]) == "north" for workers in holders)
        assert await got(client.gather(futures)) == values

    do(scenario)


# -- what is gone, what starts anew, who opens what --------------------------------------------------------------------


class Chirping(WorkerPlugin):
    """Carries a canary."""

    name = "chirping"

    def __init__(self, canary: Canary) -> None:
        self.canary = canary


class ChirpingScheduler(SchedulerPlugin):
    name = "chirping-scheduler"

    def __init__(self, canary: Canary) -> None:
        self.canary = canary


class ChirpingNanny(NannyPlugin):
    name = "chirping-nanny"

    def __init__(self, canary: Canary) -> None:
        self.canary = canary


def sing(canary: Canary, folder: Path, fails: bool = False) -> Canary:
    if fails:
        raise CanaryError(folder)
    return canary


def test_a_site_that_dies_and_a_hub_that_starts_anew(tmp_path: Path) -> None:
    """The plugins are kept, what dies is left out, and hub and agents open nothing."""
    folder = tmp_path / "opened"
    folder.mkdir()
    canary = Canary(folder, 1)
    with killable(tmp_path, "north", "south") as federation:
        with federation.client() as client:
            client.register_plugin(Badge("one"))
            client.register_plugin(Counting())
            for plugin in (Chirping(canary), ChirpingScheduler(canary), ChirpingNanny(canary)):
                client.register_plugin(plugin)
            assert list(client.run(sing, canary, folder).values()) == [canary] * 2
            assert set(client.run_on_scheduler(sing, canary, folder).values()) == {canary}
            for act in (client.run, client.run_on_scheduler):
                with pytest.raises(CanaryError):
                    act(sing, canary, folder, fails=True)
            federation.kill_hub()
            client.wait_for_workers(2, timeout=SOON_S)
            assert list(client.run(badges).values()) == [["one"]] * 2  # not set up again
            federation.add("late")
            client.wait_for_workers(3, timeout=SOON_S)
            assert list(client.run(badges, workers="late").values()) == [["one"]]
            assert client.run_on_scheduler(counts).keys() == {"north", "south", "late"}
            south = next(iter(client.nthreads(workers="south")))
            federation.kill_site("south")
            assert sorted(map(site_of, client.run(badges))) == ["late", "north"]
            assert sorted(map(site_of, client.nthreads())) == ["late", "north"]
            with pytest.raises(UnknownWorkerError, match="no worker 'fed://south"):
                client.run(badges, workers=[south])
            assert client.run_on_scheduler(counts).keys() == {"north", "late"}
        opened = opened_by(folder)
        agents = {command.process.pid for command in (*federation.sites.values(), *federation.all)}
        assert opened and not opened & agents


# -- the embedded default ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Iterator[Client]:
    with Client(**options(2)) as client:
        yield client


def test_embedded_is_as_stock(embedded: Client) -> None:
    """Plain addresses, values rather than dicts by site, and names of workers."""
    one, other = sorted(embedded.scheduler_info()["workers"])
    assert one.startswith("tcp://") and embedded.run(address_here) == {one: one, other: other}
    assert embedded.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.workers)) == 2
    assert embedded.run(address_here, workers=[one]) == {one: one} == embedded.run(address_here, workers=one)
    (named,) = embedded.run(lambda dask_worker: dask_worker.name, workers=["1"]).values()
    assert str(named) == "1"
    assert embedded.submit(ran_at, pure=False, workers=other).result() == other
    assert embedded.submit(ran_at, pure=False, workers="local").result() in (one, other)
    assert embedded.run(address_here, workers="local").keys() == {one, other}
    future = embedded.scatter(5, workers=[one])
    assert embedded.who_has(future) == {future.key: (one,)}
    assert embedded.has_what(workers=[one]) == {one: (future.key,)}
    assert embedded.nthreads() == {one: 1, other: 1} and embedded.nbytes(summary=False).keys() == {future.key}
    assert embedded.processing() == {one: (), other: ()} and embedded.call_stack() == {}
    embedded.amm.stop()
    embedded.replicate([future])
    assert set(embedded.who_has(future)[future.key]) == {one, other}
    embedded.amm.start()
    assert embedded.amm.running() is True
    embedded.rebalance([future])
    assert {"client", "scheduler", "workers"} == embedded.get_versions(check=True).keys()
    assert embedded.get_versions()["scheduler"]["packages"]
    assert set(embedded.get_worker_logs()) == {one, other} and embedded.get_scheduler_logs(n=2)


def test_embedded_plugins(embedded: Client, tmp_path: Path) -> None:
    known = embedded.nthreads().keys()
    assert embedded.register_plugin(Badge("one")).keys() == known == embedded.register_plugin(Sign()).keys()
    embedded.register_plugin(Counting())
    assert embedded.run_on_scheduler(counts) >= 0
    assert embedded.run(badges) == dict.fromkeys(known, ["one"])
    embedded.unregister_worker_plugin("badge")
    embedded.unregister_worker_plugin("sign", nanny=True)
    embedded.unregister_scheduler_plugin("counting")
    assert embedded.run_on_scheduler(counts) == -1
    (tmp_path / "module_for_embedded.py").write_text("VALUE = 7\n")
    assert embedded.upload_file(str(tmp_path / "module_for_embedded.py")).keys() == known
    assert embedded.submit(lambda: __import__("module_for_embedded").VALUE).result() == 7
    with pytest.raises(ZeroDivisionError):
        embedded.run(operator.truediv, 1, 0)


def test_embedded_restarts() -> None:
    with Client(**options(2)) as client:
        pids = set(client.run(os.getpid).values())
        x = client.submit(operator.add, 1, 1)
        one, other = sorted(client.nthreads())
        assert x.result() == 2
        assert client.restart_workers([one, other], timeout=SOON_S) == {one: "OK", other: "OK"}
        assert x.result() == 2
        client.restart(timeout=SOON_S)
        assert x.status == "cancelled" and len(pids | set(client.run(os.getpid).values())) == 4
        y = client.submit(operator.add, 1, 1)
        assert y.result() == 2
        (one, *_) = sorted(client.nthreads())
        assert set(client.retire_workers([one])) == {one} and y.result() == 2


def test_embedded_asynchronously() -> None:
    async def scenario() -> None:
        async with Client(asynchronous=True, **options(1)) as client:
            await client.wait_for_workers(1, timeout=SOON_S)
            ((address, same),) = (await client.run(address_here)).items()
            assert address == same and await client.nthreads() == {address: 1}
            assert await client.run_on_scheduler(lambda dask_scheduler: str(dask_scheduler.status)) == str(Status.running)
            await client.register_plugin(Badge("one"))
            assert await client.run(badges) == {address: ["one"]}
            assert await client.submit(ran_at, workers=[address]) == address
            assert await client.restart_workers([address], timeout=SOON_S) == {address: "OK"}
            assert list((await client.run(badges)).values()) == [["one"]]

    asyncio.run(scenario())
