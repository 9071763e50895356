"""How an agent starts and steers the Dask Cluster of its site.

:class:`HostedCluster` runs it in a process of its own (:mod:`daskfed.site.host`), so that the agent never opens what
users pickle: the site's scheduler, which does, lives there. :class:`InProcessCluster` runs it on the current event
loop, for the embedded default, where agent, scheduler and client belong to one process anyway.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import inspect
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cloudpickle
from distributed import LocalCluster, Scheduler
from distributed.core import rpc
from distributed.deploy.adaptive import Adaptive
from distributed.deploy.spec import SpecCluster
from distributed.security import Security
from distributed.utils import import_term

from daskfed import errors
from daskfed.config import hint_for, patient_clusters
from daskfed.errors import ConfigurationError, DaskfedError, SiteStartError
from daskfed.site import forking

if TYPE_CHECKING:
    from daskfed.profile import Scale, SiteOptions

PLAIN = (str, int, float, bool, type(None))
SECRET = re.compile("pass|secret|token|key|credential|auth|env", re.IGNORECASE)  # options that errors do not show
HOST = "from daskfed.site.host import main; main({})"  # not by -m: processes that it spawns would import it again
LOCAL = (LocalCluster, "dask.distributed.LocalCluster", "distributed.LocalCluster")
DASHBOARD = "127.0.0.1:8787"  # or another port where that is taken
START_TIMEOUT_S = 60.0
ANSWER_S = 5.0  # of a scheduler that runs already
CLOSE_TIMEOUT_S = 10.0


class ClusterAdapter(Protocol):
    """A Dask Cluster, as the agent sees it."""

    scheduler_address: str
    dashboard: str
    security: Security | None  # credentials for its scheduler; None if it needs none

    async def start(self) -> None:
        """Start scheduler and workers; raises SiteStartError saying what was wrong and what to do."""
        ...

    async def call(self, method: str, kwargs: Mapping[str, Any]) -> Any:
        """Call ``scale``, ``adapt`` or ``logs`` of the cluster; raises ConfigurationError where it refuses."""
        ...

    async def finished(self) -> None:
        """Return when the cluster has ended, wanted or not."""
        ...

    async def close(self) -> None:
        """End scheduler and workers."""
        ...


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Which Cluster class a site starts, with which keywords.

    ``pickle`` is a cloudpickle of ``{"cluster": class or dotted name, "options": keywords, "scale": how many workers}``
    in base64, which the agent does not open. ``directory`` is the working directory of the workers, by default that of
    the agent. ``forks`` says that the host starts the workers itself, each as a process: then it can fork them.
    """

    pickle: str
    directory: Path | None = None
    in_process: bool = False
    forks: bool = False
    timeout_s: float = START_TIMEOUT_S

    @classmethod
    def of(cls, options: SiteOptions, in_process: bool = False) -> ClusterSpec:
        """Return the spec of checked options."""
        scale = None if options.scale is None else options.scale.model_dump()
        opened = {"cluster": options.cluster, "options": options.options, "scale": scale}
        forks = options.cluster in LOCAL and options.options.get("processes") in (None, True)
        return cls(base64.b64encode(cloudpickle.dumps(opened)).decode(), options.directory, in_process, forks)

    def adapter(self) -> ClusterAdapter:
        """Return the cluster, not started."""
        return InProcessCluster(self) if self.in_process else HostedCluster(self)

    def opened(self) -> tuple[Any, dict[str, Any], Scale | None]:
        """Return Cluster class or name, keywords and scale; only for the process that the cluster is to live in.

        Raises SiteStartError where a class cannot be imported here.
        """
        try:
            opened = cloudpickle.loads(base64.b64decode(self.pickle))
        except Exception as exc:
            raise SiteStartError(f"the Cluster class or its options cannot be opened at the site: {exc!r}") from exc
        return opened["cluster"], opened["options"], _scale_of(opened["scale"])


