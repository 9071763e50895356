"""What the benchmarks share: processes in roles, those that are killed, their CPU time, medians, and a verdict."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

WAIT_S = 60.0
DASKFED = (sys.executable, "-m", "daskfed")
STOCK = """
import sys, threading
from distributed import LocalCluster

n_workers, nthreads, port = map(int, sys.argv[1:])
quiet = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}
cluster = LocalCluster(n_workers=n_workers, threads_per_worker=nthreads, scheduler_port=port, **quiet)
threading.Event().wait()
"""

if threading.current_thread() is threading.main_thread():  # and not where a site opens calls of what is here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what a benchmark started ends with it


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, cwd: str | Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own while the block runs, then end it and all it started."""
    here = os.path.dirname(os.path.abspath(__file__))  # sites find the functions of benchmarks here
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((os.getcwd(), here))}
    process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; raises TimeoutError naming ``what``."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


def hub_command(address: str, state: str | Path | None = None) -> tuple[str, ...]:
    """Return the command of a hub, which keeps its state in a folder if one is named."""
    kept = ("--state", str(state)) if state is not None else ()
    return (*DASKFED, "hub", "--listen", address, *kept)


def site_command(name: str, address: str, **options: Any) -> tuple[str, ...]:
    """Return the command of a site, of one worker with one thread unless ``options`` of the LocalCluster say else."""
    quiet = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}
    given = json.dumps({"n_workers": 1, "threads_per_worker": 1, **quiet, **options})
    return (*DASKFED, "site", "--name", name, "--hub", address, "--options", given)


@contextlib.contextmanager
def hub_and_sites(
    names: tuple[str, ...], *, state: str | Path | None = None, **options: Any
) -> Iterator[tuple[str, dict[str, subprocess.Popen[bytes]]]]:
    """Run a hub and sites, each in processes of their own; yields the hub's address and the processes by role."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        processes = {"hub": stack.enter_context(running(*hub_command(address, state)))}
        for name in names:
            processes[name] = stack.enter_context(running(*site_command(name, address, **options)))
        yield address, processes


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, as a machine does that loses power."""
    root = psutil.Process(process.pid)
    for each in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


class Diary:
    """A file to which tasks, wherever they run, append a line when they begin and when they end."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def note(self, event: str, task: object) -> None:
        """Add a line: the event, the task, this process and its time."""
        with open(self.path, "a") as file:
            file.write(f"{event} {task} {os.getpid()} {time.time()}\n")

    def entries(self, event: str) -> list[tuple[str, int, float]]:
        """Return (task, process, time) of each ``event``, in order."""
        if not os.path.exists(self.path):
            return []
        lines = [line.split() for line in Path(self.path).read_text().splitlines()]
        return [(task, int(pid), float(at)) for kind, task, pid, at in lines if kind == event]


@contextlib.contextmanager
def stock_cluster(n_workers: int, nthreads: int = 1) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a stock LocalCluster in a process of its own; yields the address of its scheduler, and that process.

    It is to a site what is alike: the same Cluster class, with a worker for each of the sites'.
    """
    port = free_port()
    with running(sys.executable, "-c", STOCK, str(n_workers), str(nthreads), str(port)) as cluster:
        yield f"tcp://127.0.0.1:{port}", cluster


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds that one process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def uss(process: psutil.Process) -> int:
    """Return the bytes that only this process has."""
    return int(process.memory_full_info().uss)


def roles_of_site(agent: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """Return ``agent``, ``scheduler`` (the host of the cluster) of a site's process tree."""
    root = psutil.Process(agent.pid)
    host = next(child for child in root.children() if "daskfed.site.host" in " ".join(child.cmdline()))
    return {"agent": root, "scheduler": host}


def timed(work: Callable[[], Any]) -> float:
    """Return the wall seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def verdict(what: str, value: float, bar: float) -> bool:
    """Print one line of result: ``value`` should not be above ``bar``; return whether it is not."""
    passed = value <= bar
    print(f"{'PASS' if passed else 'FAIL'}  {what}: {value:.4g} (bar {bar:.4g})", flush=True)
    return passed
