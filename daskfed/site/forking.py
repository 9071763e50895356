"""Workers that are forked from a process which has imported Dask, instead of each importing it anew.

Dask's nannies start each worker as a new Python ("spawn"), which takes a second of a processor until it has imported
Dask. Python's forkserver is the cure that Dask knows as a setting; but that is a new Python too, and Dask has it import
pandas as well. Here the forkserver is a fork of the cluster's host, made before that has any thread: so even the first
worker starts at once, and so does one that takes the place of another. A worker must not notice the difference:

- What a new Python reads from its environment as it starts (seed of hashes, threads of BLAS, malloc) has to be there
  when the host starts: :func:`environment` is what Dask's nannies set for workers.
- Where packages were installed since, as by Dask's ``PipInstall``, or the host's environment was changed, a worker
  starts as a new Python after all (:func:`_renew_where_things_change`).
- What the host had before it forks is the server's too (files of a log), its own pipes are not; the rest is in
  :func:`_become_a_server`.

On other systems than Linux a fork of such a process is not safe. Where the user has set another way to start workers,
``distributed.worker.multiprocessing-method``, or has set ``daskfed.fork-workers`` to false, Dask starts them.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import dask

from daskfed.dask_private import no_forkserver_preload

METHOD, STOCK_METHOD = "distributed.worker.multiprocessing-method", "spawn"
WANTED = "daskfed.fork-workers"
BEFORE_START = "distributed.nanny.pre-spawn-environ"
HASH_SEED, STOCK_HASH_SEED = "PYTHONHASHSEED", "6640"  # Dask's, so that what is hashed is so alike at all sites
OWN = "__DASK_"  # how variables begin that Dask itself sets in the host

logger = logging.getLogger(__name__)


def possible() -> bool:
    """Whether workers can be forked here, and nobody wants them to be started in another way."""
    wanted = dask.config.get(WANTED, True) and dask.config.get(METHOD, STOCK_METHOD) == STOCK_METHOD
    return sys.platform == "linux" and bool(wanted)


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """Return ``present`` with what a nanny adds to it before it starts a worker."""
    given = dask.config.get(BEFORE_START, None) or {}
    configured = {name: str(value) for name, value in given.items() if value is not None}
    both = {**configured, **present}
    seed = both[HASH_SEED] if HASH_SEED in configured else "0"  # a nanny looks only at what is configured
    return {**both, HASH_SEED: STOCK_HASH_SEED if seed == "0" else seed}


def fork_workers() -> None:
    """Have workers of this process forked from now on; to be called while it has one thread and no event loop.

    Where that cannot be (a folder for temporary files whose path is too long for a socket), Dask starts them.
    """
    no_forkserver_preload()
    multiprocessing.set_forkserver_preload([])
    stock = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = functools.partial(_forked, _open_files())
    try:
        multiprocessing.forkserver.ensure_running()
    except OSError as exc:
        logger.info("workers are not forked, but start as new processes: %s", exc)
        return
    finally:
        multiprocessing.util.spawnv_passfds = stock
    _renew_where_things_change()
    dask.config.set({METHOD: "forkserver"})


# -- in the host -------------------------------------------------------------------------------------------------------


def _renew_where_things_change() -> None:
    """Have processes come from a forkserver that has imported nothing, once a package or a variable has changed."""
    server: Any = multiprocessing.forkserver._forkserver
    stock = server.connect_to_new_process
    folders = _folders_of_packages()
    before = _state(folders)
    lock = threading.Lock()

    def connect_to_new_process(fds: Sequence[int]) -> tuple[int, int]:
        with lock:  # nannies start workers from threads
            if multiprocessing.forkserver.connect_to_new_process is stock or _state(folders) == before:
                return stock(fds)  # type: ignore[no-any-return]
            multiprocessing.forkserver.connect_to_new_process = stock
            os.close(server._forkserver_alive_fd)  # it ends with the last process that it forked
            server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
            return stock(fds)  # type: ignore[no-any-return]

    multiprocessing.forkserver.connect_to_new_process = connect_to_new_process


def _folders_of_packages() -> list[str]:
    """Return the folders of imported modules in which packages are installed: they change with each installation."""
    modules = [module for name, module in list(sys.modules.items()) if "." not in name]
    places = [place for module in modules if (place := getattr(module, "__file__", None))]
    packages = [os.path.dirname(each) if os.path.basename(each).startswith("__init__.") else each for each in places]
    folders = {os.path.dirname(package) for package in packages}
    return sorted(folder for folder in folders if os.path.isdir(folder) and _has_packages(folder))


def _has_packages(folder: str) -> bool:
    return any(name.endswith(".dist-info") for name in os.listdir(folder))


def _state(folders: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    times = [os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0 for folder in folders]
    return times, {name: value for name, value in os.environ.items() if not name.startswith(OWN)}


def _open_files() -> set[int]:
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")}


# -- in the fork -------------------------------------------------------------------------------------------------------


def _forked(kept: Collection[int], executable: bytes, args: Sequence[Any], fds: Sequence[int]) -> int:
    """Do what ``python … -c args[-1]`` would do, as the function whose place this takes, but in a fork."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    host = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are those of BLAS, and know of forks
        pid = os.fork()
    if pid:
        return pid
    path = ""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        _close_all_but({0, 1, 2, *kept, *fds})
        if "forkserver" in args[-1]:
            path = _become_a_server(fds[0])
        exec(args[-1], {"__name__": "__main__"})
    except SystemExit:
        pass
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        if os.getppid() != host:  # it was killed, and could not tidy up
            _remove(path)
        os._exit(1)


def _close_all_but(kept: Collection[int]) -> None:
    for fd in _open_files() - set(kept):
        with suppress(OSError):
            os.close(fd)


def _become_a_server(listener: int) -> str:
    """Forget what is the host's alone; return the path of the socket on which it listens."""
    multiprocessing.forkserver._forkserver._lock = threading.Lock()  # type: ignore[attr-defined]  # the host holds it
    multiprocessing.resource_tracker._resource_tracker._pid = None  # type: ignore[attr-defined]  # a child of the host
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]  # it was a pipe
    if numpy_random := sys.modules.get("numpy.random"):
        os.register_at_fork(after_in_child=numpy_random.seed)
    _end_workers_in_order()
    with socket.socket(fileno=os.dup(listener)) as server:
        return str(server.getsockname())


def _end_workers_in_order() -> None:
    """Have a worker that ends do what it has registered for that, and nothing that the host has."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    if sys.version_info >= (3, 13):  # then Python's server sees to the rest
        return
    stock = multiprocessing.forkserver._serve_one  # type: ignore[attr-defined]

    def serve_one(*args: Any) -> int:
        try:
            return stock(*args)  # type: ignore[no-any-return]
        finally:
            atexit._run_exitfuncs()

    multiprocessing.forkserver._serve_one = serve_one  # type: ignore[attr-defined]


def _remove(path: str) -> None:
    """Remove a socket, and the folder that Python's multiprocessing made for it."""
    with suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
