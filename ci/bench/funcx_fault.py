"""funcX's fault experiment: 48 tasks of 100 ms a second, half of the workers killed; what is lost, how long it shows.

Two sites of four workers, which are threads of one process for each site. In the paper (arXiv:2005.04215) one of two
managers, a process with four workers, was killed at 2 s and replaced; five tasks ran again, and latencies were back to
normal 3 s after the loss was noticed. So is it here at first: the process of the workers of one site is killed, which
its cluster replaces. Then, which is harder, everything that there is of one site is killed, and another site is started
in its stead, under another name.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from _common import Diary, hub_and_sites, kill_tree, median, roles_of_site, running, site_command, verdict, wait_for

import daskfed

RATE = 48  # tasks a second
TASK_S = 0.1
KILL_S = 2.0
LENGTH_S = 20.0
WINDOW_S = 0.5
NORMAL = 1.5  # times the usual latency
CALM = 4  # windows that must be normal one after another; later ones may be slow for other reasons
WORKERS = 4  # threads of each site


def task(number: int, diary: str) -> int:
    """Sleep for 100 ms."""
    Diary(diary).note("began", number)
    time.sleep(TASK_S)
    return number


class Stream:
    """Tasks that are submitted at a steady rate, with the latency of each."""

    def __init__(self, client: daskfed.Client, diary: Diary) -> None:
        self.client = client
        self.diary = diary
        self.submitted: dict[int, float] = {}  # task -> seconds since the start
        self.done: dict[int, float] = {}
        self.failed = 0
        self._futures: dict[int, Any] = {}  # those that are not done
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._start = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def run(self) -> None:
        """Submit everything and wait for it."""
        self._start = time.monotonic()
        total = round(LENGTH_S * RATE)
        collector = threading.Thread(target=self._collect, args=(total,), daemon=True)
        collector.start()
        for number in range(total):
            time.sleep(max(0.0, number / RATE - self.now))
            self._submit(number)
        collector.join(timeout=120)

    def _submit(self, number: int) -> None:
        self.submitted[number] = self.now
        future = self.client.submit(task, number, self.diary.path, pure=False)
        self._futures[number] = future
        future.add_done_callback(lambda future: self._ended.put(number))

    def _collect(self, total: int) -> None:
        """Get the results that there are, together, as often as some are: what nobody holds need not be made again."""
        while len(self.done) + self.failed < total:
            ended = [self._ended.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    ended.append(self._ended.get_nowait())
            futures = [self._futures.pop(number) for number in ended]
            numbers = self.client.gather([future for future in futures if future.status == "finished"])
            self.failed += len(futures) - len(numbers)
            self.done.update(dict.fromkeys(numbers, self.now))

    def latency_s(self, since: float, until: float) -> float:
        """Return the median latency of what was submitted in a window; infinite where that is not done, or nothing."""
        inside = [number for number, at in self.submitted.items() if since <= at < until]
        latencies = [self.done.get(number, float("inf")) - self.submitted[number] for number in inside]
        return median(latencies or [float("inf")])

    def windows(self) -> list[float]:
        """Return the latency in each window."""
        return [self.latency_s(i * WINDOW_S, (i + 1) * WINDOW_S) for i in range(round(LENGTH_S / WINDOW_S))]


Facts: TypeAlias = dict[str, float]
"""What happened -> when, in seconds since the start."""


def seen_of_workers(sites: dict[str, Any], told: Facts) -> Iterator[str]:
    """Yield whether the hub sees that the workers of the south are gone, or that they are there again."""
    if not sites["south"]["workers"]:
        yield "detected"
    elif "detected" in told:
        yield "replaced"


def seen_of_site(sites: dict[str, Any], told: Facts) -> Iterator[str]:
    """Yield whether the hub sees that the south is away, has given it up, or has its replacement."""
    if "south" not in sites or sites["south"]["status"] == "away":
        yield "noticed"
    if "south" not in sites:
        yield "detected"
    if sites.get("spare", {}).get("workers"):
        yield "replaced"


def watch(
    client: daskfed.Client,
    now: Callable[[], float],
    told: Facts,
    seen: Callable[[dict[str, Any], Facts], Iterable[str]],
) -> None:
    """Note when the hub sees what ``seen`` yields first, until it has seen the loss and the replacement is there."""
    while not {"detected", "replaced"} <= told.keys():
        for what in seen(client.sites(), told):
            told.setdefault(what, now())
        time.sleep(0.02)  # between looks


def measure(folder: Path, whole_site: bool) -> tuple[Stream, Facts]:
    """Run the stream of tasks while workers or their whole site are killed; return it, and when what happened."""
    told: Facts = {}
    with contextlib.ExitStack() as stack:
        sites = hub_and_sites(("north", "south"), threads_per_worker=WORKERS)
        address, processes = stack.enter_context(sites)
        client = stack.enter_context(daskfed.Client(address, timeout=60))
        observer = stack.enter_context(daskfed.Client(address, timeout=60, set_as_default=False))
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == 2, "the sites' workers")
        client.gather(client.map(task, range(80), diary=str(folder / "warm"), pure=False))
        stream = Stream(client, Diary(folder / "diary"))
        host = roles_of_site(processes["south"])["scheduler"]
        workers = next(worker for server in host.children() for worker in server.children())

        def kill() -> None:
            told["killed"] = stream.now
            if whole_site:
                kill_tree(processes["south"])
                stack.enter_context(running(*site_command("spare", address, threads_per_worker=WORKERS)))
            else:
                workers.kill()
            watch(observer, lambda: stream.now, told, seen_of_site if whole_site else seen_of_workers)

        timer = threading.Timer(KILL_S, kill)
        timer.start()
        stream.run()
        timer.join()
    return stream, told


def back_s(windows: list[float], normal_s: float, after: float) -> float:
    """Return from when on the latency is normal again: the start of the first of CALM normal windows in a row."""
    normal = [latency <= NORMAL * normal_s for latency in windows]
    first = int(after // WINDOW_S)
    back = (i for i in range(first, len(windows)) if all(normal[i : i + CALM]))
    return max(after, next(back, len(windows)) * WINDOW_S)


def judge(what: str, whole_site: bool) -> list[bool]:
    """Measure and print; return whether each bar is met."""
    with tempfile.TemporaryDirectory() as folder:
        stream, told = measure(Path(folder), whole_site)
        began = stream.diary.entries("began")
    normal_s = stream.latency_s(0.5, KILL_S)
    windows = stream.windows()
    back = back_s(windows, normal_s, told["killed"])
    lost, again = len(stream.submitted) - len(stream.done), len(began) - len({each for each, *_ in began})
    facts = {"normal_s": normal_s, "again": again, "lost": lost, "back_s": back, "windows_s": windows}
    print(json.dumps(facts | told))
    print(
        f"{what} killed: latency {1000 * normal_s:.0f} ms, worst window {max(windows):.2f} s; {again} tasks ran again"
    )
    print("since then: " + ", ".join(f"{each} {at - told['killed']:.2f} s" for each, at in told.items()))
    print(f"latency normal again {back - told['killed']:.2f} s after the kill")
    return [
        verdict(f"{what} killed, tasks lost", lost, 0),
        verdict(f"{what} killed, seconds from detection to normal latency", back - told["detected"], 3.0),
    ]


def main() -> int:
    """Measure both; return 1 where a bar is missed."""
    return not all([*judge("workers", whole_site=False), *judge("site", whole_site=True)])


if __name__ == "__main__":
    sys.exit(main())