def _scale_of(given: Mapping[str, Any] | None) -> Scale | None:
    if given is None:
        return None
    from daskfed.profile import Scale

    return Scale(**given)


# -- in the process where the cluster lives --------------------------------------------------------------------------


def resolve(cluster: Any) -> Any:
    """Return a Cluster class from its dotted name, or as given; raises SiteStartError where there is none."""
    if isinstance(cluster, str):
        if "." not in cluster:
            raise SiteStartError(f"{cluster!r} is not the dotted name of a class, like dask.distributed.LocalCluster")
        try:
            cluster = import_term(cluster)
        except (ImportError, AttributeError) as exc:
            hint = "is it spelt right, and is its package installed at the site?"
            raise SiteStartError(f"the Cluster class {cluster} cannot be imported: {exc}; {hint}") from exc
    if not (callable(cluster) and hasattr(cluster, "scheduler_address") and hasattr(cluster, "close")):
        raise SiteStartError(f"{cluster!r} is no Dask Cluster class: it has no scheduler_address and no close()")
    return cluster


async def start_cluster(spec: ClusterSpec) -> Any:
    """Start the cluster of ``spec`` on this event loop; raises SiteStartError."""
    given, options, scale = spec.opened()
    cls: Any = functools.partial(RunningCluster, given) if is_address(given) else resolve(given)
    name = given if is_address(given) else f"{cls.__module__}.{cls.__qualname__}"
    first = {"n_workers": scale.first} if scale is not None and _takes_n_workers(cls) else {}
    try:
        cluster = cls(**{**first, **_own_dashboard(cls, spec), **options, "asynchronous": True})
    except Exception as exc:
        raise SiteStartError(f"{name} rejected its options ({_shown(options)}): {_in_words(exc)}") from exc
    try:
        await asyncio.wait_for(_started(cluster), spec.timeout_s)
    except TimeoutError:
        await _abandon(cluster)
        raise SiteStartError(f"{name} did not start within {spec.timeout_s:g} s; look at its own logs") from None
    except Exception as exc:
        await _abandon(cluster)
        raise SiteStartError(f"{name} did not start with {_shown(options)}: {_in_words(exc)}") from exc
    if scale is not None:
        await _scale(cluster, scale)
    return cluster


def _own_dashboard(cls: Any, spec: ClusterSpec) -> dict[str, str]:
    """Have the dashboard of a site listen on loopback: nothing of a site is to be reached from elsewhere unasked."""
    return {"dashboard_address": DASHBOARD} if cls is LocalCluster and not spec.in_process else {}


def is_address(cluster: Any) -> bool:
    """Whether a site's cluster is given as the address of a scheduler that runs already."""
    return isinstance(cluster, str) and "://" in cluster


class RunningCluster:
    """A scheduler that somebody else has started, and ends; ``security`` is a ``distributed.Security``."""

    dashboard_link = ""

    def __init__(self, address: str, security: Security | None = None, asynchronous: bool = True) -> None:
        self.scheduler_address = address
        self.security = security

    def __await__(self) -> Generator[Any, None, RunningCluster]:
        return self._start().__await__()

    async def _start(self) -> RunningCluster:
        args = self.security.get_connection_args("client") if self.security is not None else {}
        async with rpc(self.scheduler_address, timeout=ANSWER_S, connection_args=args) as scheduler:
            identity = await scheduler.identity()
        if identity.get("type") != "Scheduler":
            raise SiteStartError(f"{self.scheduler_address} is a {identity.get('type')}, no Dask scheduler")
        return self

    def close(self) -> None:
        """Leave it as it is."""


def patience_with(cluster: Any) -> AbstractContextManager[None]:
    """Have a cluster that runs wait for lost workers as long as is right for it (:func:`.patient_clusters`).

    A job that was cancelled, or has had its time, does not come back: the sooner it is given up, the sooner there is
    another one in the queue. One that is given up too soon is cancelled, and replaced as well.
    """
    return nullcontext() if hasattr(cluster, "job_cls") else patient_clusters()


