"""Actors live at one site; whoever calls them, from wherever, is brought to their worker."""

from __future__ import annotations

import asyncio
import gc
import json
import operator
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import ActorFuture, get_client, get_worker, wait
from distributed.actor import Actor

from daskfed import Client, Federation, at
from tests.system import commands, namespaces
from tests.system.commands import NO_DASHBOARD, Command
from tests.system.killable import killable

pytestmark = pytest.mark.system

ONE = {"n_workers": 1, "processes": False, "protocol": "tcp://", "threads_per_worker": 2, **NO_DASHBOARD}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two sites of one worker each, in folders of their names."""
    with Federation(sites={name: {"options": ONE, "labels": {"at": name}} for name in ("north", "south")}) as fed:
        yield fed


class Counter:
    """An actor that counts."""

    n = 0  # as in Dask, only attributes that the class has can be asked for

    def __init__(self, start: int = 0) -> None:
        self.n = start

    def increment(self, by: int = 1) -> int:
        self.n += by
        return self.n

    async def add_slowly(self, by: int) -> int:
        await asyncio.sleep(0.01)
        self.n += by
        return self.n

    def where(self) -> str:
        return str(get_worker().scheduler.address)

    def fail(self) -> None:
        raise ZeroDivisionError("an actor's")

    def echo(self, value: Any) -> Any:
        return value

    def wait(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def call(self, other: Any, by: int) -> int:
        return int(other.increment(by).result(timeout=10))

    def get_n(self) -> int:
        return self.n


class Holder:
    """An actor that was given something large."""

    def __init__(self, n: int, large: bytes) -> None:
        self.large = large

    def size(self) -> int:
        return len(self.large)


class Broken:
    """An actor that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no actor today")


def scheduler_here() -> str:
    return str(get_worker().scheduler.address)


def scheduler_at(client: Client, site: str) -> str:
    return str(client.submit(scheduler_here, site=site, pure=False).result(timeout=20))


def worker_at(client: Client, site: str) -> str:
    return next(each for each in client.scheduler_info()["workers"] if each.startswith(f"fed://{site}/"))


def increment(actor: Any, by: int = 1) -> int:
    return int(actor.increment(by).result(timeout=10))


def attribute(actor: Any) -> int:
    return int(actor.n)


@pytest.fixture(params=["north", "south"])
def site(request: pytest.FixtureRequest) -> str:
    """A site."""
    return str(request.param)


