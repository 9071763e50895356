"""Installing daskfed at a site that has only a Python: wheels are fetched here, sent there, and installed into a venv.

The versions are those that are installed here, so that what one side pickles the other can open. At the site all lies
in ``~/.local/share/daskfed/HASH``, where HASH stands for the packages and their versions; what is there is used again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import dask
from packaging.requirements import Requirement

from daskfed.errors import SiteStartError
from daskfed.reach.ssh import Shell, shown

logger = logging.getLogger(__name__)

DEFAULT_WHEELS = "~/.cache/daskfed/wheels"
THERE = "~/.local/share/daskfed"
FETCH_S = 600.0
PLATFORMS = {"Linux x86_64": "x86_64", "Linux aarch64": "aarch64", "Linux ppc64le": "ppc64le"}
MANYLINUX = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")  # newest first; pip takes any of them
TOOLS = ("pip",)
MADE = ("build", "dist", "__pycache__")  # in a folder of sources, by building a wheel of it
INSTALL = """\
set -e
cd {folder}
{python} -m venv --without-pip venv
venv/bin/python "$(echo wheels/pip-*.whl)/pip" install --quiet --no-index --find-links wheels {packages}
rm -rf wheels
ln -sfn {name} ../{digest}
"""  # in a folder of its own, which gets its name when all is there: another site may do the same at once


async def installed(shell: Shell, facts: dict[str, Any], python: str, more: Sequence[str] = ()) -> str:
    """Return the Python at a site that has daskfed as it is here, and ``more`` packages; they are installed if need be.

    Raises SiteStartError where that cannot be done.
    """
    found = {name: distribution_of(name) for name in closure(("daskfed", *more))}
    pins = {name: each.version for name, each in found.items()}
    digest = _digest(pins, facts)
    there = f"{THERE}/{digest}/venv/bin/python"
    status, _, _ = await shell.run(f"test -e {shown(there)}")
    if status != 0:
        await _install(shell, python, digest, await fetched(pins, facts), ["daskfed", *more])
    return there


async def _install(shell: Shell, python: str, digest: str, wheels: list[Path], packages: list[str]) -> None:
    logger.info("sending %d wheels to %s", len(wheels), shell.url)
    name = f"{digest}.{secrets.token_hex(4)}"
    folder = f"{THERE}/{name}"
    quoted = " ".join(map(shlex.quote, packages))
    command = INSTALL.format(folder=shown(folder), python=shown(python), packages=quoted, name=name, digest=digest)
    try:
        await shell.put(wheels, f"{folder}/wheels")
        status, said, errors = await shell.run(command, timeout_s=FETCH_S)
        if status != 0:
            raise SiteStartError(f"{shell.url}: daskfed cannot be installed in {folder}: {_end(errors or said)}")
    except BaseException:
        with suppress(SiteStartError):
            await shell.run(f"rm -rf {shown(folder)}", timeout_s=30)
        raise


def closure(names: Iterable[str]) -> list[str]:
    """Return packages with all that they require, as far as that is installed here, sorted."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            waiting += _required(distribution_of(name))
    return sorted(found)


def distribution_of(name: str) -> Distribution:
    """Return a package that is installed here; raises SiteStartError where it is not."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise SiteStartError(f"option 'install': package {name!r} is not installed here; is it spelt right?") from None


def _required(package: Distribution) -> Iterator[str]:
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


async def fetched(pins: dict[str, str], facts: dict[str, Any]) -> list[Path]:
    """Return the wheels of packages for a site's Python and machine, which are fetched where they are not here yet."""
    wheels = Path(dask.config.get("daskfed.wheels", None) or DEFAULT_WHEELS).expanduser()
    folder = wheels / _digest(pins, facts)
    if not folder.exists():
        wheels.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheels) as coming:
            await _fetch(pins, facts, coming)
            made = Path(coming) / "wheels"
            with suppress(OSError):  # another one was faster
                made.rename(folder)
    return sorted(folder.glob("*.whl"))


async def _fetch(pins: dict[str, str], facts: dict[str, Any], folder: str) -> None:
    local = {name: source for name in pins if (source := _source(name)) is not None}
    released = [f"{name}=={version}" for name, version in pins.items() if name not in local]
    await _pip("download", *_target(facts), "--no-deps", "--dest", f"{folder}/wheels", *released, *TOOLS)
    for source in local.values():
        await _pip("wheel", "--no-deps", "--wheel-dir", f"{folder}/wheels", source)


def _target(facts: dict[str, Any]) -> list[str]:
    """Return pip's options for the Python and the machine of a site."""
    machine = PLATFORMS.get(facts["platform"])
    if machine is None:
        raise SiteStartError(f"daskfed cannot be installed on {facts['platform']}: install it there by hand")
    version = ".".join(facts["python"].split(".")[:2])
    platforms = [option for name in MANYLINUX for option in ("--platform", f"{name}_{machine}")]
    return ["--only-binary", ":all:", "--python-version", version, *platforms]


def _source(name: str) -> str | None:
    """Return the folder that a package was installed from here, or is used in; None for a released one."""
    package = distribution_of(name)
    base = Path(str(package.locate_file("")))
    if (base / "setup.py").exists():
        return str(base)
    text = package.read_text("direct_url.json")
    url = json.loads(text).get("url", "") if text else ""
    return url.removeprefix("file://") if url.startswith("file://") else None


def _digest(pins: dict[str, str], facts: dict[str, Any]) -> str:
    """Return what stands for packages, those of local folders with what is in these, and for a Python and machine."""
    known = hashlib.sha256(json.dumps([pins, facts["python"].split(".")[:2], facts["platform"]]).encode())
    for name in pins:
        if (source := _source(name)) is not None:
            for file in sorted(Path(source).rglob("*.py")):
                if not any(part.startswith(".") or part in MADE for part in file.relative_to(source).parts):
                    known.update(file.read_bytes())
    return known.hexdigest()[:16]


async def _pip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-input",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = await asyncio.wait_for(process.communicate(), FETCH_S)
    except BaseException:
        process.kill()
        raise
    if process.returncode != 0:
        raise SiteStartError(f"what daskfed needs at the site cannot be fetched here: {_end(said.decode())}")


def _end(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-5:])
