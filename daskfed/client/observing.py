"""What a client does its own way to show what a federation does; all else is Dask's, answered by the hub."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import distributed
from distributed.client import Future

from daskfed.client.graphs import MaterialisedGraph
from daskfed.dask_private import ReplayTaskClient, handle_print, handle_warn

STOCK_HANDLERS: dict[str, Callable[[Any], None]] = {"print": handle_print, "warn": handle_warn}


class Observing(distributed.Client):
    """The part of a client that observes; the client derives from it."""

    scheduler_file: str | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._topics: set[str] = set()
        super().__init__(*args, **kwargs)
        FederatedReplay(self)

    # -- topics ------------------------------------------------------------------------------------------------------

    def subscribe_topic(self, topic: str, handler: Callable[[Any], Any]) -> None:
        """Have ``handler`` called with each event of a topic, (time, message), from clients and tasks of this user."""
        self._topics.add(topic)
        if handler is STOCK_HANDLERS.get(topic):
            handler = TAGGED_HANDLERS[topic]
        super().subscribe_topic(topic, handler)

    def unsubscribe_topic(self, topic: str) -> None:
        """Have events of a topic no longer handled; raises ValueError where they were not."""
        self._topics.discard(topic)
        super().unsubscribe_topic(topic)

    def _subscribe_again(self) -> None:
        """Tell a hub that may have started anew which topics this client listens to.

        It is told at once, before work is brought back, so that nothing is missed of what that work logs.
        """
        for topic in self._topics:
            self.scheduler_comm.send({"op": "subscribe-topic", "topic": topic, "client": self.id})

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def dashboard_link(self) -> str:
        """URL of the hub's page, which links the sites' dashboards; of ``Client()``, its scheduler's dashboard."""
        if (link := getattr(self.cluster, "dashboard_link", None)) is not None:
            return str(link)
        _, info = self._get_scheduler_info(n_workers=0)
        own = info is not None and "dashboard" in info.get("services", {})
        return str(super().dashboard_link if own else (info or {}).get("fed", {}).get("dashboard", ""))

    def write_scheduler_file(self, scheduler_file: str) -> None:
        """Write where the hub is to a JSON file, for ``Client(scheduler_file=…)``."""
        if self.scheduler_file:
            raise ValueError(f"this client uses the scheduler file {self.scheduler_file!r} already")
        self.scheduler_file = scheduler_file
        with open(scheduler_file, "w", encoding="utf-8") as file:
            json.dump(self.scheduler_info(), file, indent=2, skipkeys=True)  # workers count some things by tuples

    async def _story(self, *keys_or_stimuli: Any, on_error: str = "raise") -> list[Any]:
        if on_error not in ("raise", "ignore"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'ignore'")
        return list(await self.scheduler.fed_story(keys_or_stimuli=list(keys_or_stimuli), on_error=on_error))

    async def _dump_cluster_state(
        self, filename: str = "dask-cluster-dump", write_from_scheduler: bool | None = None, **kwargs: Any
    ) -> None:
        if write_from_scheduler:
            raise ValueError(
                "a hub writes no files for its clients: leave write_from_scheduler out, and this client writes "
                f"{filename!r}, which may be a URL"
            )
        await super()._dump_cluster_state(filename, write_from_scheduler=False, **kwargs)


# -- what tasks print ------------------------------------------------------------------------------------------------


def print_tagged(event: tuple[float, Any]) -> None:
    """Print what a task printed at a site, after the site's name."""
    site = _site_of(event)
    if site is None:
        STOCK_HANDLERS["print"](event)
        return
    message = event[1]
    written = io.StringIO()
    print(*message["args"], sep=message.get("sep"), end=message.get("end"), file=written)
    file = sys.stderr if message.get("file") == 2 else sys.stdout
    print(f"[{site}] {written.getvalue()}", end="", file=file, flush=bool(message.get("flush")))


def warn_tagged(event: tuple[float, Any]) -> None:
    """Issue the warning that a task issued at a site, with the site's name where a file's name would be."""
    site = _site_of(event)
    if site is None or "message" not in event[1]:
        STOCK_HANDLERS["warn"](event)
        return
    message = pickle.loads(event[1]["message"])
    category = pickle.loads(event[1]["category"]) if "category" in event[1] else None
    warnings.warn_explicit(message, category or UserWarning, filename=f"[{site}] {event[1]['worker']}", lineno=0)


def _site_of(event: tuple[float, Any]) -> str | None:
    """Return the site whose task logged an event; None where there is one site only, or it was logged by hand."""
    message = event[1]
    logged_by_task = isinstance(message, dict) and isinstance(message.get("args", ()), tuple)
    return message.get("site") if logged_by_task else None


TAGGED_HANDLERS: dict[str, Callable[[Any], None]] = {"print": print_tagged, "warn": warn_tagged}


# -- running a task again --------------------------------------------------------------------------------------------


class FederatedReplay(ReplayTaskClient):
    """``recreate_task_locally`` and ``recreate_error_locally``: recipes and inputs come from sites, through the hub."""

    async def _get_components_from_future(self, future: Any) -> tuple[Any, dict[Any, Any]]:
        await _ended(future)
        key = getattr(future, "key", future)
        if key in self.client._assemblies:
            assembly, parts = self.client._assemblies[key]
            return assembly.task, await self.client._gather({part.key: part for part in parts})
        runspec = await self.scheduler.get_runspec(key=key)
        needed = list(runspec.dependencies)
        known = list(await self.scheduler.fed_known(keys=needed))
        inner = [each for each in needed if each not in known]
        return runspec, {**await self._gather_known(known), **await self._make_again(key, inner)}

    async def _gather_known(self, keys: list[Any]) -> Any:
        """Return the values of keys of the federation, which are made again where they were released."""
        self.client._send_to_scheduler({"op": "client-desires-keys", "keys": keys, "client": self.client.id})
        return await self.client._gather({key: Future(key, self.client) for key in keys})

    async def _make_again(self, key: Any, keys: list[Any]) -> Any:
        """Return values that never left the inside of the block of ``key``, made once more."""
        if not keys:
            return {}
        for spec, tasks in self.client._memory.opened():
            if key in tasks and not tasks.keys().isdisjoint(keys):
                constraints = dict.fromkeys(tasks, spec.constraint)
                graph = MaterialisedGraph(tasks, set(keys), constraints).restricted(tasks)
                return await self.client._gather(self.client._submit_graph(graph, keys))
        return await self.scheduler.fed_make_again(key=key, keys=keys)

    async def _get_errored_future(self, future: Any) -> Any:
        await _ended(future)
        failed = [each.key for each in distributed.futures_of(future) if each.status == "error"]
        if not failed:
            raise ValueError("No errored futures passed")
        asked = [part for key in failed for part in self.client._part_keys(key)]
        cause = await self.scheduler.get_error_cause(keys=asked)
        if cause is None:
            raise ValueError(f"no site remembers why {failed[0]!r} failed: submit it again")
        return cause


async def _ended(future: Any) -> None:
    """Wait until a future, or those of a collection, have ended."""
    for each in distributed.futures_of(future):
        await each._state.wait()