class TestCalls:
    def test_methods_attributes_and_keywords(self, client: Client, site: str) -> None:
        future = client.submit(Counter, 5, actor=True, site=site)
        counter = future.result()
        assert isinstance(counter, Actor) and repr(counter).startswith("<Actor: Counter")
        assert {"n", "increment"} <= set(dir(counter))
        call = counter.increment()
        assert isinstance(call, ActorFuture) and call.result() == 6 and call.done()
        assert counter.increment(by=10).result() == 16
        assert counter.n == 16
        assert counter.add_slowly(4).result() == 20

    def test_they_run_at_the_site_of_the_actor(self, client: Client, site: str) -> None:
        counter = client.submit(Counter, actor=True, site=site).result()
        assert counter.where().result() == client.submit(scheduler_here, site=site, pure=False).result()
        assert client.explain(counter.key)["sites"] == [site]

    def test_each_actor_has_a_state_of_its_own(self, client: Client) -> None:
        futures = client.map(Counter, range(0, 40, 10), actor=True)
        counters = client.gather(futures)
        assert [counter.increment().result() for counter in counters] == [1, 11, 21, 31]
        assert [counter.increment().result() for counter in counters] == [2, 12, 22, 32]
        one, other = (client.submit(Counter, actor=True) for _ in range(2))
        assert one.key != other.key

    def test_calls_of_one_actor_come_in_order(self, client: Client, site: str) -> None:
        counter = client.submit(Counter, actor=True, site=site).result()
        calls = [counter.increment() for _ in range(50)]
        assert sorted(call.result() for call in calls) == list(range(1, 51)) and counter.n == 50

    def test_many_slow_calls_do_not_keep_others_waiting(self, client: Client, site: str) -> None:
        counters = client.gather([client.submit(Counter, actor=True, site=site, pure=False) for _ in range(12)])
        calls = [counter.wait(0.2) for counter in counters]
        assert client.submit(operator.add, 1, 2, site=site, pure=False).result(timeout=5) == 3
        assert [call.result(timeout=20) for call in calls] == [0.2] * 12

    def test_values_go_and_come(self, client: Client, site: str) -> None:
        np = pytest.importorskip("numpy")
        counter = client.submit(Counter, actor=True, site=site).result()
        big = np.arange(200_000)
        assert (counter.echo(big).result() == big).all()
        assert counter.echo({"x": (1, None), "f": operator.add}).result() == {"x": (1, None), "f": operator.add}

    def test_errors(self, client: Client, site: str) -> None:
        counter = client.submit(Counter, actor=True, site=site).result()
        with pytest.raises(ZeroDivisionError, match="an actor's"):
            counter.fail().result()
        with pytest.raises(AttributeError, match="no_such"):
            counter.no_such()
        with pytest.raises(TypeError):
            counter.increment(1, 2, 3).result()
        with pytest.raises(TimeoutError):
            counter.wait(0.5).result(timeout=0.05)
        assert counter.increment().result() == 1

    def test_one_that_cannot_be_made(self, client: Client) -> None:
        with pytest.raises(RuntimeError, match="no actor today"):
            client.submit(Broken, actor=True).result()

    def test_a_graph_with_an_actor(self, client: Client) -> None:
        lazy = dask.delayed(Counter)(3)
        counter = client.compute(lazy, actors=lazy).result()
        assert counter.increment().result() == 4

    @pytest.mark.parametrize("named", ["site", "a worker's address", "a site's name", "at"])
    def test_a_map_is_bound_to_where_it_is_to_run(self, client: Client, site: str, named: str) -> None:
        how: dict[str, Any] = {"site": site} if named == "site" else {}
        if named == "a site's name":
            how = {"workers": site}
        elif named == "a worker's address":
            how = {"workers": [worker_at(client, site)]}
        with at(site) if named == "at" else nullcontext():
            futures = client.map(Counter, range(20), actors=True, pure=False, **how)
        counters = client.gather(futures)
        assert {counter.where().result() for counter in counters} == {scheduler_at(client, site)}
        assert [counter.increment().result() for counter in counters] == list(range(1, 21))

    def test_a_map_with_a_large_argument_that_all_share(self, client: Client) -> None:
        futures = client.map(Holder, range(20), large=b"x" * 200_000, actors=True, pure=False)
        assert [holder.size().result() for holder in client.gather(futures)] == [200_000] * 20

    @pytest.mark.parametrize("named", ["a worker's address", "a site's name", "at"])
    def test_a_graph_is_bound_to_where_it_is_to_run(self, client: Client, site: str, named: str) -> None:
        how: dict[str, Any] = {"a worker's address": {"workers": [worker_at(client, site)]}}.get(named, {})
        if named == "a site's name":
            how = {"workers": site}
        with at(site) if named == "at" else nullcontext():
            lazy = [dask.delayed(Counter, pure=False)(dask.delayed(operator.add, pure=False)(n, 0)) for n in range(4)]
        counters = client.gather(client.compute(lazy, actors=tuple(lazy), **how))
        assert {counter.where().result() for counter in counters} == {scheduler_at(client, site)}
        assert [counter.increment().result() for counter in counters] == [1, 2, 3, 4]

    def test_actors_of_one_graph_at_both_sites(self, client: Client) -> None:
        lazy = []
        for each in ("north", "south"):
            with at(each):
                lazy.append(dask.delayed(Counter, pure=False)(3))
        counters = client.gather(client.compute(lazy, actors=True))
        assert [counter.where().result() for counter in counters] == [
            scheduler_at(client, each) for each in ("north", "south")
        ]

    def test_an_actor_that_only_the_graph_itself_uses(self, client: Client) -> None:
        counter = dask.delayed(Counter, pure=False)(3)
        calls = [dask.delayed(increment, pure=False)(counter) for _ in range(4)]
        results = client.gather(client.compute(calls, actors=counter))
        assert sorted(results) == [4, 5, 6, 7]

    def test_actors_that_are_not_in_the_graph(self, client: Client) -> None:
        lazy = dask.delayed(Counter, pure=False)(3)
        with pytest.raises(ValueError, match="'elsewhere'.*actors="):
            client.compute(lazy, actors="elsewhere")
        assert client.compute(lazy, actors=()).result().increment() == 4  # a plain object, no actor

    def test_arguments_may_be_futures_at_another_site(self, client: Client) -> None:
        start = client.submit(operator.add, 1, 2, site="south")
        counter = client.submit(Counter, start, actor=True, site="north").result()
        assert counter.increment().result() == 4

    def test_async_client(self, federation: Federation) -> None:
        async def main() -> None:
            async with Client(federation.scheduler_address, asynchronous=True) as client:
                counters = [await client.submit(Counter, actor=True, site=site) for site in ("north", "south")]
                assert [await counter.increment() for counter in counters] == [1, 1]
                assert await counters[0].n == 1
                with pytest.raises(ZeroDivisionError):
                    await counters[1].fail()

        asyncio.run(asyncio.wait_for(main(), 30))


