"""Sending messages of a stream at once, and together those that come while others leave.

A ``BatchedSend`` of Dask keeps what comes within an interval of what has left before, which is most of the time that a
short call takes. Where a loop has much to do, messages come together without waiting: what is sent in one turn of the
loop, or while a message is written, leaves as one.
"""

from __future__ import annotations

import logging
from typing import Any

from distributed.batched import BatchedSend
from distributed.comm.core import Comm, CommClosedError

logger = logging.getLogger(__name__)


class PromptSend(BatchedSend):
    """A ``BatchedSend`` without an interval. What it has sent it does not remember."""

    buffer: list[Any]

    def __init__(self, loop: Any = None, serializers: Any = None) -> None:
        super().__init__(0, loop, serializers)

    def start(self, comm: Comm) -> None:
        """Send over ``comm``."""
        comm.allow_offload = False  # what is large is serialized already; to find out how large it is takes long
        super().start(comm)

    async def _background_send(self) -> None:
        try:
            while not self.please_stop:
                if not self.buffer:
                    await self.waker.wait()
                    self.waker.clear()
                    continue
                payload, self.buffer = self.buffer, []
                self.batch_count += 1
                self.byte_count += await self.comm.write(payload, serializers=self.serializers, on_error="raise")
                del payload
        except CommClosedError:
            logger.info("the stream to %s has closed", self.comm)
            self.abort()
        except Exception:  # part of a message may have been written: nothing can be said after it
            logger.exception("a message of the stream to %s could not be written", self.comm)
            self.abort()
        self.stopped.set()


def promptly(stream: BatchedSend) -> PromptSend:
    """Return a stream that goes on in the place of another one, which has just been started and has sent nothing."""
    stream.please_stop = True
    stream.waker.set()
    prompt = PromptSend(stream.loop, stream.serializers)
    prompt.send(*stream.buffer)
    prompt.start(stream.comm)
    return prompt
