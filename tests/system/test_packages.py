"""Functions of modules that sites have, have not, or get: the sites are commands with a path of their own."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
import dask.array as da
import pytest
from distributed.versions import VersionMismatchWarning

from daskfed import Client
from daskfed.errors import ConfigurationError, MissingPackageError
from tests.system import commands

pytestmark = pytest.mark.system

SOON_S = 60.0
ROOT = Path(__file__).parents[2]
SITES = ("north", "south")
NUMBERS = itertools.count()


class Machine:
    """The folders from which sites, and this process, import: each has its own."""

    def __init__(self, folder: Path) -> None:
        self.folders = {name: folder / name for name in (*SITES, "here", "late")}
        for each in self.folders.values():
            each.mkdir()

    def module(self, source: str, *places: str, version: str = "", name: str = "") -> ModuleType:
        """Write a module with this source for sites, and here; import it here."""
        name = name or f"fed_module_{os.getpid()}_{next(NUMBERS)}"
        for place in ("here", *places):
            self.write(place, f"{name}.py", source)
            if version:
                self.distribution(place, name, version)
        return imported(name)

    def write(self, place: str, file: str, text: str) -> None:
        path = self.folders[place] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def distribution(self, place: str, name: str, version: str) -> None:
        self.write(place, f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")

    def environment(self, site: str) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join((str(self.folders[site]), str(ROOT)))}


def imported(name: str) -> ModuleType:
    """Import a module anew."""
    for each in [each for each in sys.modules if each == name or each.startswith(name + ".")]:
        del sys.modules[each]
    importlib.invalidate_caches()
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    sys.path.insert(0, str(machine.folders["here"]))
    yield machine
    sys.path.remove(str(machine.folders["here"]))


@pytest.fixture(scope="module")
def address(machine: Machine) -> Iterator[str]:
    with running(commands.hub()) as hub:
        address = hub.line(r"tcp://[\d.]+:\d+").group()
        with joined(machine, "north", address), joined(machine, "south", address):
            yield address


@contextmanager
def running(command: commands.Command) -> Iterator[commands.Command]:
    try:
        yield command
    finally:
        command.press()
        command.wait()
        command.kill()


@contextmanager
def joined(machine: Machine, site: str, hub: str) -> Iterator[commands.Command]:
    run = commands.site(site, hub, cwd=machine.folders[site], env=machine.environment(site))
    with running(run) as command:
        command.line(f"site {site} joined")
        yield command


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


WHERE = """
import os
VALUE = 1
def where(*args):
    return os.path.basename(os.getcwd())
class Thing:
    def __init__(self):
        self.value = VALUE
