"""What a user asks of a whole federation to see what it does: each site's scheduler is asked, the answers are merged.

The sites' answers are plain data, or payloads that pass unopened. Where there is and will be one site, as behind
``Client()``, its own answer is given, as stock Dask gives it. A site that is gone, or away for a moment, is left out.
"""

from __future__ import annotations

import asyncio
import html
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed import profile

from daskfed.comm.opaque import OpaqueError
from daskfed.hub.fanout import answers_errors
from daskfed.hub.merging import (
    add_series,
    first_or_last,
    merge_benchmarks,
    merge_stories,
    merge_task_metadata,
    merge_task_streams,
    page_of_reports,
)
from daskfed.messages import Key, agent_client

if TYPE_CHECKING:
    from daskfed.hub.server import Hub


@dataclass(slots=True)
class Sampler:
    """Samples of memory that are being taken for a client at several sites."""

    client: str
    started_at: float  # by the hub's clock
    keys: dict[str, str]  # site -> the name of its series there


class Observing:
    """Answers to clients' RPCs that are made from the answers of all sites."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.fanout = hub.fanout
        self._samplers: dict[str, Sampler] = {}
        self._collecting: dict[str, set[str]] = {}  # name of a collection of task metadata -> incarnations of sites
        self._streaming = False  # whether records of tasks were ever asked for; schedulers keep them from then on

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return the RPC handlers, by op."""
        handlers: dict[str, Callable[..., Any]] = {
            "get_task_stream": self.get_task_stream,
            "get_task_stream_index": self.get_task_stream_index,
            "performance_report": self.performance_report,
            "profile": self.profile,
            "start_task_metadata": self.start_task_metadata,
            "stop_task_metadata": self.stop_task_metadata,
            "memory_sampler_start": self.memory_sampler_start,
            "memory_sampler_stop": self.memory_sampler_stop,
            "get_cluster_state": self.get_cluster_state,
            "benchmark_hardware": self.benchmark_hardware,
            "fed_story": self.story,
        }
        return {op: answers_errors(handler) for op, handler in handlers.items()}

    # -- tasks -------------------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        """Whether sites are to keep records of tasks."""
        return self._streaming or bool(self._collecting)

    async def record_at(self, site: str) -> None:
        """Have a site that has joined take part in what is being recorded."""
        if self._streaming:
            with suppress(OSError, OpaqueError):
                await self.fanout.ask("get_task_stream_index", {site: {}})
        for name, incarnations in list(self._collecting.items()):
            incarnation = self._incarnations().get(site)
            if incarnation is not None and incarnation not in incarnations:
                with suppress(OSError, OpaqueError):
                    await self.fanout.ask("start_task_metadata", {site: {"name": name}})
                    incarnations.add(incarnation)

    def _incarnations(self) -> dict[str, str]:
        return {site: self.hub.ports[site].hello.incarnation for site in self.fanout.everywhere()}

    async def get_task_stream_index(self) -> dict[str, int]:
        """Return incarnation of a site -> how many tasks it has recorded: where a stream that begins now begins."""
        self._streaming = True
        incarnations = self._incarnations()
        found = await self.fanout.ask("get_task_stream_index", self.fanout.everywhere())
        return {incarnations[site]: index for site, index in found.items()}

    async def get_task_stream(
        self,
        start: str | float | None = None,
        stop: str | float | None = None,
        count: int | None = None,
        start_index: Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the records of tasks that ran, of all sites, in the order in which they ended."""
        self._streaming = True
        calls = self.fanout.everywhere(start=start, stop=stop, count=count)
        if start_index is not None:
            incarnations = self._incarnations()
            calls = {site: {"start_index": start_index.get(incarnations[site], 0)} for site in calls}
        records = merge_task_streams(await self.fanout.ask("get_task_stream", calls), self.fanout.shown)
        return records if start_index is not None else first_or_last(records, count, first=start is not None)

    async def start_task_metadata(self, name: str) -> None:
        """Begin to collect metadata and final states of the tasks that are submitted from now on."""
        self._collecting[name] = set(self._incarnations().values())
        try:
            await self.fanout.ask("start_task_metadata", self.fanout.everywhere(name=name))
        except BaseException:
            self._collecting.pop(name, None)
            raise

    async def stop_task_metadata(self, name: str) -> dict[str, dict[Key, Any]]:
        """Return what was collected: ``metadata`` and ``state`` by key; raises ValueError for a name nobody started."""
        if name not in self._collecting:
            raise ValueError(f"no collection of task metadata {name!r} was started with this hub")
        collecting = self._collecting.pop(name)
        calls = {site: {"name": name} for site, each in self._incarnations().items() if each in collecting}
        return merge_task_metadata((await self.fanout.ask("stop_task_metadata", calls)).values())

    async def story(
        self, keys_or_stimuli: Collection[Any], on_error: str = "raise"
    ) -> list[tuple[str, *tuple[Any, ...]]]:
        """Return what schedulers and workers noted of keys: each time who noted it, then what, as in stock Dask."""
        names = list(keys_or_stimuli)
        message = {"op": "get_story", "keys_or_stimuli": names}
        asked = self.fanout.ask("get_story", self.fanout.everywhere(keys_or_stimuli=names), keep_errors=True)
        told = self.fanout.ask("broadcast", self.fanout.everywhere(msg=message, on_error=on_error), keep_errors=True)
        schedulers, workers = await asyncio.gather(asked, told)
        for reply in (*schedulers.values(), *workers.values()):
            if isinstance(reply, BaseException) and on_error == "raise":
                raise reply
        return merge_stories(schedulers, workers, self.fanout.shown, alone=self.fanout.alone)

    # -- reports -----------------------------------------------------------------------------------------------------

    async def performance_report(
        self, start: float, last_count: int | Mapping[str, int], code: str = "", mode: str | None = None
    ) -> str:
        """Return one HTML page with the reports of all sites; a site that could make none says why.

        ``last_count`` is a count of each site's monitor, by site or for all. Raises OpaqueError where none made one.
        """
        counts = last_count if isinstance(last_count, Mapping) else dict.fromkeys(self.hub.ports, last_count)
        written = code if self.fanout.alone else html.escape(code, quote=False)
        calls = {
            site: {"start": start, "last_count": counts.get(site, 0), "code": written, "mode": mode}
            for site in self.fanout.everywhere()
        }
        replies = await self.fanout.ask("performance_report", calls, keep_errors=True)
        problems = [reply for reply in replies.values() if isinstance(reply, OpaqueError)]
        if problems and len(problems) == len(replies):
            raise problems[0]
        if self.fanout.alone and replies:
            return str(next(iter(replies.values())))
        return page_of_reports(replies)

    async def profile(
        self,
        key: str | None = None,
        workers: Collection[str] | None = None,
        merge_workers: bool = True,
        start: float | None = None,
        stop: float | None = None,
        server: bool = False,
        scheduler: bool = False,
    ) -> dict[str, Any]:
        """Return the profile of all sites together, or with ``merge_workers=False`` worker -> its profile.

        ``workers`` as everywhere (:mod:`.addresses`); raises UnknownWorkerError for a name that says nothing.
        """
        how = {"key": key, "start": start, "stop": stop, "server": server, "scheduler": scheduler}
        calls = self.fanout.everywhere(**how, workers=None, merge_workers=merge_workers)
        if workers is not None:
            chosen = await self.fanout.targets(workers)
            calls = {site: {**calls[site], "workers": there} for site, there in chosen.items() if site in calls}
        replies = await self.fanout.ask("profile", calls)
        if merge_workers or scheduler:
            return profile.merge(*replies.values())  # type: ignore[no-any-return]
        return self.fanout.merged(replies)

    async def get_cluster_state(self, exclude: Collection[str]) -> dict[str, Any]:
        """Return ``sites``: site -> the state of its scheduler and workers as stock Dask dumps it; and ``hub``."""
        states = await self.fanout.ask("get_cluster_state", self.fanout.everywhere(exclude=list(exclude)))
        if self.fanout.alone and states:
            return dict(next(iter(states.values())))
        transfers = await self.hub.gateway.fed_transfers()
        hub = {"address": self.hub.address, "epoch": self.hub.core.ledger.epoch}
        hub |= {"started": self.hub.started_at, "sites": self.hub.gateway.sites_info(), "transfers": transfers}
        return {"hub": hub, "sites": states}

    async def benchmark_hardware(self) -> dict[str, dict[str, float]]:
        """Return ``disk``, ``memory`` and ``network``: size -> bytes per second, the mean over all workers."""
        replies = await self.fanout.ask("benchmark_hardware", self.fanout.everywhere())
        counts = Counter(worker.site for worker in await self.fanout.workers())
        return merge_benchmarks([(reply, counts[site]) for site, reply in replies.items()])

    # -- memory ------------------------------------------------------------------------------------------------------

    async def memory_sampler_start(self, client: str, measure: str, interval: float) -> str:
        """Begin to sample the memory of all sites for ``client``, and return the name of the series."""
        agents = {site: agent_client(self.hub.ports[site].hello.incarnation) for site in self.fanout.everywhere()}
        calls = {site: {"client": agent, "measure": measure, "interval": interval} for site, agent in agents.items()}
        name = str(uuid.uuid4())
        started = await self.fanout.ask("memory_sampler_start", calls, keep_errors=True)
        keys = {site: key for site, key in started.items() if not isinstance(key, OpaqueError)}
        self._samplers[name] = Sampler(client, time.time(), keys)
        if failed := [reply for reply in started.values() if isinstance(reply, OpaqueError)]:
            await self.memory_sampler_stop(name)
            raise failed[0]
        return name

    async def memory_sampler_stop(self, key: str) -> list[tuple[float, int]]:
        """End a series and return it: (time, bytes at all sites together); raises KeyError for one nobody started."""
        if key not in self._samplers:
            raise KeyError(f"no series of memory samples {key!r} was started with this hub, or its client is gone")
        sampler = self._samplers.pop(key)
        calls = {site: {"key": name} for site, name in sampler.keys.items() if site in self.fanout.everywhere()}
        replies = await self.fanout.ask("memory_sampler_stop", calls, keep_errors=True)
        series = [reply for reply in replies.values() if not isinstance(reply, OpaqueError)]
        return add_series(series, sampler.started_at)

    async def client_gone(self, client: str) -> None:
        """End the series that a client began that is gone."""
        for name in [name for name, sampler in self._samplers.items() if sampler.client == client]:
            with suppress(KeyError):  # it was ended meanwhile
                await self.memory_sampler_stop(name)