def _takes_n_workers(cls: Any) -> bool:
    return isinstance(cls, type) and "n_workers" in _keywords(_of_class_and_bases(cls, "__init__"))


async def _scale(cluster: Any, scale: Scale) -> None:
    """Have a cluster keep as many workers, or jobs, as wanted; raises SiteStartError where it cannot."""
    method, kwargs = scale.call(jobs="jobs" in inspect.signature(cluster.scale).parameters)
    try:
        await call_cluster(cluster, method, kwargs)
    except ConfigurationError as exc:
        await _abandon(cluster)
        raise SiteStartError(f"option 'scale': {exc}") from exc


def _shown(options: Mapping[str, Any]) -> str:
    """Return options as an error may show them: values that are plain, and no secret by their name."""
    plain = {name for name, value in options.items() if isinstance(value, PLAIN) and not SECRET.search(name)}
    return ", ".join(f"{name}={value!r}" if name in plain else f"{name}=…" for name, value in options.items())


def _in_words(exc: BaseException) -> str:
    """Return an error with what caused it, which is often the part that helps."""
    said = f"{type(exc).__name__}: {exc}"
    cause = exc.__cause__
    return said if cause is None else f"{said} (because of {_in_words(cause)})"


async def _started(cluster: Any) -> None:
    await cluster


async def _abandon(cluster: Any) -> None:
    with suppress(Exception):
        await asyncio.wait_for(_settled(cluster.close()), CLOSE_TIMEOUT_S)


