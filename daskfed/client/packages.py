"""Whether sites have the packages that pickled functions need, before anything is sent.

A function of a module is pickled by its name. Which modules a payload names is seen in its bytes; those that are
neither of the standard library nor of Dask are asked of the sites, once for each module and client. Work goes to the
sites that have them. Where none has, that is an error here and now, and not one of a site that cannot open a pickle.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import pickletools
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from dask.utils import format_bytes
from distributed.versions import VersionMismatchWarning

from daskfed.client.submission import Submission, frames_of
from daskfed.client.versions import allowed_sites, foreign
from daskfed.errors import ConfigurationError, MissingPackageError
from daskfed.messages import BlockSpec
from daskfed.site.packages import UPLOADED, Question, UploadedPackage

STALE_S = 2.0  # an answer that would be an error is asked for again if it is older
LARGEST_BYTES = 64 * 2**20  # of a package that is sent
LEFT_OUT = ("__pycache__", ".git", ".hg", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints")

Sites = Mapping[str, Mapping[str, Any]]
"""Site name -> what ``client.sites()`` shows."""

EVERYWHERE = sys.stdlib_module_names | {
    "__main__", "__mp_main__", "click", "cloudpickle", "dask", "daskfed", "distributed", "fsspec", "jinja2", "locket",
    "msgpack", "packaging", "partd", "psutil", "pydantic", "sortedcontainers", "tblib", "tlz", "toolz", "tornado",
    "urllib3", "yaml", "zict", "zmq",
}  # fmt: skip
"""Top-level modules of the standard library, and of what daskfed itself needs."""


class Unasked(Exception):
    """Sites have to be asked for packages first."""

    def __init__(self, packages: set[str]) -> None:
        super().__init__(*packages)
        self.packages = packages


class Packages:
    """What is known of the packages of the sites."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[str, str | None]] = {}  # site -> package -> version; None: it is not there
        self._away: set[str] = set()  # sites
        self._asked: dict[str, float] = {}  # package -> when, in seconds of the monotonic clock
        self._good: set[str] = set()  # packages that all sites have
        self._skipped: set[bytes] = set()  # what is found in pickles and is of no interest
        self._modules = 0  # how many were imported when that was found out
        self._warned: set[str] = set()

    def sites_changed(self, sites: Sites) -> None:
        """Other sites are there now; what they tell of themselves when they join need not be asked.

        One that is joining is left out: it may still be getting packages that were sent. One that is back is asked for
        what it was taken to have while it was away.
        """
        self._good.clear()
        away = {name for name, facts in sites.items() if facts["status"] == "away"}
        for name in self._away - away:
            self.sites[name] = {each: told for each, told in self.sites.get(name, {}).items() if told != ""}
        self._away = away
        here = {name: facts for name, facts in sites.items() if facts["status"] != "joining"}
        self.sites = {name: {**dict(facts["versions"]), **self.sites.get(name, {})} for name, facts in here.items()}

    def forget(self, package: str) -> None:
        """A package may have come to sites."""
        self._good.clear()
        for known in self.sites.values():
            known.pop(package, None)

    def forget_missing(self) -> None:
        """Any package may have come to sites."""
        for site, known in self.sites.items():
            self.sites[site] = {name: version for name, version in known.items() if version is not None}

    def question(self, packages: Iterable[str]) -> Question:
        """Return what to ask sites for."""
        return {name: (distribution_of(name), is_namespace(name)) for name in packages}

    def learn(
        self, packages: Collection[str], answers: Mapping[str, Mapping[str, str | None]], ready: Collection[str]
    ) -> None:
        """Take in what sites answered. Who did not is taken to have them, without a version.

        ``ready`` are the sites that were known when they were asked: what one answers that was joining then is no
        longer true, as it may have got packages since.
        """
        for site in self.sites.keys() & set(ready):
            told = answers.get(site, {})
            self.sites[site] |= {name: told.get(name, "") for name in packages}
        now = time.monotonic()
        self._asked |= dict.fromkeys(packages, now)

    def place(self, submission: Submission, sites: Sites, may_ask: bool, asked: int = 0) -> set[str]:
        """Bind blocks to the sites that have what they need, where some have not; return what is not known.

        ``asked`` is how often sites were asked for its sake. Raises MissingPackageError where no site has what a block
        needs, and Unasked, if sites may be asked, where it is not known.
        """
        needs = [self.mentioned(frames_of(payload)) for payload in submission.payloads]
        wanted = set().union(*needs)
        if not wanted:
            return wanted
        unknown = {name for name in wanted for known in self.sites.values() if name not in known}
        if may_ask and (unknown or not (sites or asked)):
            raise Unasked(unknown or wanted)
        for number, names in enumerate(needs):
            block, frames = submission.blocks[number], frames_of(submission.payloads[number])
            submission.blocks[number] = self._placed(block, names - unknown, frames, sites, may_ask)
        self._good |= {name for name in wanted if all(known.get(name) is not None for known in self.sites.values())}
        return unknown

    def mentioned(self, frames: Iterable[Any]) -> set[str]:
        """Return the packages that a pickle may refer to, apart from those that all sites have."""
        if self._modules != len(sys.modules):
            self._modules = len(sys.modules)
            self._skipped.clear()
        found = mentioned(next(iter(frames), b""), self._skipped)
        return found - self._good if found else found

    def _placed(self, block: BlockSpec, names: set[str], frames: Any, sites: Sites, may_ask: bool) -> BlockSpec:
        constraint = block.constraint
        if not names or constraint.environment is not None:  # an environment brings packages of its own
            return block
        allowed = [
            name for name in allowed_sites(constraint.sites, sites) if name in self.sites and not foreign(sites[name])
        ]
        having = [site for site in allowed if all(self.sites[site].get(name) is not None for name in names)]
        if len(having) < len(allowed):
            really = names & {name.partition(".")[0] for name in referred(next(iter(frames)))}
            having = [site for site in allowed if all(self.sites[site].get(name) is not None for name in really)]
            names = really
        if allowed and not having:
            self._refuse(names, allowed, may_ask)
        self._compare(names, having)
        if len(having) == len(allowed) or constraint.workers:
            return block
        return replace(block, constraint=replace(constraint, sites=tuple(having)))

    def _refuse(self, names: set[str], allowed: list[str], may_ask: bool) -> None:
        lacking = {name: [site for site in allowed if self.sites[site].get(name) is None] for name in sorted(names)}
        name, at = max(lacking.items(), key=lambda item: len(item[1]))
        if may_ask and time.monotonic() - self._asked.get(name, 0.0) > STALE_S:
            raise Unasked({name})
        having = {site: known[name] for site, known in self.sites.items() if known.get(name) is not None}
        told = "; ".join(f"site {site!r} has {_in_words(version)}" for site, version in having.items())
        also = [other for other, sites in lacking.items() if other != name and sites]
        raise MissingPackageError(
            f"no site that this may run at has the package {name!r}, which is {here(name)} here. It is missing at "
            f"{', '.join(map(repr, at))}{f' ({told})' if told else ''}"
            f"{f', and {also} at some of them' if also else ''}. Install it there, or send it: "
            f"client.upload_package({name!r})",
            name=name,
        )

    def _compare(self, names: Iterable[str], sites: Iterable[str]) -> None:
        """Warn, once for each package, where its version at sites is another one than here."""
        for name in set(names) - self._warned:
            mine = version_of(name)
            theirs = {
                site: version for site in sites if (version := self.sites[site][name]) not in ("", UPLOADED, mine)
            }
            if mine and theirs:
                self._warned.add(name)
                listed = ", ".join(f"{version} at site {site!r}" for site, version in theirs.items())
                warnings.warn(
                    VersionMismatchWarning(
                        f"{name} is {listed} and {mine} here; what is pickled here may not run there"
                    ),
                    stacklevel=2,
                )


