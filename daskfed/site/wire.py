"""A raw client of a site's stock scheduler: it passes payloads on without opening them.

It speaks Dask's client protocol: one stream for graphs, releases and reports. Reports come out as events of the site's
core, in order, with the opaque things that travel beside them.

The scheduler works a client's stream off in order, but its answers lag behind. So the wire sends marks, questions for a
key that does not exist, whose answers come back in order too: an answer to a mark means that the scheduler has seen
all that was sent before it. That tells which blocks a load report includes, and it ends the silence about released
keys: reports on them that were under way are dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distributed.batched import BatchedSend
from distributed.comm.core import CommClosedError
from distributed.versions import get_versions

from daskfed.comm.opaque import connect_opaque
from daskfed.dask_private import Serialized, ToPickle
from daskfed.ending import end_tasks
from daskfed.errors import SiteStartError
from daskfed.messages import Key, MadeKey
from daskfed.site import events as ev

SEND_INTERVAL = "2ms"
CLOSE_TIMEOUT_S = 2.0
POLL_S = 0.005
SAME_ERROR_BYTES = 2**16  # larger errors are not compared with each other


@dataclass(slots=True)
class Report:
    """One batch of what the scheduler said."""

    events: list[ev.Event] = field(default_factory=list)
    types: dict[Key, Any] = field(default_factory=dict)  # pickled type of a result
    values: dict[Key, bytes] = field(default_factory=dict)  # small results of calls, pickled
    errors: dict[Key, dict[str, Any]] = field(default_factory=dict)  # exception and traceback, unopened
    status: dict[str, Any] | None = None  # the newest fed-status
    learned: list[dict[str, Any]] = field(default_factory=list)  # fed-learned
    restarted: bool = False  # the scheduler has forgotten everything


class SchedulerWire:
    """A client of the scheduler at ``address``; ``deliver`` gets each :class:`Report`, ``ended`` the end of the stream.

    ``client`` is the id under which it asks for keys, which the scheduler forgets when the wire closes.
    """

    def __init__(
        self,
        address: str,
        client: str,
        deliver: Callable[[Report], None],
        ended: Callable[[], None],
        connection_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.address = address
        self.client = client
        self.deliver = deliver
        self.ended = ended
        self.connection_args = dict(connection_args or {})
        self._stream = BatchedSend(interval=SEND_INTERVAL)
        self._reader: asyncio.Task[None] | None = None
        self._reading = Reading(client)
        self._borrower = f"{client}-borrows"  # a client of the scheduler without a stream

    async def connect(self) -> None:
        """Register at the scheduler; raises OSError where it cannot be reached, SiteStartError where it refuses."""
        comm = await connect_opaque(self.address, **self.connection_args)
        comm.name = "Agent->Scheduler"
        await comm.write({"op": "register-client", "client": self.client, "reply": False, "versions": get_versions()})
        (first, *rest) = await comm.read()
        if first.get("op") != "stream-start" or first.get("error"):
            await comm.close()
            raise SiteStartError(f"the scheduler at {self.address} refused the agent: {first.get('error') or first}")
        self._stream.start(comm)
        self._reader = asyncio.create_task(self._read(comm, rest), name="read from scheduler")

    async def close(self) -> None:
        """End the stream; the scheduler then lets go of all keys that were asked for."""
        await end_tasks(self._reader)
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._stream.close(), CLOSE_TIMEOUT_S)
        self._stream.abort()

    async def _read(self, comm: Any, batch: Collection[dict[str, Any]]) -> None:
        try:
            while True:
                if batch:
                    self.deliver(self._reading.report(batch))
                batch = await comm.read()
        except CommClosedError:
            self.ended()

    def _send(self, *messages: dict[str, Any]) -> None:
        with suppress(CommClosedError):  # the reader notices too
            self._stream.send(*messages)

    # -- what can be asked of the scheduler --------------------------------------------------------------------------

    def submit(
        self,
        keys: Collection[Key],
        expr: Any,
        priorities: Mapping[Key, int] | None = None,
        actors: bool | Mapping[Key, Collection[Key]] | None = None,
        priority: int = 0,
    ) -> None:
        """Have the tasks of a pickled expression run and keep ``keys``; lower ``priorities`` run first.

        ``priority`` is that of all, before others: a higher one runs earlier, as everywhere in Dask.

        ``actors``: True where all of ``keys`` are to be actors, or key -> actors among the tasks that it takes.
        """
        marked: Any = actors
        if isinstance(actors, Mapping):  # of what is not asked for there may be no task
            marked = list(dict.fromkeys(actor for key in keys for actor in actors.get(key, ())))
        order = {"internal_priority": priorities, "user_priority": priority}
        self.update_graph({"expr_ser": expr, "keys": set(keys), **order, "actors": marked})

    def submit_block(self, keys: Collection[Key], payload: Mapping[str, Any]) -> None:
        """Submit a block: its expression and priorities, or all fields of an ``update-graph`` message, or a claim."""
        if self._reading.failures:
            self._send({"op": "fed-renew"})
        if payload.get("claim"):
            self._send({"op": "fed-claim", "keys": list(keys)})
        elif "expr_ser" in payload:
            self.update_graph(payload)
        else:
            self.submit(keys, payload["expr"], payload.get("priorities"), payload.get("actors"))
        self._send(self._reading.mark(submitted=1))

    def note_elsewhere(self) -> None:
        """Note that a block was submitted that is not for the scheduler, or only in part."""
        self._reading.submitted_elsewhere()

    def submit_calls(self, keys: Collection[Key], expr: Any, annotations: Mapping[str, Any]) -> None:
        """Submit calls that are not for lanes."""
        if self._reading.failures:
            self._send({"op": "fed-renew"})
        self.update_graph({"expr_ser": expr, "keys": set(keys), "annotations": ToPickle(annotations)})

    def submit_imports(self, keys: Collection[Key], expr: Any, priority: int, annotations: Mapping[str, Any]) -> None:
        """Submit fetch tasks under the names ``keys``; a higher ``priority`` runs earlier, as everywhere in Dask."""
        self._send({"op": "fed-import", "keys": list(keys)})
        order = {"internal_priority": dict.fromkeys(keys, 0), "user_priority": priority}
        self.update_graph({"expr_ser": expr, "keys": set(keys), **order, "annotations": ToPickle(annotations)})

    def update_graph(self, fields: Mapping[str, Any]) -> None:
        """Send an ``update-graph`` message; fields that are not given are as a plain client sends them."""
        self._send({**_plain_fields(), **fields, "op": "update-graph", "client": self.client})

    def desire(self, keys: Collection[Key]) -> None:
        """Have the scheduler keep keys that it has already."""
        self._send({"op": "client-desires-keys", "keys": list(keys), "client": self.client})

    def release(self, keys: Collection[Key]) -> None:
        """Have the scheduler let go of keys; reports on them that are under way will not be delivered."""
        release = {"op": "client-releases-keys", "keys": list(keys), "client": self.client}
        ended = {"op": "fed-released", "keys": list(keys)}
        self._send(release, ended, self._reading.mark(silent=keys))

    def borrow(self, keys: Collection[Key], empty: Any) -> None:
        """Have the scheduler keep keys that it knows, made again if need be, and say nothing of it to the agent.

        ``empty`` is a pickled expression without tasks: Dask makes a key again only for who submits a graph.
        """
        known = {"op": "client-desires-keys", "keys": [], "client": self._borrower}  # else its releases were an error
        fields = {"expr_ser": empty, "keys": set(keys), "client": self._borrower}
        self._send(known, {**_plain_fields(), **fields, "op": "update-graph"})

    def give_back(self, keys: Collection[Key]) -> None:
        """End :meth:`borrow`."""
        self._send({"op": "client-releases-keys", "keys": list(keys), "client": self._borrower})

    async def quiet(self, keys: Collection[Key]) -> None:
        """Wait until the scheduler has seen the release of each of these keys that was released."""
        while not self._reading.heard_release(keys):
            await asyncio.sleep(POLL_S)


def _plain_fields() -> dict[str, Any]:
    return {
        "internal_priority": None,
        "submitting_task": None,
        "fifo_timeout": 0.0,
        "actors": None,
        "code": ToPickle(()),
        "annotations": ToPickle({}),
        "span_metadata": ToPickle({}),
    }


class Reading:
    """Turns batches of the scheduler's messages into reports, and keeps the marks. No I/O."""

    def __init__(self, client: str) -> None:
        self._prefix = f"daskfed-mark-{client}-"
        self._marks = 0
        self._submitted = 0
        self._submissions: dict[int, int] = {}  # mark -> blocks submitted before it
        self._seen = 0  # blocks that the scheduler has taken in
        self._silent: dict[Key, int] = {}  # released key -> mark that ends the silence
        self._silent_until: dict[int, list[Key]] = {}
        self.failures = False  # whether the scheduler ever reported a failed task, which it may remember

    def mark(self, submitted: int = 0, silent: Collection[Key] = ()) -> dict[str, Any]:
        """Return the message that sets a mark."""
        self._marks += 1
        self._submitted += submitted
        self._submissions[self._marks] = self._submitted
        if silent:
            self._silent_until[self._marks] = list(silent)
            self._silent.update(dict.fromkeys(silent, self._marks))
        return {"op": "report-key", "key": f"{self._prefix}{self._marks}"}

    def heard_release(self, keys: Collection[Key]) -> bool:
        """Say whether there is no silence about any of these keys."""
        return self._silent.keys().isdisjoint(keys)

    def submitted_elsewhere(self) -> None:
        """A block was submitted that is not for the scheduler: it counts as taken in with the marks before it."""
        self._submitted += 1
        if not self._submissions:
            self._seen = self._submitted

    def _marked(self, mark: int) -> None:
        seen = self._submissions.pop(mark)
        self._seen = seen if self._submissions else self._submitted
        for key in self._silent_until.pop(mark, ()):
            if self._silent.get(key) == mark:
                del self._silent[key]

    def report(self, batch: Collection[dict[str, Any]]) -> Report:
        """Return what a batch says."""
        report = Report()
        sizes = {each["key"]: each["nbytes"] for each in batch if each.get("op") == "fed-key"}
        causes = {each["key"]: each["blame"] for each in batch if each.get("op") == "fed-erred"}
        ready: list[MadeKey] = []
        erred: list[Key] = []
        for message in batch:
            op = message.get("op")
            if op in ("fed-key", "fed-erred"):
                continue
            if op != "key-in-memory":
                _flush_ready(report, ready)
            if op != "task-erred":
                _flush_erred(report, erred, causes)
            if op == "key-in-memory":
                self._key_in_memory(report, ready, message, sizes)
            elif op == "task-erred":
                self._task_erred(report, erred, message, causes)
            else:
                self._other(report, message)
        _flush_ready(report, ready)
        _flush_erred(report, erred, causes)
        return report

    def _key_in_memory(
        self, report: Report, ready: list[MadeKey], message: dict[str, Any], sizes: Mapping[Key, int]
    ) -> None:
        key = message["key"]
        if key not in self._silent:
            ready.append(MadeKey(key, sizes.get(key, 0)))
            if "type" in message:
                report.types[key] = message["type"]

    def _task_erred(
        self, report: Report, erred: list[Key], message: dict[str, Any], causes: Mapping[Key, Key | None]
    ) -> None:
        key = message["key"]
        self.failures = True
        if key in self._silent:
            return
        error = {"exception": _unopened(message["exception"]), "traceback": message["traceback"]}
        if erred and not (_same(report.errors[erred[-1]], error) and _as_one(causes, erred[-1], key)):
            _flush_erred(report, erred, causes)
        report.errors[key] = error
        erred.append(key)

    def _other(self, report: Report, message: dict[str, Any]) -> None:
        match message.get("op"):
            case "cancelled-keys":
                self._cancelled(report, message["keys"])
            case "fed-load":
                report.events.append(ev.Load(message["unfinished"], message["threads"], self._seen))
            case "fed-status":
                report.status = message
            case "fed-learned":
                report.learned.append(message)
            case "restart":
                report.restarted = True

    def _cancelled(self, report: Report, keys: Collection[Key]) -> None:
        gone = []
        for key in keys:
            if isinstance(key, str) and key.startswith(self._prefix):
                self._marked(int(key.removeprefix(self._prefix)))
            elif key not in self._silent:
                gone.append(key)
        if gone:
            report.events.append(ev.KeysForgotten(tuple(gone)))


