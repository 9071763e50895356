"""What the benchmarks share: processes in roles, their CPU time, alternating runs, medians, and a verdict."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

WAIT_S = 60.0
STOCK = """
import sys, threading
from distributed import LocalCluster

n_workers, nthreads, port = map(int, sys.argv[1:])
quiet = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}
cluster = LocalCluster(n_workers=n_workers, threads_per_worker=nthreads, scheduler_port=port, **quiet)
threading.Event().wait()
"""

signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what a benchmark started ends with it


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, cwd: str | Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own while the block runs, then end it and all it started."""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
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


@contextlib.contextmanager
def hub_and_sites(names: tuple[str, ...], **options: Any) -> Iterator[tuple[str, dict[str, subprocess.Popen[bytes]]]]:
    """Run a hub and sites, each in processes of their own; yields the hub's address and the processes by role."""
    address = f"tcp://127.0.0.1:{free_port()}"
    quiet = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}
    given = json.dumps({"n_workers": 1, "threads_per_worker": 1, **quiet, **options})
    python = (sys.executable, "-m", "daskfed")
    with contextlib.ExitStack() as stack:
        processes = {"hub": stack.enter_context(running(*python, "hub", "--listen", address))}
        for name in names:
            command = (*python, "site", "--name", name, "--hub", address, "--options", given)
            processes[name] = stack.enter_context(running(*command))
        yield address, processes


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
    print(f"{'PASS' if passed else 'FAIL'}  {what}: {value:.3g} (bar {bar:g})", flush=True)
    return passed
