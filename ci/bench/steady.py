"""Memory, files and threads of every process after minutes of steady load, and after 1,000 results of 1 MB are let go.

Both are told for the client, the hub, the agent of the site, its scheduler and its workers: how much each has after
the work, compared with what it had after a warm-up by the same work.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import dask
import dask.array
import distributed
import psutil
from _calls import WORKERS, nothing
from _common import hub_and_sites, roles_of_site, uss, verdict
from _work import large

import daskfed

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
WARM_UP_S, SETTLE_S = 60.0, 10.0
TIMES = 3
RESULTS, SIZE = 1000, 1_000_000  # held at once; bytes of each, as `large` makes them
BAR = 1.1

Sizes = dict[str, dict[str, float]]


def turn(client: Any) -> None:
    """Do a little of everything: calls, single ones, a failing one, a graph, scattered data, a lock, an event."""
    assert client.gather(client.map(nothing, range(200), pure=False)) == list(range(200))
    assert client.submit(nothing, 1, pure=False).result() == 1
    failing = client.submit(int, "no number", pure=False)
    distributed.wait(failing)
    assert failing.status == "error"
    ones = dask.array.ones((400, 400), chunks=(100, 100))
    assert (ones + ones.T).sum().compute(scheduler=client) == 320_000
    (data,) = client.scatter([large(1)], hash=False)
    assert client.submit(len, data, pure=False).result() == SIZE
    with distributed.Lock("steady"):
        client.log_event("steady", "turn")


def steadily(client: Any, seconds: float) -> int:
    """Repeat turns, four in a second where they are quick, for so long; return how many."""
    end, turns = time.monotonic() + seconds, 0
    while (start := time.monotonic()) < end:
        turn(client)
        turns += 1
        time.sleep(max(0.0, 0.25 - (time.monotonic() - start)))
    return turns


def hold_and_release(client: Any) -> None:
    """Have 1,000 results of a megabyte at the site, gather some of them, and let go of all."""
    futures = client.map(large, range(RESULTS), pure=False)
    distributed.wait(futures)
    assert [len(each) for each in client.gather(futures[:20])] == [SIZE] * 20


def repeat(client: Any, times: int) -> int:
    """Hold and release so often; return how often."""
    for _ in range(times):
        hold_and_release(client)
    return times


def sizes(watched: dict[str, psutil.Process]) -> Sizes:
    """Return own memory in MB, open files and threads of each process, once all is quiet."""
    gc.collect()
    time.sleep(SETTLE_S)
    return {
        name: {
            "MB": uss(process) / 1e6,
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }
        for name, process in watched.items()
    }


def compared(case: str, watched: dict[str, psutil.Process], warm: Callable[[], int], work: Callable[[], int]) -> bool:
    """Do work after a warm-up; print what each process has then, and return whether nothing has grown above the bar."""
    warm()
    before = sizes(watched)
    start = time.monotonic()
    done = work()
    print(f"{case}: {done} turns in {time.monotonic() - start:.0f} s", flush=True)
    after = sizes(watched)
    passed = True
    for name, now in after.items():
        told = ", ".join(f"{what} {before[name][what]:.4g} -> {value:.4g}" for what, value in now.items())
        print(f"  {name}: {told}")
        for what, value in now.items():
            passed &= verdict(f"{case}, {name}, {what}", value / before[name][what], BAR)
    return passed


def main() -> int:
    """Measure and print; return 1 where something has grown above its bar."""
    roles = hub_and_sites(("north",), n_workers=WORKERS, silence_logs=logging.CRITICAL)
    with roles as (address, processes), daskfed.Client(address, timeout=60) as client:
        client.wait_for_workers(WORKERS, timeout=60)
        watched = {"client": psutil.Process(), "hub": psutil.Process(processes["hub"].pid)}
        watched |= roles_of_site(processes["north"])
        started = watched["scheduler"].children(recursive=True)
        watched |= {f"started {n}": each for n, each in enumerate(started)}  # its workers, and what forks them
        held = compared(
            "results held and released",
            watched,
            lambda: hold_and_release(client),
            lambda: repeat(client, TIMES),
        )
        passed = compared(
            f"{MINUTES:g} minutes of steady load",
            watched,
            lambda: steadily(client, WARM_UP_S),
            lambda: steadily(client, 60 * MINUTES),
        )
    return not (passed and held)


if __name__ == "__main__":
    sys.exit(main())