def _flush_ready(report: Report, ready: list[MadeKey]) -> None:
    if ready:
        report.events.append(ev.KeysReady(tuple(ready)))
        ready.clear()


def _flush_erred(report: Report, erred: list[Key], causes: Mapping[Key, Key | None]) -> None:
    if erred:
        blame = causes.get(erred[0])
        report.events.append(ev.KeysErred(tuple(erred), erred[0] in causes and blame is None, blame))
        erred.clear()


def _as_one(causes: Mapping[Key, Key | None], one: Key, other: Key) -> bool:
    """Whether two keys failed for one reason, as far as the reporter said why."""
    return (one in causes) is (other in causes) and causes.get(one) == causes.get(other)


def _unopened(exception: Any) -> Any:
    """Return an exception as errors of tasks come; those of the scheduler itself come as bytes that were pickled."""
    return Serialized({"serializer": "pickle", "writeable": ()}, [exception]) if type(exception) is bytes else exception


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two errors are one and the same, as far as can be told without opening them."""
    mine, theirs = _bytes_of(one["exception"]), _bytes_of(other["exception"])
    return mine is not None and mine == theirs


def _bytes_of(serialized: Any) -> bytes | None:
    frames = getattr(serialized, "frames", None)
    if frames is None or sum(memoryview(frame).nbytes for frame in frames) > SAME_ERROR_BYTES:
        return None
    return b"".join(bytes(frame) for frame in frames)