async def _settled(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def credentials(cluster: Any) -> dict[str, Any]:
    """Return the TLS settings of a cluster, as keywords of ``distributed.Security``; empty if it uses none."""
    security = getattr(cluster, "security", None)
    if not getattr(security, "tls_ca_file", None):
        return {}
    roles = [f"tls_{role}_{part}" for role in ("client", "scheduler", "worker") for part in ("cert", "key")]
    return {name: getattr(security, name) for name in ("require_encryption", "tls_ca_file", *roles)}


async def call_cluster(cluster: Any, method: str, kwargs: Mapping[str, Any]) -> Any:
    """Call ``scale``, ``adapt`` or ``logs`` of a cluster; raises ConfigurationError where it has no such thing."""
    names = {"scale": "scale", "adapt": "adapt", "logs": "get_logs"}
    if method not in names:
        raise ConfigurationError(f"a cluster has no {method!r}; there are {', '.join(names)}")
    if method == "adapt":
        _check_adapt(cluster, kwargs)
    try:
        result = await _settled(getattr(cluster, names[method])(**kwargs))
    except Exception as exc:
        raise ConfigurationError(f"{type(cluster).__name__}.{method}({kwargs}) failed: {exc}") from exc
    return {str(name): str(log) for name, log in result.items()} if method == "logs" else None


def _check_adapt(cluster: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords that Dask takes without a word, and then fails with at each attempt to adapt."""
    if not isinstance(cluster, SpecCluster):
        return
    takers = [*_of_class_and_bases(type(cluster), "adapt"), kwargs.get("Adaptive", Adaptive).__init__]
    known = _keywords([*takers, Scheduler.workers_to_close])
    for name in kwargs.keys() - known:
        hint = hint_for(name, sorted(known), "there are")
        raise ConfigurationError(f"{type(cluster).__name__}.adapt has no keyword {name!r}; {hint}")


def _of_class_and_bases(cls: type, method: str) -> list[Any]:
    """Return what a class and its bases define under a name: each may take some keywords and pass the others on."""
    return [each.__dict__[method] for each in cls.__mro__ if method in each.__dict__]


def _keywords(functions: Iterable[Any]) -> set[str]:
    """Return the keywords that any of these functions has by name."""
    parameters = [parameter for each in functions for parameter in inspect.signature(each).parameters.values()]
    return {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)} - {"self"}


class InProcessCluster:
    """The cluster of a spec on the current event loop."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.scheduler_address = ""
        self.dashboard = ""
        self.security: Security | None = None
        self._cluster: Any = None
        self._ended = asyncio.Event()
        self._settings = ExitStack()

    async def start(self) -> None:
        """Start scheduler and workers; raises SiteStartError."""
        self._cluster = await start_cluster(self.spec)
        self._settings.enter_context(patience_with(self._cluster))
        self.scheduler_address = self._cluster.scheduler_address
        self.dashboard = self._cluster.dashboard_link or ""
        if found := credentials(self._cluster):
            self.security = Security(**found)

    async def call(self, method: str, kwargs: Mapping[str, Any]) -> Any:
        """Call ``scale``, ``adapt`` or ``logs``; raises ConfigurationError."""
        return await call_cluster(self._cluster, method, kwargs)

    async def finished(self) -> None:
        """Return when the cluster was closed."""
        await self._ended.wait()

    async def close(self) -> None:
        """End scheduler and workers."""
        if self._cluster is not None:
            await _settled(self._cluster.close())
        self._settings.close()
        self._ended.set()


# -- in the agent ----------------------------------------------------------------------------------------------------


class HostedCluster:
    """The cluster of a spec in a child process, which ends with its cluster when this process does, however."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.scheduler_address = ""
        self.dashboard = ""
        self.security: Security | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._reader: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of the host."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the host process and in it scheduler and workers; raises SiteStartError."""
        pipe = asyncio.subprocess.PIPE
        forks = self.spec.forks and forking.possible()
        environment = forking.environment(_environment()) if forks else _environment()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOST.format(forks),
            stdin=pipe, stdout=pipe, cwd=self.spec.directory, env=environment, limit=2**24,
            process_group=0,  # Ctrl-C is for the agent, which ends the rest in order
        )  # fmt: skip
        self._write({"pickle": self.spec.pickle, "timeout_s": self.spec.timeout_s})
        try:
            told = await asyncio.wait_for(self._read(), self.spec.timeout_s + CLOSE_TIMEOUT_S)
        except TimeoutError:
            told = {"error": f"the cluster's process did not answer within {self.spec.timeout_s:g} s"}
        if "error" in told:
            await self.close()
            raise _error(told, SiteStartError)
        self.scheduler_address, self.dashboard = told["scheduler_address"], told["dashboard"]
        self.security = Security(**told["security"]) if told["security"] else None
        self._reader = asyncio.create_task(self._read_replies(), name="read from cluster host")

    async def call(self, method: str, kwargs: Mapping[str, Any]) -> Any:
        """Call ``scale``, ``adapt`` or ``logs``; raises ConfigurationError, or SiteStartError if the host is gone."""
        if self._ended.is_set():
            raise SiteStartError("the cluster of this site has ended")
        number = next(self._numbers)
        reply = self._calls[number] = asyncio.get_running_loop().create_future()
        self._write({"id": number, "method": method, "kwargs": dict(kwargs)})
        return await reply

    async def finished(self) -> None:
        """Return when the host process has ended."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the cluster; the host is killed if it does not end by itself."""
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # the host takes it for the end
            try:
                await asyncio.wait_for(process.wait(), 2 * CLOSE_TIMEOUT_S)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                await process.wait()
        if self._reader is not None:
            await self._reader
        self._ended.set()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        return json.loads(line) if line.strip() else {"error": "the cluster's process ended; its messages are above"}

    async def _read_replies(self) -> None:
        while "id" in (told := await self._read()):
            reply = self._calls.pop(told["id"])
            if reply.done():
                continue
            if "error" in told:
                reply.set_exception(_error(told, ConfigurationError))
            else:
                reply.set_result(told["result"])
        self._ended.set()
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(_error(told, SiteStartError))


def _environment() -> dict[str, str]:
    """Return an environment in which the host imports what the agent can import."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path}


def _error(told: Mapping[str, Any], default: type[DaskfedError]) -> DaskfedError:
    kind = getattr(errors, str(told.get("kind", "")), default)
    return kind(str(told["error"]))
