"""A line between two ports of this machine that can be cut, slowed down and made longer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PIECE = 16 * 2**10  # bytes


class Relay:
    """Passes connections on to a port; ``delay_s`` each way, ``rate`` in bytes a second each way."""

    def __init__(self, target: int, delay_s: float = 0.0, rate: float | None = None) -> None:
        self.target = target
        self.delay_s = delay_s
        self.rate = rate
        self.port = 0
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        started.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes, each piece when the line had time for it and the delay is over."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64 if self.rate else 0)
        sending = asyncio.create_task(self._send(queue, writer))
        free_at = self._loop.time()
        with suppress(OSError):
            while data := await reader.read(PIECE):
                now = self._loop.time()
                free_at = max(free_at, now) + (len(data) / self.rate if self.rate else 0.0)
                await queue.put((free_at + self.delay_s, data))
        await queue.put((0.0, b""))
        await sending

    async def _send(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                due, data = await queue.get()
                if not data:
                    break
                if (wait_s := due - self._loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def _do(self, what: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(what)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(10)

    def cut(self) -> None:
        """Cut all connections, and take no more."""
        self._open = False
        self._do(self._cut)

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def mend(self) -> None:
        """Take connections again."""
        self._open = True

    def close(self) -> None:
        """End all."""
        self.cut()
        self._do(self._server.close)
        self._do(self._cancel)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()


@contextmanager
def relay(target: int, **how: float) -> Iterator[Relay]:
    """Run a relay to a port."""
    line = Relay(target, **how)
    try:
        yield line
    finally:
        line.close()