class TestFromTasks:
    @pytest.mark.parametrize("there", ["north", "south"])
    def test_tasks_call_an_actor_at_either_site(self, client: Client, site: str, there: str) -> None:
        future = client.submit(Counter, actor=True, site=site, pure=False)
        counter = future.result()
        assert client.submit(increment, future, site=there, pure=False).result(timeout=20) == 1
        assert client.submit(increment, counter, by=5, site=there, pure=False).result(timeout=20) == 6
        assert client.submit(attribute, counter, site=there, pure=False).result(timeout=20) == 6
        assert counter.n == 6

    def test_tasks_at_both_sites_call_one_actor(self, client: Client) -> None:
        counter = client.submit(Counter, actor=True, site="north", pure=False).result()
        tasks = [client.submit(increment, counter, site=("north", "south")[i % 2], pure=False) for i in range(10)]
        wait(tasks)
        assert sorted(client.gather(tasks)) == list(range(1, 11))

    @pytest.mark.parametrize("there", ["north", "south"])
    def test_an_actor_calls_another(self, client: Client, site: str, there: str) -> None:
        one = client.submit(Counter, actor=True, site=site, pure=False).result()
        other = client.submit(Counter, 10, actor=True, site=there, pure=False)
        caller = client.submit(Caller, other, actor=True, site=site, pure=False).result()
        assert caller.call(5).result(timeout=20) == 15 and other.result().n == 15
        assert one.increment().result() == 1

    def test_a_task_makes_one(self, client: Client, site: str) -> None:
        assert client.submit(make_and_call, site=site, pure=False).result(timeout=20) == 2


class Caller:
    """An actor that was given another."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def call(self, by: int) -> int:
        return int(self.other.increment(by).result(timeout=10))


def make_and_call() -> int:
    counter = get_client().submit(Counter, 1, actor=True, pure=False).result(timeout=10)
    return int(counter.increment().result(timeout=10))


class TestTheEnd:
    def test_a_released_actor_is_gone(self, client: Client) -> None:
        future = client.submit(Counter, actor=True, pure=False)
        counter, key = future.result(), future.key
        assert counter.increment().result() == 1
        del future, counter
        gc.collect()  # a proxy and its methods refer to each other
        until(lambda: client.explain(key)["phase"] == "unknown", "it is held though nobody wants it")

    def test_one_whose_site_is_lost(self, tmp_path: Path) -> None:
        with killable(tmp_path, "east", "west") as fed, fed.client() as client:
            future = client.submit(Counter, actor=True, site="east")
            counter = future.result(timeout=20)
            assert client.submit(increment, counter, site="west").result(timeout=20) == 1
            fed.kill_site("east")
            until(lambda: future.status == "error", "nobody noticed")
            with pytest.raises(RuntimeError, match="create the actor again"):
                future.result()
            with pytest.raises(RuntimeError, match="Worker holding Actor was lost"):
                counter.increment()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_two_sites_with_the_same_worker_addresses() -> None:
    """Each site has a network of its own, with its scheduler and its worker at the same ports of its loopback."""
    if reason := namespaces.why_not():
        pytest.skip(reason)
    cluster = {
        "n_workers": 1, "processes": False, "protocol": "tcp://", "threads_per_worker": 2, "host": "127.0.0.1",
        "scheduler_port": 43786, "port": 43787, **NO_DASHBOARD,
    }  # fmt: skip
    with namespaces.star("north", "south") as names:
        running: list[Command] = []
        try:
            script = (sys.executable, "-m", "tests.system.same_addresses", f"tcp://{namespaces.HUB}:43700")
            user = Command(*namespaces.inside(names["hub"]), *script)
            running.append(user)
            address = user.line(r"HUB (\S+)")[1]
            for site in ("north", "south"):
                run = (*namespaces.inside(names[site]), *commands.MODULE)
                running.append(commands.site(site, address, "--options", json.dumps(cluster), run=run))
            found = json.loads(user.line(r"RESULT (.*)")[1])
        finally:
            for command in reversed(running):
                if command.process.poll() is None:
                    command.press()
            assert all([command.all_gone() for command in running])
    assert found["workers"] == ["fed://north/127.0.0.1:43787", "fed://south/127.0.0.1:43787"]
    assert found["addresses"] == ["tcp://127.0.0.1:43787"] * 2
    assert found["called"] == found["attributes"] == {"north": "north", "south": "south"}
    assert all(told == asked.split()[0] for asked, told in found["from tasks"].items())