"""


def test_a_module_that_only_this_machine_has_is_an_error_at_submit(client: Client, machine: Machine) -> None:
    module = machine.module(WHERE)
    with pytest.raises(MissingPackageError) as caught:
        client.submit(module.where, 1)
    said = str(caught.value)
    assert isinstance(caught.value, ModuleNotFoundError) and caught.value.name == module.__name__
    assert f"the package {module.__name__!r}" in said and str(module.__file__) in said
    assert "missing at 'north', 'south'" in said and f"client.upload_package({module.__name__!r})" in said

    def uses(_: int) -> Any:
        return module.where()

    for attempt in (
        lambda: client.map(module.where, range(3)),
        lambda: client.submit(uses, 1),
        lambda: client.submit(len, [module.Thing()]),
        lambda: dask.delayed(module.where)(1).compute(),
        lambda: da.ones(4, chunks=2).map_blocks(module.where).persist(),
        lambda: client.submit(module.Thing, actor=True),
    ):
        with pytest.raises(MissingPackageError, match=module.__name__):
            attempt()
    assert client.submit(str.upper, module.__name__).result(SOON_S) == module.__name__.upper()  # just a word
    deadline = time.monotonic() + SOON_S
    while client.futures:  # nothing of what was refused is kept
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_work_goes_to_the_sites_that_have_the_module(client: Client, machine: Machine) -> None:
    module = machine.module(WHERE, "south")
    assert client.submit(module.where, 1).result(SOON_S) == "south"
    assert client.gather(client.map(module.where, range(20))) == ["south"] * 20
    assert dask.compute(*[dask.delayed(module.where)(i) for i in range(20)]) == ("south",) * 20
    assert client.submit(module.where, 2, site="south").result(SOON_S) == "south"
    with pytest.raises(MissingPackageError, match=r"missing at 'north' \(site 'south' has it\)"):
        client.submit(module.where, 3, site="north")


def test_a_module_that_is_installed_after_the_error_is_found(client: Client, machine: Machine) -> None:
    module = machine.module(WHERE)
    with pytest.raises(MissingPackageError):
        client.submit(module.where, 1)
    client._packages._asked.clear()  # as if some seconds had passed
    for site in SITES:
        machine.write(site, f"{module.__name__}.py", WHERE)
    assert client.submit(module.where, 1).result(SOON_S) in SITES


def test_sites_are_asked_once_for_each_module(client: Client, machine: Machine) -> None:
    module = machine.module(WHERE, *SITES)
    client.submit(module.where, 1).result(SOON_S)
    asked = dict(client._packages._asked)
    for i in range(5):
        assert client.submit(module.where, i, pure=False).result(SOON_S) in SITES
    assert client._packages._asked == asked and module.__name__ in asked


def test_other_versions_are_warned_of_once(client: Client, machine: Machine) -> None:
    module = machine.module(WHERE, "south", version="2.0")
    for file in machine.folders["south"].glob(f"{module.__name__}-2.0.dist-info/METADATA"):
        file.unlink()
        file.parent.rmdir()
    machine.distribution("south", module.__name__, "1.5")
    machine.write("north", f"{module.__name__}.py", WHERE)
    machine.distribution("north", module.__name__, "2.0")
    with pytest.warns(VersionMismatchWarning, match=f"{module.__name__} is 1.5 at site 'south' and 2.0 here") as seen:
        client.submit(module.where, 1).result(SOON_S)
        client.submit(module.where, 2).result(SOON_S)
    assert len(seen) == 1


def test_a_package_is_sent_with_its_files_and_replaced(client: Client, machine: Machine) -> None:
    name = f"fed_package_{os.getpid()}"

    def write(value: int) -> ModuleType:
        machine.write("here", f"{name}/__init__.py", "from . import inner\n")
        machine.write("here", f"{name}/inner.py", "from pathlib import Path\ndef read(*args):\n"
                      f"    return {value}, (Path(__file__).parent / 'data' / 'd.txt').read_text()\n")  # fmt: skip
        machine.write("here", f"{name}/data/d.txt", f"data {value}")
        return imported(name)

    first = write(1)
    with pytest.raises(MissingPackageError):
        client.submit(first.inner.read)
    replies = client.upload_package(first)
    assert len(replies) == 2 and all(reply["status"] == "OK" for reply in replies.values())
    for site in SITES:
        assert client.submit(first.inner.read, 1, site=site).result(SOON_S) == (1, "data 1")
    second = write(22)
    client.upload_package(name)
    for site in SITES:
        assert client.submit(second.inner.read, 2, site=site).result(SOON_S) == (22, "data 22")
    assert client.run_on_scheduler(lambda n: importlib.import_module(n).inner.read(), name) == {
        site: (22, "data 22") for site in SITES
    }


def test_a_module_is_sent_to_sites_that_join_later(client: Client, machine: Machine, address: str) -> None:
    module = machine.module(WHERE)
    client.upload_package(module.__name__)
    with joined(machine, "late", address):
        assert client.submit(module.where, 1, site="late").result(SOON_S) == "late"
    assert client.submit(module.where, 2).result(SOON_S) in SITES


def test_the_process_that_a_package_comes_from_is_left_alone(machine: Machine) -> None:
    """With the one site of a ``Client()`` the scheduler is in this process; the workers are not."""
    module = machine.module("def value(*args):\n    return 1\n")
    path = list(sys.path)
    with Client(n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        client.upload_package(module)
        assert client.submit(module.value, 1).result(SOON_S) == 1
        machine.write("here", f"{module.__name__}.py", "def value(*args):\n    return 'changed'\n")
        client.upload_package(module)
        assert client.submit(module.value, 2).result(SOON_S) == "changed"
    assert sys.path == path and sys.modules[module.__name__] is module and module.value() == 1


def test_what_cannot_be_sent(client: Client, machine: Machine) -> None:
    for nothing in ("no_such_module", "sys", "__main__"):
        with pytest.raises(ConfigurationError, match=f"no module or package {nothing!r}"):
            client.upload_package(nothing)


def test_an_asynchronous_client(machine: Machine, address: str) -> None:
    module, other = machine.module(WHERE), machine.module(WHERE)

    async def scenario() -> None:
        async with Client(address, asynchronous=True) as client:
            await client.upload_package(module)
            assert await client.submit(module.where, 1) in SITES
            failing = client.submit(other.where, 1)  # it cannot wait for an answer ...
            with pytest.raises(Exception, match=f"Error during deserialization|No module named {other.__name__!r}"):
                await failing
            with pytest.raises(MissingPackageError):  # ... but soon it has one
                for i in itertools.count():
                    client.submit(other.where, i)
                    await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(scenario(), SOON_S))
