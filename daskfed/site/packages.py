"""Which packages a site can import, and packages that a client sends: what runs in a site's scheduler and workers.

Workers get :func:`look` and :class:`UploadedPackage` by value, so they need only distributed and the standard library
there. A package that was sent lies unpacked in a folder named after its contents, first on ``sys.path``; another
version of it takes its place.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pickle
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from distributed import SchedulerPlugin, WorkerPlugin
from distributed.protocol import deserialize

from daskfed.dask_private import Serialize, Serialized
from daskfed.data.fetch import by_value

SAMPLE = 3  # workers of a site that are asked; all workers of one usually have the same packages
WORKERS_S = 10.0  # for them to answer; who does not is not asked
FOLDER = "daskfed-packages"  # within the folder of a worker or a scheduler
UPLOADED = "uploaded"  # in the place of a version
PROCESS = uuid.uuid4().hex  # stands for this process

Question: TypeAlias = dict[str, tuple[str, bool]]
"""Top-level package -> the distribution that it belongs to, empty if none; whether it is a namespace."""


def look(question: Mapping[str, tuple[str, bool]]) -> dict[str, str | None]:
    """Return what this process would import: package -> version, empty if it has none; None if there is no package."""
    importlib.invalidate_caches()
    found: dict[str, str | None] = {}
    for name, (distribution, namespace) in question.items():
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # the second: an imported one that hides where it is from
            spec = getattr(sys.modules.get(name), "__spec__", None)
            found[name] = "" if name in sys.modules else None
        if spec is None:
            found.setdefault(name, None)
            continue
        if spec.origin is None and not namespace:  # just a folder of that name
            found[name] = None
            continue
        found[name] = ""
        if f"{os.sep}{FOLDER}{os.sep}" in (spec.origin or ""):
            found[name] = UPLOADED
        elif distribution:
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
    return found


async def look_at_site(question: Question, dask_scheduler: Any) -> list[tuple[str, str | None]]:
    """Return (package, version) of what the scheduler of a site and its workers can import; runs in the scheduler.

    What one of them lacks the site lacks.
    """
    answers = [look(question)]
    workers = list(dask_scheduler.workers)[:SAMPLE]
    message = {"op": "run", "function": by_value(look), "args": pickle.dumps((question,))}
    with suppress(TimeoutError):
        asked = dask_scheduler.broadcast(msg=message, workers=workers, on_error="ignore")
        replies = await asyncio.wait_for(asked, WORKERS_S)
        answers += [_opened(reply["result"]) for reply in replies.values() if reply["status"] == "OK"]
    found = dict(answers[-1])
    for answer in answers:
        found |= {name: version for name, version in answer.items() if version is None}
    return list(found.items())


def _opened(value: Any) -> Any:
    if isinstance(value, Serialize):
        return value.data
    return deserialize(value.header, value.frames) if isinstance(value, Serialized) else value


class UploadedPackage(WorkerPlugin):
    """A package that a client sent, at a worker."""

    def __init__(self, package: str, digest: str, data: bytes) -> None:
        self.package = package
        self.digest = digest  # of its contents
        self.data = data  # a zip file
        self.name = f"daskfed-package-{package}"
        self.process = PROCESS  # where it comes from

    def setup(self, worker: Any) -> None:
        """Make the package importable; called by the worker when it gets the plugin, or starts."""
        install(self, worker.local_directory)


class UploadedToScheduler(SchedulerPlugin):
    """The same at a scheduler, which opens what users pickle."""

    def __init__(self, plugin: UploadedPackage) -> None:
        self.plugin = plugin
        self.name = plugin.name

    async def start(self, scheduler: Any) -> None:
        """Make the package importable; called by the scheduler when it gets the plugin."""
        scheduler.plugins.pop(self.name, None)  # else it warns of the one that this takes the place of
        await asyncio.to_thread(install, self.plugin, scheduler.local_directory)


def install(package: UploadedPackage, directory: str) -> None:
    """Unpack a package below ``directory``, put it first on the path, and forget modules of other versions of it.

    In the process that it comes from, which may have a scheduler or workers in it, this does nothing.
    """
    if package.process == getattr(sys.modules.get("daskfed.site.packages"), "PROCESS", None):
        return  # looked up by name, as this function travels by value
    name = f"{package.package}-{package.digest}"
    folder = os.path.join(os.path.abspath(directory), FOLDER, name)
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        unpacked = tempfile.mkdtemp(dir=os.path.dirname(folder))
        zipfile.ZipFile(io.BytesIO(package.data)).extractall(unpacked)
        with suppress(OSError):  # another thread was faster
            os.rename(unpacked, folder)
    others = [entry for entry in sys.path if not _is_version(entry, package.package)]
    sys.path[:] = [folder, *others]
    importlib.invalidate_caches()
    loaded = sys.modules.get(package.package)
    places = [getattr(loaded, "__file__", None) or "", *getattr(loaded, "__path__", ())]
    if loaded is not None and not any(name in place.split(os.sep) for place in places):
        prefix = package.package + "."
        for module in [each for each in sys.modules if each == package.package or each.startswith(prefix)]:
            del sys.modules[module]


def _is_version(entry: str, package: str) -> bool:
    above, name = os.path.split(entry)
    return os.path.basename(above) == FOLDER and name.rpartition("-")[0] == package