def _in_words(version: str | None) -> str:
    return f"version {version}" if version not in ("", UPLOADED) else "it"


# -- what a pickle refers to -------------------------------------------------------------------------------------------

_MODULE = re.compile(rb"\x8c.[A-Za-z_][\w.]*\x94", re.DOTALL)
"""A short string in a pickle: its opcode, its length in one byte, a dotted name, and the opcode that comes after it."""
MANY = 10_000  # names that are remembered


def mentioned(frame: Any, skipped: set[bytes]) -> set[str]:
    """Return the top-level modules that a pickle may refer to: short strings in it that name imported ones.

    Fast, and possibly too many. What need not be looked at again, until more modules are imported, is added to
    ``skipped``.
    """
    found = set()
    for match in set(_MODULE.findall(frame)).difference(skipped):
        name = match[2:-1]
        package = name.partition(b".")[0].decode()
        if match[1] == len(name) and package in sys.modules and package not in EVERYWHERE:
            found.add(package)
        elif len(skipped) < MANY:
            skipped.add(match)
    return found


_STRINGS = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"))
_IMPORTS = ("cloudpickle.cloudpickle", "subimport")  # how cloudpickle pickles a module
_MODULE_NEXT = object()


def referred(frame: Any) -> set[str]:
    """Return the modules that a pickle refers to, for functions and classes of theirs, or as modules.

    Found in its opcodes; slow, a microsecond for each.
    """
    found: set[str] = set()
    memo: list[Any] = []
    pushed: list[Any] = [None, None]  # the last two strings, or None for what else was taken from the memo
    top: Any = None  # what the last opcode has put onto the stack, if that matters
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(bytes(frame))
    for opcode, arg, _ in operations:
        if opcode.name == "MEMOIZE":
            memo.append(top)
            continue
        if opcode.name in _STRINGS:
            value: Any = arg
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            value = memo[arg] if arg < len(memo) else None
        elif opcode.name == "STACK_GLOBAL":
            module, name = pushed[-2:]
            found |= {module} if isinstance(module, str) else set()
            value = _MODULE_NEXT if (module, name) == _IMPORTS else None
        else:
            top = None
            continue
        if isinstance(value, str) and pushed[-1] is _MODULE_NEXT:
            found.add(value)
        top = value
        pushed = [pushed[-1], value]
    return found


