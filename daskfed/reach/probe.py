"""What a site has: this file is run there by its Python, which may be old and have nothing of ours.

:func:`facts` is given ``{"cluster": dotted name, "options": {...}, "hub": [host, port] or None, "trial": whether to try
to submit}``. Each entry of its answer is a fact; those under ``problems`` say what is wrong and what to do about it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any

PACKAGES = ("daskfed", "dask", "distributed", "cloudpickle", "pyzmq", "dask-jobqueue")
SUBMIT = {  # batch system by the words of dask-jobqueue's class -> its submit command, and how that is tried dry
    "SLURM": ("sbatch", ("--test-only",)),
    "PBS": ("qsub", None),
    "SGE": ("qsub", ("-verify",)),
    "LSF": ("bsub", None),
    "HTCondor": ("condor_submit", ("-dry-run", "/dev/null")),
    "OAR": ("oarsub", None),
    "Moab": ("msub", None),
}
DRY_S = 30


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter; None for one that is missing."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def reaches(hub: Any) -> bool:
    """Say whether the hub can be dialled from here."""
    try:
        with socket.create_connection(tuple(hub), timeout=5):
            return True
    except OSError:
        return False


def machine() -> str:
    """Return what this machine has been called since it was started last; empty where it does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def cluster_class(name: str) -> Any:
    """Return the Cluster class; raises ImportError or AttributeError."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def trial(name: str, options: dict[str, Any]) -> list[str]:
    """Return what is wrong with submitting jobs of a Cluster class; nothing where it is no batch system's."""
    cls = cluster_class(name)
    if not hasattr(cls, "job_cls"):
        return []
    kind = next((word for word in SUBMIT if word.lower() in name.lower()), None)
    if kind is None:
        return []
    command, dry = SUBMIT[kind]
    script = job_script(cls, options)
    path = shutil.which(command)
    if path is None:
        return [f"{command} is not on the PATH of this machine ({os.environ.get('PATH', '')}): load its module in your "
                "shell's start-up file"]  # fmt: skip
    return [] if dry is None else dry_run([path, *dry], script)


def job_script(cls: Any, options: dict[str, Any]) -> str:
    """Return the script of a worker's job; raises what the class raises at its options."""
    import asyncio

    async def written() -> str:
        return str(cls(**{**options, "asynchronous": True}).job_script())

    return asyncio.run(written())


def dry_run(command: list[str], script: str) -> list[str]:
    """Return what the submit command says against a script."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            done = subprocess.run([*command, file.name], capture_output=True, text=True, timeout=DRY_S)
        except subprocess.TimeoutExpired:
            return [f"{command[0]} did not answer within {DRY_S} s: is the batch system up?"]
    return [f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"] if done.returncode else []


def cluster_problems(given: dict[str, Any]) -> list[str]:
    """Return what is wrong with the Cluster class of a site and its options."""
    name, options = given.get("cluster") or "", given.get("options") or {}
    if not name or "://" in name:
        return []
    try:
        return trial(name, options)
    except (ImportError, AttributeError) as exc:
        return [f"the Cluster class {name} cannot be imported: {exc}; is it spelt right, and is its package installed?"]
    except Exception as exc:
        return [f"{name} rejected its options: {type(exc).__name__}: {exc}"]


def public_key() -> str:
    """Return the public half of this user's key, which is made where there is none."""
    from daskfed.keys import KeyFolder, written

    return written(KeyFolder().ensured("id").public)


def facts(given: dict[str, Any]) -> dict[str, Any]:
    """Return what there is."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.machine()}",
        "host": socket.gethostname(),
        "machine": machine(),
        "versions": versions(),
        "problems": [],
    }
    if given.get("hub"):
        found["reaches_hub"] = reaches(given["hub"])
    if found["versions"]["daskfed"] is not None:
        try:
            found["key"] = public_key()
        except Exception as exc:
            found["problems"].append(f"the key of this user: {exc}")
        if given.get("trial"):
            found["problems"] += cluster_problems(given)
    return found


def show(given: dict[str, Any]) -> None:
    """Print the facts as one line, after whatever a login shell has printed."""
    print("\n" + json.dumps(facts(given)), flush=True)
