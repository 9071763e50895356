"""A call that may take so long: in the thread of a worker, what ends it, and what of the worker it sees."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from distributed.threadpoolexecutor import ThreadPoolExecutor, rejoin, secede, thread_state

from daskfed.site.limit import Interrupted, Limit, awaited


def test_a_call_in_time_gives_its_result_or_its_error() -> None:
    assert Limit(divmod, 10, "divmod")(7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        Limit(divmod, 10, "divmod")(7, 0)
    with pytest.raises(SystemExit):
        Limit(raise_exit, 10, "exit")()


def raise_exit() -> None:
    raise SystemExit(3)


def test_one_that_takes_longer_is_a_timeout_and_is_interrupted() -> None:
    found = threading.Event()

    def forever() -> None:
        try:
            while True:
                time.sleep(0.01)
        except Interrupted:
            found.set()
            raise

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"forever took longer than its timeout of 0\.2 s"):
        Limit(forever, 0.2, "forever")()
    assert time.monotonic() - began < 2
    assert found.wait(5)


def test_what_cannot_be_interrupted_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        Limit(time.sleep, 0.1, "sleep")(3)
    assert time.monotonic() - began < 2


def test_the_time_of_a_timeout_that_a_call_raises_itself() -> None:
    def own() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        Limit(own, 10, "own")()


def test_a_call_may_leave_the_pool_and_come_back() -> None:
    with ThreadPoolExecutor(1) as pool:

        def leaves(comes_back: bool) -> tuple[bool, bool, bool]:
            before = threading.current_thread() in pool._threads
            secede()
            other = pool.submit(lambda: 1).result(timeout=5) == 1  # there is room for it now
            if comes_back:
                rejoin()
            return before, other, threading.current_thread() in pool._threads

        limit = Limit(leaves, 10, "leaves")
        assert pool.submit(limit, True).result(timeout=10) == (True, True, True)
        assert pool.submit(limit, False).result(timeout=10) == (True, True, False)
        assert pool.submit(limit, True).result(timeout=10) == (True, True, True)
        assert len(pool._threads) == 1


def test_many_end_just_when_their_time_is_over() -> None:
    """What is interrupted too late harms nobody: not the pool, and not the next call."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(Limit(time.sleep, 0.002, "sleep"), 0.00195) for _ in range(300)]
        ended = [each.exception(timeout=20) for each in calls]
        assert all(each is None or isinstance(each, TimeoutError) for each in ended)
        assert pool.submit(lambda: thread_state.executor is pool).result(timeout=5)
        assert len(pool._threads) == 2


def test_asynchronous_calls() -> None:
    async def work(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert asyncio.run(awaited(work, 5, "work", 0.0)) == 0
    with pytest.raises(TimeoutError, match=r"work took longer than its timeout of 0\.1 s"):
        asyncio.run(awaited(work, 0.1, "work", 5.0))