# -- packages of this process ------------------------------------------------------------------------------------------


@functools.cache
def distribution_of(package: str) -> str:
    """Return the installed distribution that a package belongs to, empty if there is none."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    else:
        return package
    origin = getattr(sys.modules.get(package), "__file__", None) or ""
    if "-packages" not in origin:  # site-packages, dist-packages
        return ""
    return next(iter(metadata.packages_distributions().get(package, ())), "")


def version_of(package: str) -> str:
    """Return the version of the distribution of a package, empty if it has none."""
    distribution = distribution_of(package)
    return metadata.version(distribution) if distribution else ""


def is_namespace(package: str) -> bool:
    """Whether a package is a folder without an ``__init__``, perhaps several."""
    module = sys.modules.get(package)
    return module is not None and getattr(module, "__file__", None) is None and hasattr(module, "__path__")


def here(package: str) -> str:
    """Return in words what a package is here."""
    module = sys.modules.get(package)
    version = version_of(package) or getattr(module, "__version__", "")
    if version:
        return f"version {version}"
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return next((str(place) for place in places if place), "not a file")


# -- packages that are sent --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    package: str
    files: list[tuple[Path, str]]  # file, and its name in the zip file


def packed(module: ModuleType | str) -> UploadedPackage:
    """Return a package, or a module that is a file, with all its files, ready to be sent.

    ``module`` is it, something in it, or its name. Raises ConfigurationError where there is none of that name, where it
    is not made of files, or is too large.
    """
    name = (module if isinstance(module, str) else module.__name__).partition(".")[0]
    sources = _sources(name)
    total = sum(file.stat().st_size for file, _ in sources.files)
    data = io.BytesIO()
    if total <= 10 * LARGEST_BYTES:
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, inside in sources.files:
                archive.writestr(zipfile.ZipInfo(inside), file.read_bytes(), zipfile.ZIP_DEFLATED)
    size = len(data.getvalue()) or total
    if size > LARGEST_BYTES:
        largest, _ = max(sources.files, key=lambda each: each[0].stat().st_size)
        raise ConfigurationError(
            f"package {name!r} has {format_bytes(size)}, more than the {format_bytes(LARGEST_BYTES)} that can be sent; "
            f"its largest file is {largest}: install it at the sites, or keep data elsewhere"
        )
    return UploadedPackage(name, hashlib.sha256(data.getvalue()).hexdigest()[:16], data.getvalue())


def _sources(name: str) -> _Sources:
    spec = None
    if name not in sys.builtin_module_names and name != "__main__":
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
    if spec is None:
        raise ConfigurationError(
            f"there is no module or package {name!r} in a file that could be sent; give one that can be imported here"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if folders:
        files = [(file, f"{name}/{inside}") for folder in folders for file, inside in _files_in(folder)]
    else:
        files = [(Path(spec.origin or ""), f"{name}.py")] if (spec.origin or "").endswith(".py") else []
    if not files or not all(file.is_file() for file, _ in files):
        raise ConfigurationError(f"{name!r} is not made of Python files ({spec.origin}): install it at the sites")
    return _Sources(name, files)


def _files_in(folder: Path) -> Iterator[tuple[Path, str]]:
    for above, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(each for each in folders if each not in LEFT_OUT)
        for file in sorted(files):
            if not file.endswith((".pyc", ".pyo")):
                path = Path(above) / file
                yield path, path.relative_to(folder).as_posix()
