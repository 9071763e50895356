"""A call that may take so long and no longer. It is sent to workers by value, and needs only distributed there.

The call runs in a thread of its own, for which the thread of the task waits. When its time is over, the task fails and
the call is interrupted: an exception is raised in its thread, which Python delivers before the next step of its code.
What is inside a C function by then goes on until that returns, beside the worker's other tasks; nobody hears of it.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from distributed import threadpoolexecutor, utils


class Interrupted(BaseException):
    """Raised inside a call whose time is over; no ordinary ``except`` of its own stops it."""


class Limit:
    """Calls ``function``, and raises TimeoutError where that takes more than ``seconds``."""

    def __init__(self, function: Callable[..., Any], seconds: float, name: str) -> None:
        self.function = function
        self.seconds = seconds
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in a thread that takes the place of this one at the worker."""
        call = Attempt(self.function, args, kwargs)
        with Replaced(call.thread):
            ended = call.wait(self.seconds)
        if not ended:
            raise TimeoutError(f"{self.name} took longer than its timeout of {self.seconds:g} s")
        return call.result()


class Attempt:
    """One call, in a thread that knows all that the thread knows in which it was made."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self._work = function, args, kwargs
        self._context = contextvars.copy_context()
        self._known = [(state, dict(vars(state))) for state in (utils.thread_state, threadpoolexecutor.thread_state)]
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of what is known of the end
        self._given_up = False
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=threading.current_thread().name, daemon=True)

    def _run(self) -> None:
        try:
            for state, known in self._known:
                vars(state).update(known)
            try:
                with self._shown():
                    function, args, kwargs = self._work
                    value, error = self._context.run(function, *args, **kwargs), None
            except BaseException as exc:  # as of any task
                value, error = None, exc
            with self._lock:
                if not self._given_up:
                    self._value, self._error = value, error
                    self._ended.set()
        except Interrupted:  # between two of the steps above
            pass
        finally:
            del self._work

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Have who asks what the worker does (``call_stack``, ``profile``) see this thread."""
        worker = (getattr(utils.thread_state, "execution_state", None) or {}).get("worker")
        if worker is None:
            yield
            return
        ident = threading.get_ident()
        with worker.active_threads_lock:
            worker.active_threads[ident] = utils.thread_state.key
        try:
            yield
        finally:
            with worker.active_threads_lock:
                worker.active_threads.pop(ident, None)

    def wait(self, seconds: float) -> bool:
        """Run the call; say whether it ended in so many seconds. If not, it is interrupted."""
        self.thread.start()
        if self._ended.wait(seconds):
            return True
        with self._lock:
            if self._ended.is_set():
                return True
            self._given_up = True
        ident = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Interrupted))
        return False

    def result(self) -> Any:
        """Return what the call returned; raises what it raised."""
        try:
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            self._error = None  # its traceback leads here


class Replaced:
    """Has another thread in the place of this one in the worker's pool, so that it may leave the pool (``secede``)."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._own = threading.current_thread()
        self._pool = getattr(threadpoolexecutor.thread_state, "executor", None)

    def __enter__(self) -> None:
        self._put(self._thread, self._own)

    def __exit__(self, *exc_info: Any) -> None:
        if not self._put(self._own, self._thread) and self._pool is not None:
            threadpoolexecutor.thread_state.proceed = False  # the call has left the pool, and this thread with it

    def _put(self, thread: threading.Thread, place: threading.Thread) -> bool:
        if self._pool is None:
            return False
        with threadpoolexecutor.threads_lock:
            if place not in self._pool._threads:
                return False
            self._pool._threads.remove(place)
            self._pool._threads.add(thread)
            return True


async def awaited(function: Callable[..., Any], seconds: float, name: str, *args: Any, **kwargs: Any) -> Any:
    """Await an asynchronous call; raises TimeoutError where that takes more than ``seconds``."""
    import asyncio

    began = perf_counter()
    try:
        return await asyncio.wait_for(function(*args, **kwargs), seconds)
    except TimeoutError:
        if perf_counter() - began < seconds:
            raise  # its own
        raise TimeoutError(f"{name} took longer than its timeout of {seconds:g} s") from None
