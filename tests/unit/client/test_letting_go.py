"""Futures that are let go of in thousands call the loop once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from daskfed.client import letting_go
from daskfed.client.letting_go import LetGo
from daskfed.messages import Key


def test_the_loop_is_called_once_for_all_and_releases_some_at_a_time() -> None:
    later: list[Callable[[], None]] = []
    released: list[Key] = []
    let_go = LetGo(later.append, released.append)
    keys = [str(n) for n in range(letting_go.AT_A_TIME + 10)]
    for key in keys:
        let_go.put(key)
    assert len(later) == 1
    later.pop()()
    assert released == keys[: letting_go.AT_A_TIME] and len(later) == 1
    let_go.put("one more")
    assert len(later) == 1
    later.pop()()
    assert released == [*keys, "one more"] and not later


def test_all_are_released_now() -> None:
    later: list[Callable[[], None]] = []
    released: list[Key] = []
    let_go = LetGo(later.append, released.append)
    for n in range(5000):
        let_go.put(n)
    let_go.all()
    assert released == list(range(5000))
    later.pop()()
    assert len(released) == 5000 and not later


def test_threads_lose_none() -> None:
    released: list[Key] = []
    wake = threading.Semaphore(0)
    due: list[Callable[[], None]] = []

    def later(call: Callable[[], None]) -> None:
        due.append(call)
        wake.release()

    let_go = LetGo(later, released.append)

    def put(start: int) -> None:
        for n in range(start, start + 20_000):
            let_go.put(n)

    threads = [threading.Thread(target=put, args=(n * 20_000,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while len(released) < 60_000:
        assert wake.acquire(timeout=30), f"{60_000 - len(released)} keys were never released"
        due.pop(0)()
    assert sorted(released) == list(range(60_000))  # type: ignore[type-var]
