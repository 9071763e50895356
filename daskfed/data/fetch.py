"""What the workers of a site run to get a key that was made elsewhere.

The agent gives its scheduler a task under the key's own name; the task runs one of these functions on a worker. They
are sent by value and need only distributed and the standard library, so daskfed need not be installed on the workers.
Two functions are not for tasks: :func:`untie` mends what a worker remembers of such keys, and :func:`give_back` what it
and its scheduler do not agree on.
"""

from __future__ import annotations

import logging
import pickle
import zlib
from collections.abc import Sequence
from copy import deepcopy
from types import ModuleType
from typing import Any

import cloudpickle
from distributed import get_worker
from distributed.metrics import time as now
from distributed.protocol.serialize import merge_and_deserialize

from daskfed.dask_private import decompress_frames

ON_THE_WAY_S = 1.0  # that a message from a worker to its scheduler may be, under load

logger = logging.getLogger("distributed.worker")  # whose level and handlers the workers have


def open_import(header: dict[str, Any], frames: Sequence[Any], checksum: int) -> Any:
    """Return the value in frames that came with the task; raises TransferError where the checksum does not fit."""
    found = 0
    for frame in frames:
        found = zlib.crc32(frame, found)
    if found != checksum:
        raise _transfer_error(f"an imported value is damaged: its checksum is {found:#x} instead of {checksum:#x}")
    value = open_frames(header, frames)
    try:
        at_home = get_worker().daskfed_at_home
    except (ValueError, AttributeError):  # no worker, or one that was not told how
        return value
    return at_home(value)


def open_frames(header: dict[str, Any], frames: Sequence[Any], deserializers: Any = None) -> Any:
    """Return the value in frames; TypeError where it is of another family than ``deserializers`` (None: any)."""
    if "is-collection" in header:
        header = deepcopy(header)  # which Dask takes apart as it opens a dict
    if any(header.get("compression") or ()):
        frames = decompress_frames(header, frames)
    return merge_and_deserialize(header, frames, deserializers=deserializers)


def fetch_import(address: str, key: Any, token: str) -> Any:
    """Get the value of ``key`` from the agent at ``address`` and open it; runs in a worker's thread.

    Raises TransferError where the agent cannot be reached, does not have the key, or sent something damaged.
    """
    from distributed.utils import sync

    worker = get_worker()
    try:
        reply = sync(worker.loop, _ask_agent, worker, address, key, token)
    except (OSError, TimeoutError) as exc:
        raise _transfer_error(f"{key!r}: the agent of this site at {address} cannot be reached: {exc}") from exc
    if reply["status"] != "OK":
        raise _transfer_error(f"{key!r}: {reply['reason']}")
    return open_import(dict(reply["data"].header), reply["data"].frames, reply["checksum"])


async def _ask_agent(worker: Any, address: str, key: Any, token: str) -> Any:
    from distributed.core import ConnectionPool, send_recv

    if "daskfed_pool" not in worker.__dict__:
        worker.daskfed_pool = ConnectionPool(limit=8, deserialize=False, connection_args=worker.connection_args)
        await worker.daskfed_pool.start()
    pool = worker.daskfed_pool
    comm = await pool.connect(address)
    try:
        return await send_recv(comm, op="get-import", key=key, token=token)
    finally:
        pool.reuse(address, comm)


def give_back(keys: Sequence[Any], dask_worker: Any) -> None:
    """Have a worker tell its scheduler what it does not run of ``keys``, and which of their inputs it does not have.

    A task that waits for what the worker does not have forgets those inputs: they may be of another task that had its
    name. The scheduler gives the task out again, with the inputs that it has now.
    """
    known = dask_worker.state.tasks
    again: list[Any] = []
    lacking: dict[Any, None] = {}
    for key in keys:
        task = known.get(key)
        if task is None or task.state in ("released", "memory", "error", "missing"):
            if not _was_just_heard_of(dask_worker.state.story(key)):
                again.append(key)
        elif task.state == "waiting":
            absent = [each for each in task.dependencies if each.state in ("released", "missing") and not each.who_has]
            if not absent and any(each.state != "memory" for each in task.waiting_for_data):
                continue
            again.append(key)
            lacking.update(dict.fromkeys(each.key for each in absent))
            untie(task, absent, dask_worker)
    for op, told in (("release-worker-data", lacking), ("reschedule", again)):
        for key in told:
            story = dask_worker.state.story(key)[-8:]
            logger.warning("Scheduler and worker disagree about %r, which is made again (%s): %s", key, op, story)
            dask_worker.batched_send({"op": op, "key": key, "stimulus_id": "daskfed-give-back"})


def _was_just_heard_of(story: Sequence[Any]) -> bool:
    """Say whether what happened to a task last, where anything is known, may not have reached the scheduler yet."""
    return bool(story) and now() - story[-1][-1] < ON_THE_WAY_S


def untie(task: Any, inputs: Sequence[Any], dask_worker: Any) -> None:
    """Have a task of a worker forget ``inputs``, and the worker those that it sought for it."""
    for each in inputs:
        each.dependents.discard(task)
        each.waiters.discard(task)
        task.dependencies.discard(each)
        task.waiting_for_data.discard(each)
    sought = [each.key for each in inputs if each.state in ("fetch", "missing") and not each.dependents]
    dask_worker.stream_handlers["free-keys"](keys=sought, stimulus_id="daskfed-untie")


def raise_import(exception: tuple[Any, Any], traceback: tuple[Any, Any] | None) -> Any:
    """Raise the error that a key failed with elsewhere, with its traceback; both are (header, frames) of a pickle."""
    error = _opened(*exception)
    if not isinstance(error, BaseException):
        error = RuntimeError(str(error))
    raise error.with_traceback(_opened_traceback(traceback))


def _opened(header: dict[str, Any], frames: Sequence[Any]) -> Any:
    value = open_frames(dict(header), frames)
    return pickle.loads(value) if isinstance(value, bytes | bytearray | memoryview) else value


def _opened_traceback(traceback: tuple[Any, Any] | None) -> Any:
    try:
        opened = None if traceback is None else _opened(*traceback)
    except Exception:  # a traceback that cannot be opened here must not hide the error
        return None
    return None if isinstance(opened, str) else opened


def _transfer_error(reason: str) -> Exception:
    try:
        from daskfed.errors import TransferError
    except ImportError:
        return OSError(f"TransferError: {reason}")
    return TransferError(reason)


def by_value(thing: Any, *modules: ModuleType) -> bytes:
    """Return a function, or an object, of a module of ours, pickled so that it opens where daskfed is not installed.

    That module may use functions of this one, and of ``modules``.
    """
    import sys

    modules = (*{sys.modules[name] for name in (thing.__module__, __name__)}, *modules)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(thing))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
