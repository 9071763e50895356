"""What tasks do with clients of their own, and what they share with tasks at the other site and with the user."""

from __future__ import annotations

import operator
import time
import uuid
from collections.abc import Callable
from typing import Any

import dask
import distributed
import pytest
from distributed import (
    Event,
    Lock,
    MultiLock,
    Queue,
    Semaphore,
    Variable,
    get_client,
    get_worker,
    rejoin,
    secede,
    wait,
    worker_client,
)
from distributed.client import Future, FutureCancelledError

from daskfed import Client, Federation
from tests.system.commands import NO_DASHBOARD

pytestmark = pytest.mark.system

TWO = {"n_workers": 1, "processes": False, "protocol": "tcp://", "threads_per_worker": 2, **NO_DASHBOARD}
WAYS = [("north", "south"), ("south", "north")]


@pytest.fixture(scope="module")
def federation() -> Any:
    """Two sites of one worker with two threads each."""
    with Federation(sites={"north": {"options": TWO}, "south": {"options": TWO}}) as fed:
        yield fed


@pytest.fixture
def name() -> str:
    """A name that nobody has used."""
    return uuid.uuid4().hex


def at(client: Client, site: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a task at a site and return its result."""
    return client.submit(function, *args, site=site, pure=False).result(timeout=30)


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def inc(x: int) -> int:
    return x + 1


def slow_inc(x: int, delay: float = 0.5) -> int:
    time.sleep(delay)
    return x + 1


def fail() -> None:
    raise ZeroDivisionError("nested")


class TestClientsInTasks:
    @pytest.mark.parametrize("site", ["north", "south"])
    def test_get_client(self, client: Client, site: str) -> None:
        def work() -> tuple[int, list[int], int]:
            inner = get_client()
            futures = inner.map(inc, range(4), pure=False)
            total = inner.submit(sum, futures, pure=False)
            return total.result(), inner.gather(futures), int(dask.delayed(inc)(4).compute())

        assert at(client, site, work) == (10, [1, 2, 3, 4], 5)

    @pytest.mark.parametrize("site", ["north", "south"])
    def test_worker_client(self, client: Client, site: str) -> None:
        def fib(n: int) -> int:
            if n < 2:
                return n
            with worker_client() as inner:
                return sum(inner.gather([inner.submit(fib, n - i, pure=False) for i in (1, 2)]))

        assert at(client, site, fib, 5) == 5

    def test_more_nested_tasks_than_threads(self, client: Client) -> None:
        def outer(x: int) -> int:
            with worker_client() as inner:
                return int(inner.submit(slow_inc, x, 0.02, pure=False).result())

        futures = client.map(outer, range(12), pure=False)
        assert client.gather(futures) == list(range(1, 13))

    def test_a_key_that_is_named_before_the_scheduler_has_heard_of_it(self, client: Client, name: str) -> None:
        def soon(key: str) -> None:
            own = get_client()
            secede()
            time.sleep(0.5)
            future = own.submit(operator.add, 1, 2, key=key)
            time.sleep(5)
            future.release()

        running = client.submit(soon, name, pure=False)
        named = Future(name, client=client)
        client._send_to_scheduler({"op": "client-desires-keys", "keys": [name]})  # as for one in what a task returned
        assert named.result(timeout=20) == 3
        assert not running.done()

    def test_secede_and_rejoin(self, client: Client) -> None:
        def step_aside(name: str) -> bool:
            secede()
            found = Event(name).wait(timeout=20)
            rejoin()
            return bool(found)

        names = [uuid.uuid4().hex for _ in range(4)]
        aside = client.map(step_aside, names, site="north", pure=False)
        for each in names:
            client.submit(lambda n: Event(n).set(), each, site="north", pure=False).result(timeout=10)
        assert client.gather(aside) == [True] * 4

    def test_get_worker(self, client: Client) -> None:
        def about() -> tuple[str, str]:
            worker = get_worker()
            return worker.address, worker.scheduler.address

        assert at(client, "north", about)[1] != at(client, "south", about)[1]

    def test_scatter_and_gather_in_a_task(self, client: Client) -> None:
        def work() -> tuple[int, dict[str, int]]:
            inner = get_client()
            [x] = inner.scatter([41], hash=False)
            return inner.submit(inc, x, pure=False).result(), inner.gather({"x": x})

        assert at(client, "south", work) == (42, {"x": 41})

    def test_errors_of_nested_tasks(self, client: Client) -> None:
        def work() -> None:
            get_client().submit(fail, pure=False).result()

        with pytest.raises(ZeroDivisionError, match="nested"):
            at(client, "north", work)


def return_future(delay: float = 0.0) -> Future:
    return get_client().submit(slow_inc, 41, delay, pure=False)


def submit_and_let_go(key: str) -> None:
    get_client().submit(slow_inc, 41, key=key)


def return_futures() -> dict[str, list[Future]]:
    return {"all": get_client().map(inc, range(3), pure=False)}


def return_failing() -> Future:
    return get_client().submit(fail, pure=False)


def use(future: Future) -> int:
    return int(future.result(timeout=20))


def use_all(futures: dict[str, list[Future]]) -> list[int]:
    return list(get_client().gather(futures["all"]))


@pytest.mark.parametrize(("there", "here"), WAYS)
class TestReturnedFutures:
    """A task returns a future of what it submitted at its site."""

    @pytest.mark.parametrize("delay", [0.0, 0.7])
    def test_they_resolve_at_the_client(self, client: Client, there: str, here: str, delay: float) -> None:
        inner = at(client, there, return_future, delay)
        assert isinstance(inner, Future) and inner.client is client
        assert inner.result(timeout=20) == 42
        assert client.explain(inner)["sites"] == [there]

    def test_they_may_be_arguments(self, client: Client, there: str, here: str) -> None:
        inner = at(client, there, return_future, 0.3)
        assert client.submit(inc, inner, site=here).result(timeout=20) == 43
        assert client.submit(inc, inner, site=there).result(timeout=20) == 43
        assert sorted(client.gather(at(client, there, return_futures)["all"])) == [1, 2, 3]

    def test_they_resolve_in_a_task_at_the_other_site(self, client: Client, there: str, here: str) -> None:
        outer = client.submit(return_future, 0.3, site=there, pure=False)
        assert client.submit(use, outer, site=here, pure=False).result(timeout=20) == 42
        several = client.submit(return_futures, site=there, pure=False)
        assert client.submit(use_all, several, site=here, pure=False).result(timeout=20) == [1, 2, 3]

    def test_their_errors_come_too(self, client: Client, there: str, here: str) -> None:
        outer = client.submit(return_failing, site=there, pure=False)
        inner = outer.result(timeout=20)
        with pytest.raises(ZeroDivisionError, match="nested"):
            inner.result(timeout=20)
        with pytest.raises(ZeroDivisionError, match="nested"):
            client.submit(inc, inner, site=here, pure=False).result(timeout=20)

    def test_they_are_released(self, client: Client, there: str, here: str) -> None:
        inner = at(client, there, return_future)
        key = inner.key
        assert inner.result(timeout=20) == 42
        del inner
        until(lambda: client.explain(key)["phase"] == "unknown", "it is held though nobody wants it")

    def test_one_that_is_named_before_its_site_hears_of_it(self, client: Client, there: str, here: str) -> None:
        """What a task submits can be later at its scheduler than the result that names it, and be let go of at once."""
        key = f"late-{uuid.uuid4()}"
        future = Future(key, client)
        client._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})
        until(lambda: client.explain(key)["phase"] == "pending", "it is not wanted")
        at(client, there, submit_and_let_go, key)
        assert future.result(timeout=20) == 42

    def test_one_that_nobody_knows_any_more_is_cancelled(self, client: Client, there: str, here: str) -> None:
        inner = at(client, there, return_future)
        assert inner.result(timeout=20) == 42
        key = inner.key
        del inner
        until(lambda: client.explain(key)["phase"] == "unknown", "it is held though nobody wants it")
        with pytest.raises(FutureCancelledError, match="lost dependencies"):
            client.submit(inc, Future(key, client), pure=False).result(timeout=20)


def put_in_variable(name: str, delay: float = 0.0) -> None:
    Variable(name).set(get_client().submit(slow_inc, 41, delay, pure=False))


def put_in_queue(name: str, delay: float = 0.0) -> None:
    Queue(name).put(get_client().submit(slow_inc, 41, delay, pure=False))


def put_failing(name: str) -> None:
    Variable(name).set(get_client().submit(fail, pure=False))


def publish(name: str, delay: float = 0.0) -> None:
    inner = get_client()
    inner.publish_dataset([inner.submit(slow_inc, 41, delay, pure=False)], name=name)


def take_from_variable(name: str) -> int:
    return int(Variable(name).get(timeout=20).result(timeout=20))


def take_from_queue(name: str) -> int:
    return int(Queue(name).get(timeout=20).result(timeout=20))


def take_dataset(name: str) -> int:
    return int(get_client().get_dataset(name)[0].result(timeout=20))


@pytest.mark.parametrize(("there", "here"), WAYS)
@pytest.mark.parametrize("delay", [0.0, 0.7])
class TestFuturesThatTasksPut:
    """Also while they are still being made."""

    def test_into_a_variable(self, client: Client, there: str, here: str, delay: float, name: str) -> None:
        at(client, there, put_in_variable, name, delay)
        assert Variable(name, client=client).get(timeout=10).result(timeout=20) == 42
        assert at(client, here, take_from_variable, name) == at(client, there, take_from_variable, name) == 42
        Variable(name, client=client).delete()

    def test_into_a_queue(self, client: Client, there: str, here: str, delay: float, name: str) -> None:
        for _ in range(3):
            at(client, there, put_in_queue, name, delay)
        assert Queue(name, client=client).get(timeout=10).result(timeout=20) == 42
        assert at(client, here, take_from_queue, name) == at(client, there, take_from_queue, name) == 42

    def test_as_a_dataset(self, client: Client, there: str, here: str, delay: float, name: str) -> None:
        at(client, there, publish, name, delay)
        assert client.get_dataset(name)[0].result(timeout=20) == 42
        assert at(client, here, take_dataset, name) == at(client, there, take_dataset, name) == 42
        client.unpublish_dataset(name)


@pytest.mark.parametrize(("there", "here"), WAYS)
class TestMoreFutures:
    def test_a_failing_one_in_a_variable(self, client: Client, there: str, here: str, name: str) -> None:
        at(client, there, put_failing, name)
        with pytest.raises(ZeroDivisionError, match="nested"):
            Variable(name, client=client).get(timeout=10).result(timeout=20)
        with pytest.raises(ZeroDivisionError, match="nested"):
            at(client, here, take_from_variable, name)

    def test_the_users_futures_reach_tasks(self, client: Client, there: str, here: str, name: str) -> None:
        future = client.submit(inc, 41, site=there)
        Variable(name, client=client).set(future)
        Queue(name, client=client).put(future)
        client.publish_dataset([future], name=name)
        assert at(client, here, take_from_variable, name) == 42
        assert at(client, here, take_from_queue, name) == 42
        assert at(client, here, take_dataset, name) == 42
        client.unpublish_dataset(name)

    def test_a_collection_that_a_task_published(self, client: Client, there: str, here: str, name: str) -> None:
        da = pytest.importorskip("dask.array")

        def publish_array() -> None:
            inner = get_client()
            inner.publish_dataset(inner.persist(da.arange(10, chunks=5)), name=name)

        at(client, there, publish_array)
        array = client.get_dataset(name)
        assert int(array.sum().compute()) == 45
        client.unpublish_dataset(name)


def count_under_lock(lock: str, variable: str, times: int) -> None:
    for _ in range(times):
        with Lock(lock):
            counter = Variable(variable)
            value = counter.get(timeout=10)
            time.sleep(0.002)
            counter.set(value + 1)


def hold(semaphore: str, log: str, most: int) -> None:
    with Semaphore(most, semaphore):
        Queue(log).put(1)
        time.sleep(0.05)
        Queue(log).put(-1)


def take_all(names: list[str], log: str) -> None:
    with MultiLock(names):
        Queue(log).put(1)
        time.sleep(0.02)
        Queue(log).put(-1)


def highest(queue: Queue, steps: int) -> int:
    level = top = 0
    for _ in range(steps):
        level += queue.get(timeout=10)
        top = max(top, level)
    return top


class TestSharedState:
    def test_a_lock_excludes_tasks_at_both_sites_and_the_user(self, client: Client, name: str) -> None:
        Variable(name, client=client).set(0)
        sites = ["north", "south", "north", "south"]
        tasks = [client.submit(count_under_lock, name, name, 5, site=site, pure=False) for site in sites]
        for _ in range(5):
            with Lock(name):
                counter = Variable(name, client=client)
                counter.set(counter.get(timeout=10) + 1)
        client.gather(tasks)
        assert Variable(name, client=client).get() == 25

    def test_a_semaphore(self, client: Client, name: str) -> None:
        log = Queue(name, client=client)
        tasks = [client.submit(hold, name, name, 3, site=("north", "south")[i % 2], pure=False) for i in range(8)]
        assert 1 <= highest(log, 16) <= 3
        wait(tasks)
        assert Semaphore(3, name).get_value() == 0

    def test_a_multi_lock(self, client: Client, name: str) -> None:
        log = Queue(name, client=client)
        pairs = [[f"{name}-a", f"{name}-b"], [f"{name}-b", f"{name}-c"]]
        tasks = [client.submit(take_all, pairs[i % 2], name, site=("north", "south")[i % 2]) for i in range(2)]
        assert highest(log, 4) == 1
        wait(tasks)

    @pytest.mark.parametrize(("there", "here"), WAYS)
    def test_an_event(self, client: Client, there: str, here: str, name: str) -> None:
        def wait_for(name: str) -> bool:
            return bool(Event(name).wait(timeout=20))

        waiting = client.submit(wait_for, name, site=here, pure=False)
        assert not at(client, there, lambda n: Event(n).is_set(), name)
        at(client, there, lambda n: Event(n).set(), name)
        assert waiting.result(timeout=20) and Event(name, client=client).is_set()
        Event(name, client=client).clear()
        assert not at(client, here, lambda n: Event(n).is_set(), name)

    @pytest.mark.parametrize(("there", "here"), WAYS)
    def test_a_queue(self, client: Client, there: str, here: str, name: str) -> None:
        def put(name: str) -> None:
            queue = Queue(name)
            for item in (1, {"a": (2,)}, "three", {4}):
                queue.put(item)

        def get(name: str) -> list[Any]:
            return list(Queue(name).get(batch=2))

        at(client, there, put, name)
        assert Queue(name, client=client).qsize() == 4
        assert at(client, here, get, name) == [1, {"a": (2,)}]
        assert Queue(name, client=client).get(batch=True) == ["three", {4}]

    def test_a_full_queue_and_an_unset_variable_time_out(self, client: Client, name: str) -> None:
        def wait_in_vain(name: str) -> list[str]:
            said = []
            for action in (
                lambda: Variable(name).get(timeout=0.05),
                lambda: Queue(name, maxsize=1).put(2, timeout=0.05),
                lambda: Queue(f"{name}-empty").get(timeout=0.05),
            ):
                try:
                    action()
                except TimeoutError as exc:
                    said.append(type(exc).__name__)
            return said

        Queue(name, client=client, maxsize=1).put(1)
        assert at(client, "north", wait_in_vain, name) == ["TimeoutError"] * 3

    def test_they_travel_as_arguments(self, client: Client, name: str) -> None:
        lock, variable = Lock(name), Variable(name, client=client)
        variable.set(0)

        def add(lock: Lock, variable: Variable) -> None:
            with lock:
                variable.set(variable.get(timeout=10) + 1)

        tasks = [client.submit(add, lock, variable, site=site, pure=False) for site in ("north", "south")]
        client.gather(tasks)
        assert variable.get() == 2

    def test_a_worker_that_asks_by_its_own_client(self, client: Client, name: str) -> None:
        def work(name: str) -> int:
            with worker_client() as inner:
                Variable(name, client=inner).set(inner.submit(operator.add, 1, 2, pure=False))
                return int(Variable(name, client=inner).get(timeout=10).result())

        assert at(client, "south", work, name) == 3
        assert Variable(name, client=client).get(timeout=10).result(timeout=10) == 3

    def test_events_are_logged_for_all(self, client: Client, name: str) -> None:
        at(client, "north", lambda n: get_client().log_event(n, "from a task"), name)
        until(lambda: client.get_events(name), "nobody heard")
        assert [message for _, message in client.get_events(name)] == ["from a task"]
        assert distributed.get_client() is client
