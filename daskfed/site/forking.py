"""Workers that are forked from a process which has imported Dask, instead of each importing it anew.

Dask's nannies start each worker as a new Python ("spawn"), which takes a second of a processor until it has imported
Dask. Python's forkserver is the cure that Dask knows as a setting; but that is a new Python too, and Dask has it import
pandas as well. Here the forkserver is a fork of the cluster's host, made before that has any thread: so even the first
worker starts at once, and so does one that takes the place of another.

Where packages were installed or changed since, as by Dask's ``PipInstall``, a new worker must not have the former ones:
it then starts as a new Python. What such a one would read from its environment as it starts (seed of hashes, threads of
BLAS, malloc) must be there when the host starts: :func:`environment` is what Dask's nannies set for workers. Where the
user has set another way to start workers, theirs is taken, and on other systems than Linux, where a fork of such a
process is not safe, Dask's own.
"""

from __future__ import annotations

import multiprocessing.forkserver
import multiprocessing.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import dask

from daskfed.dask_private import no_forkserver_preload

METHOD, STOCK_METHOD = "distributed.worker.multiprocessing-method", "spawn"
BEFORE_START = "distributed.nanny.pre-spawn-environ"
HASH_SEED, STOCK_HASH_SEED = "PYTHONHASHSEED", "6640"  # Dask's, so that what is hashed is so alike at all sites


def possible() -> bool:
    """Whether workers can be forked here, and nobody wants them to be started in another way."""
    return sys.platform == "linux" and bool(dask.config.get(METHOD, STOCK_METHOD) == STOCK_METHOD)


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """Return ``present`` with what a nanny adds to it before it starts a worker."""
    configured = {name: str(value) for name, value in (dask.config.get(BEFORE_START, None) or {}).items()}
    seed = {**configured, **{name: present[name] for name in configured if name in present}}.get(HASH_SEED)
    return {**configured, **present, HASH_SEED: STOCK_HASH_SEED if seed in (None, "0") else seed}


def fork_workers() -> None:
    """Have workers of this process forked from now on; to be called while it has one thread and no event loop."""
    no_forkserver_preload()
    multiprocessing.set_forkserver_preload([])
    stock = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = _forked  # type: ignore[assignment]
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds = stock
    _renew_where_packages_change(multiprocessing.forkserver._forkserver)
    dask.config.set({METHOD: "forkserver"})


def _renew_where_packages_change(server: Any) -> None:
    """Have the next process come from a forkserver that has imported nothing, if a package has changed since now."""
    folders = _folders_of_packages()
    times = _times(folders)
    stock = server.ensure_running

    def ensure_running() -> None:
        if _times(folders) != times:
            server.ensure_running = stock
            with server._lock:  # it ends when the last process that it forked has ended
                os.close(server._forkserver_alive_fd)
                server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
        stock()

    server.ensure_running = ensure_running


def _folders_of_packages() -> list[str]:
    """Return the folders in which lie the packages that are imported: they change when one is installed or removed."""
    modules = {name: module for name, module in list(sys.modules.items()) if "." not in name}
    places = [getattr(module, "__file__", None) for module in modules.values()]
    packages = [
        os.path.dirname(place) if os.path.basename(place).startswith("__init__.") else place
        for place in places
        if place
    ]
    return sorted({os.path.dirname(package) for package in packages})


def _times(folders: Sequence[str]) -> list[int]:
    return [os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0 for folder in folders]


def _forked(executable: bytes, args: Sequence[Any], fds: Sequence[int]) -> int:
    """Do what ``python … -c args[-1]`` would do, as the function whose place this takes, but in a fork."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        _close_all_but({0, 1, 2, *fds})
        exec(args[-1], {"__name__": "__main__"})  # noqa: S102  (what Python's own module wants to be run)
    finally:
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            try:
                os.close(fd)
            except OSError:  # the one that read the folder
                continue
