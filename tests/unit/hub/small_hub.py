"""A hub that does coordination and nothing else: real comms, a real client stream, and keys that are only kept."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from distributed.batched import BatchedSend
from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status

from daskfed.comm.opaque import OpaqueServer
from daskfed.hub.coordination import attach
from daskfed.hub.journal import Journal

OWNER = "somebody"


class SmallHub(OpaqueServer):
    """Serves stock clients; ``data`` holds what they scatter, unopened, and ``wanted`` who wants which key."""

    def __init__(self, journal: Journal | None = None) -> None:
        super().__init__({"register-client": self.add_client, "scatter": self.scatter, "gather": self.gather})
        self.handlers["from-site"] = self.from_site
        self.stream_handlers["client-desires-keys"] = self.client_desires_keys
        self.stream_handlers["client-releases-keys"] = self.client_releases_keys
        self.stream_handlers["heartbeat-client"] = lambda client: None
        self.clients: dict[str, BatchedSend] = {}
        self.tasks: dict[Any, Any] = {}
        self.data: dict[Any, Any] = {}
        self.wanted: dict[str, set[Any]] = defaultdict(set)
        self.coordination = attach(self, journal)

    def identity(self, n_workers: int = 0) -> dict[str, Any]:
        """Say what a client asks first."""
        return {"type": "SmallHub", "id": self.id, "address": self.address, "services": {}, "started": 0, "workers": {}}

    async def add_client(self, comm: Comm, client: str, versions: Any = None) -> Status:
        """Serve a client's stream."""
        stream = self.clients[client] = BatchedSend(interval="2ms", loop=self.loop)
        stream.start(comm)
        stream.send({"op": "stream-start"})
        try:
            await self._serve(comm, client)
        except CommClosedError:
            pass
        finally:
            del self.clients[client]
            self.wanted.pop(client, None)
            self.coordination.client_gone(client)
            comm.abort()
        return Status.dont_reply

    async def _serve(self, comm: Comm, client: str) -> None:
        while True:
            for message in await comm.read():
                op = message.pop("op")
                if op == "close-client":
                    return
                result = self.stream_handlers[op](**{**message, "client": client})
                if inspect.isawaitable(result):
                    await result

    def add_key(self, key: Any, state: str, **blame: Any) -> None:
        """Make a key known."""
        self.tasks[key] = SimpleNamespace(state=state, exception_blame=SimpleNamespace(**blame))

    def scatter(self, data: dict[Any, Any], client: str, **options: Any) -> None:
        """Keep values."""
        for key, value in data.items():
            self.data[key] = value
            self.add_key(key, "memory")

    def gather(self, keys: Collection[Any]) -> dict[str, Any]:
        """Return values."""
        return {"status": "OK", "data": {key: self.data[key] for key in keys}}

    async def from_site(self, site: str, hub_op: str, kwargs: dict[str, Any]) -> Any:
        """Serve what a site's agent forwards."""
        return await self.coordination.serve_site(site, hub_op, kwargs)

    def client_desires_keys(self, keys: Collection[Any], client: str) -> None:
        """Note who wants what."""
        self.wanted[client].update(keys)

    def client_releases_keys(self, keys: Collection[Any], client: str) -> None:
        """Note who wants what no more."""
        self.wanted[client].difference_update(keys)
        if not self.wanted[client]:
            del self.wanted[client]

    def send_all(self, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        """Send messages to clients."""
        for client, messages in client_msgs.items():
            if client in self.clients:
                self.clients[client].send(*messages)

    def owner_of(self, client: str) -> str:
        """Return whom a client acts for: there is one user."""
        return OWNER

    def owner_calling(self) -> str:
        """Return for whom a call is."""
        return OWNER

    def owner_at(self, site: str, key: Any) -> str | None:
        """Return whose task logged an event."""
        return OWNER

    def origin(self, site: str, worker: str) -> dict[str, str]:
        """Return from where an event came."""
        return {"worker": f"fed://{site}/{worker.split('://')[-1]}", "site": site}

    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        """Stop."""
        self.coordination.close()
        await super().close(timeout=timeout, reason=reason)
