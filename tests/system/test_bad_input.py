"""What a user gets wrong: an error that says so, from the call that caused it; the federation goes on working."""

from __future__ import annotations

import asyncio
import operator
import os
import pickle
import platform
import random
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import dask
import dask.array as da
import distributed
import pytest
from distributed.security import Security
from distributed.versions import VersionMismatchWarning

from daskfed import Client, Federation, at
from daskfed.comm.opaque import call_opaque, connect_opaque
from daskfed.errors import (
    ConfigurationError,
    ConnectionRefused,
    MissingPackageError,
    SiteStartError,
    UnknownSiteError,
)
from daskfed.messages import PROTOCOL_VERSION, SiteHello, SiteStatus
from daskfed.site.agent import _versions
from daskfed.site.ports import RemoteHub
from tests.conftest import MARK, processes_of
from tests.system.commands import MODULE, NO_DASHBOARD, Command, hub, site

pytestmark = pytest.mark.system

ONE = {"n_workers": 1, "threads_per_worker": 1, **NO_DASHBOARD}
NOBODY = "tcp://127.0.0.1:1"
T = TypeVar("T")


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    sites = {name: {"options": ONE, "labels": {"disk": name}} for name in ("north", "south")}
    with Federation(sites) as federation:
        yield federation


@pytest.fixture
def client(federation: Federation) -> Iterator[Client]:
    """A client of a federation, which must still work after the test."""
    with Client(federation) as client:
        yield client
        assert_works(client)


def assert_works(client: Client) -> None:
    """Both sites run a task and pass its result on."""
    x = client.submit(operator.add, 1, 2, site="north", pure=False)
    assert client.submit(operator.mul, x, 10, site="south", pure=False).result(timeout=60) == 30
    assert set(client.sites()) == {"north", "south"}


# -- places that there are not -----------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Client, Any], Any]] = {
    "submit": lambda client, site: client.submit(abs, -1, site=site),
    "map": lambda client, site: client.map(abs, [-1, 2], site=site),
    "scatter": lambda client, site: client.scatter([1, 2], site=site),
    "open": lambda client, site: client.open(da.from_zarr, "x.zarr", site=site),
    "compute": lambda client, site: client.compute(built_at(site)),
    "persist": lambda client, site: client.persist(built_at(site)),
    "dask.compute": lambda client, site: dask.compute(built_at(site)),
}


def built_at(site: Any) -> Any:
    with at(site):
        return da.ones(4, chunks=2) + 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("site", ["nroth", "disk=west", ["nroth", "disk=west"]], ids=str)
def test_unknown_site(client: Client, call: Callable[[Client, Any], Any], site: Any) -> None:
    with pytest.raises(UnknownSiteError, match="north"):
        call(client, site)


def test_unknown_environment(client: Client) -> None:
    with pytest.raises(UnknownSiteError, match="environment 'gpu'.*default"):
        client.map(abs, [1], environment="gpu")
    with at(environment="gpu"):
        call = dask.delayed(abs)(-1)
    with pytest.raises(UnknownSiteError, match="environment 'gpu'"):
        call.compute()


def test_a_function_that_chooses_no_site_or_an_unknown_one(client: Client) -> None:
    with pytest.raises(UnknownSiteError, match="chose no site"), at(lambda sites: []):
        pass
    with pytest.raises(UnknownSiteError, match="'east'"), at(lambda sites: ["east"]):
        pass


@pytest.mark.parametrize("site", [7, b"north", "", "disk=", [], [""], {"north": 1}], ids=repr)
def test_what_cannot_name_a_site(client: Client, site: Any) -> None:
    with pytest.raises(ConfigurationError):
        client.submit(abs, -1, site=site)


def test_a_path_that_a_site_lacks(client: Client) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zarr"):
        client.open(open, "nowhere.zarr", site="south")


# -- sites that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile, complaint",
    [
        ({"optoins": {}}, "unknown option 'optoins'; did you mean 'options'"),
        ({"n_workers": 2}, "unknown option 'n_workers'.*keywords of the Cluster class go into 'options'"),
        ({"directory": "/no/such/folder"}, "no directory '/no/such/folder'"),
        ({"options": [1]}, "option 'options'"),
        ("north", "expected a dict of options"),
    ],
    ids=str,
)
def test_a_profile_with_a_mistake(profile: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s)'north'.*{complaint}"):
        Federation({"north": profile})


@pytest.mark.parametrize(
    "profile, complaint",
    [
        ({"cluster": "dask.distributed.LocalClutser"}, "LocalClutser cannot be imported"),
        ({"cluster": "no_such_package.Cluster"}, "no_such_package"),
        ({"cluster": "dask.distributed.Client"}, "is no Dask Cluster class"),
        ({"cluster": dict}, "is no Dask Cluster class"),
        ({"options": {"workers_n": 1}}, "workers_n"),
        ({"options": {"n_workers": "many"}}, "many"),
    ],
    ids=str,
)
def test_a_cluster_that_cannot_start(profile: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SiteStartError, match=f"(?s){complaint}"):
        Federation({"north": profile}, in_process=True)


def test_one_bad_site_leaves_nothing_of_the_others() -> None:
    """The same in processes: what did start is ended, and the error names the site."""
    with mine_only() as left:
        with pytest.raises(SiteStartError, match="site 'south'.*LocalClutser cannot be imported"):
            Federation({"north": {"options": ONE}, "south": {"cluster": "dask.distributed.LocalClutser"}})
        deadline = time.monotonic() + 20
        while left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left()


@contextmanager
def mine_only() -> Iterator[Callable[[], Any]]:
    """Give a function that returns the processes that were started inside and still run."""
    before = {process.pid for process, _ in processes_of(os.environ[MARK])}
    yield lambda: [told for process, told in processes_of(os.environ[MARK]) if process.pid not in before]


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigurationError, match="no placement policy 'cheapest'"):
        Federation(policy="cheapest")


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://10.1.2.3:0", "tls://0.0.0.0:0"])
def test_listening_for_others_without_certificates(address: str) -> None:
    with pytest.raises(ConfigurationError, match="neither encrypted nor authenticated"):
        Federation(listen=address)


# -- hubs that are not there, or are no hubs ---------------------------------------------------------------------------


def test_a_hub_where_nobody_listens() -> None:
    with pytest.raises(OSError, match="127.0.0.1:1"):
        Client(NOBODY, timeout=1, set_as_default=False)


def test_a_stock_scheduler_is_no_hub() -> None:
    with distributed.LocalCluster(n_workers=0, **NO_DASHBOARD, processes=True) as cluster:
        address = cluster.scheduler_address
        with pytest.raises(ConnectionRefused, match="is a Scheduler, no daskfed hub"):
            Client(address, set_as_default=False)
        commands = site("north", address), Command(*MODULE, "status", "--hub", address)
        try:
            for command in commands:
                assert command.wait() == 1
                assert "is a Scheduler, no daskfed hub" in command.output and "Traceback" not in command.output
        finally:
            for command in commands:
                command.kill()
        with distributed.Client(cluster, set_as_default=False) as stock:
            assert stock.scheduler_info()["type"] == "Scheduler"


# -- sites that a hub refuses, or should not give work to --------------------------------------------------------------


def dialled(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def hello(name: str, **changes: Any) -> SiteHello:
    """What a site says first; a site that nothing stands behind."""
    said = SiteHello(
        site=name, incarnation="made-up", protocol=PROTOCOL_VERSION, labels=(), environments=("default",),
        resources=(), data_address="", dashboard="", versions=_versions(),
    )  # fmt: skip
    return replace(said, **changes)


class NoSite:
    """The agent of a site that nothing stands behind."""

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        return {"workers": {}} if kwargs.get("scheduler_op") == "identity" else {}

    def stream_keys(self, keys: list[Any]) -> Any:
        raise NotImplementedError


@contextmanager
def joined(address: str, said: SiteHello) -> Iterator[list[Any]]:
    """A site that says it has a worker; gives what the hub sends it."""
    loop, told = asyncio.new_event_loop(), list[Any]()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    port = RemoteHub(lambda: address)

    async def join() -> None:
        await port.register(said, NoSite(), lambda message, payload: told.append(message))
        port.send(SiteStatus(workers=1, threads=1, memory_limit=1, memory_used=0, running=0, queued=0))

    try:
        run(join())
        yield told
    finally:
        run(port.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def refusal(address: str, said: SiteHello) -> str:
    async def register() -> str:
        port = RemoteHub(lambda: address)
        try:
            with pytest.raises(ConnectionRefused) as caught:
                await port.register(said, NoSite(), lambda message, payload: None)
            return str(caught.value)
        finally:
            await port.close()

    return dialled(register())


def test_a_second_site_of_one_name(client: Client, federation: Federation) -> None:
    """It is refused with the reason, as a command before its cluster starts; the first one keeps its keys."""
    address = federation.scheduler_address
    kept = client.submit(list, range(3), site="north")
    assert "a site named 'north' is connected already" in refusal(address, hello("north"))
    command = site("north", address)
    try:
        assert command.wait() == 1
        assert "a site named 'north' is connected" in command.output and "Traceback" not in command.output
    finally:
        command.kill()
    assert kept.result() == [0, 1, 2] and client.explain(kept)["sites"] == ["north"]


def test_a_site_that_speaks_another_protocol(client: Client, federation: Federation) -> None:
    said = refusal(federation.scheduler_address, hello("old", protocol=PROTOCOL_VERSION + 1))
    assert f"protocol {PROTOCOL_VERSION}, this site {PROTOCOL_VERSION + 1}: install the same daskfed" in said
    assert "old" not in client.sites()


def test_a_hello_that_is_none(client: Client, federation: Federation) -> None:
    async def register(**request: Any) -> Any:
        comm = await connect_opaque(federation.scheduler_address)
        try:
            return await call_opaque(comm, "register-site", **request)
        finally:
            comm.abort()

    for said in ({}, {"op": "site-hello"}, {"op": "run-block"}, {"op": "site-hello", "site": 7}):
        assert dialled(register(hello=said, token=""))["status"] == "error"


def other_versions(**changes: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({**dict(_versions()), **changes}.items()))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_other_packages_at_a_site_are_warned_of_when_a_client_connects(federation: Federation) -> None:
    said = hello("differs", versions=other_versions(dask="2020.1.0", distributed="2020.1.0"))
    with joined(federation.scheduler_address, said):
        wait_for(lambda: "differs" in federation.hub.core.sites)  # type: ignore[union-attr]
        with (
            pytest.warns(VersionMismatchWarning, match=r"(?s)dask is 2020.1.0 at site 'differs'.*distributed is 2020"),
            Client(federation, set_as_default=False) as client,
        ):
            assert client.submit(abs, -1, site="north").result() == 1
    wait_for(lambda: "differs" not in federation.hub.core.sites)  # type: ignore[union-attr]
    with warnings.catch_warnings(), Client(federation, set_as_default=False):
        warnings.simplefilter("error", VersionMismatchWarning)


def test_no_work_goes_to_a_site_with_another_python(client: Client, federation: Federation) -> None:
    """A warning when it joins, an error for work that names it, and nothing else goes there."""
    major, minor, _ = platform.python_version_tuple()
    said = hello("old", labels=(("age", "old"),), versions=other_versions(python=f"{major}.{int(minor) - 1}.0"))
    with pytest.warns(VersionMismatchWarning, match="python is .* at site 'old'"):
        context = joined(federation.scheduler_address, said)
        told = context.__enter__()
        wait_for(lambda: client.sites().get("old", {}).get("status") == "running")
    try:
        for selector in ("old", "age=old"):
            with pytest.raises(
                ConfigurationError, match=f"by Python {major}.{minor}, cannot be opened there: site 'old'"
            ):
                client.submit(abs, -1, site=selector)
            with pytest.raises(ConfigurationError, match="cannot be opened there"):
                built_at(selector).compute()
        assert client.submit(abs, -3, site=["old", "south"]).result() == 3
        assert client.gather(client.map(operator.neg, range(60))) == [-i for i in range(60)]
        assert float(da.ones((40, 40), chunks=8).sum().compute()) == 1600
        assert not told
    finally:
        context.__exit__(None, None, None)
    wait_for(lambda: "old" not in client.sites())


# -- tasks that cannot be ----------------------------------------------------------------------------------------------


def test_a_task_that_cannot_be_pickled(client: Client) -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError, match="Could not serialize"):
        client.submit(operator.is_, lock, None)
    with pytest.raises((TypeError, RuntimeError), match="cannot be deterministically hashed|Could not serialize"):
        client.map(operator.is_, [lock, 1], [None, None])
    with pytest.raises(TypeError, match="Could not serialize"):
        dask.delayed(operator.is_)(lock, None).compute()
    with pytest.raises(TypeError, match="Could not serialize"):
        da.ones(4, chunks=2).map_blocks(lambda block, _: block, lock).compute()


def unpicklable_result() -> Any:
    return threading.Lock()


def test_a_result_that_cannot_be_pickled(client: Client) -> None:
    """As in stock Dask it is used where it is, and gathering it is an error."""
    future = client.submit(unpicklable_result, site="south", pure=False)
    assert "lock" in client.submit(str, future, site="south").result()
    with pytest.raises(TypeError, match="pickle"):
        future.result(timeout=60)


def test_a_result_that_cannot_be_pickled_is_no_input_elsewhere(client: Client) -> None:
    future = client.submit(unpicklable_result, site="south", pure=False)
    with pytest.raises(Exception, match="pickle"):
        client.submit(type, future, site="north", pure=False).result(timeout=60)


def test_a_module_that_the_sites_lack(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_the_client.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import module_of_the_client  # type: ignore[import-not-found]

    collections = (
        dask.delayed(module_of_the_client.double)(1),
        da.ones(4, chunks=2).map_blocks(module_of_the_client.double),
    )
    for collection in collections:
        with pytest.raises(MissingPackageError, match="module_of_the_client"):
            collection.compute()
    with pytest.raises(RuntimeError, match="deserialization") as caught:  # which the client could not see
        dask.delayed(len)(Hidden(module_of_the_client.double)).compute()
    assert "module_of_the_client" in repr(caught.value.__cause__)


class Hidden:
    """An object that pickles what it has by itself."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __reduce__(self) -> Any:
        return pickle.loads, (pickle.dumps(self.thing),)


# -- clashing keys -----------------------------------------------------------------------------------------------------


def clash_in(client: Client, federation: Any) -> list[Any]:
    """Give one key to different tasks, in one client, in two, in two graphs; return the results."""
    first = client.submit(operator.add, 1, 2, key="clash")
    same = client.submit(operator.add, 10, 20, key="clash")
    results = [first.result(), same.result()]
    with type(client)(federation, set_as_default=False) as other:
        theirs = other.submit(operator.add, 100, 200, key="clash")
        results += [theirs.result(timeout=60)]
        results += [other.get({"clash": (operator.add, 5, 5), "more": (operator.mul, "clash", 2)}, "clash")]
        del theirs
    results += [first.result()]
    del first, same
    return results


def test_the_first_task_of_a_key_wins_as_in_stock_dask(client: Client, federation: Federation) -> None:
    with (
        distributed.LocalCluster(n_workers=1, processes=False, **NO_DASHBOARD) as cluster,
        distributed.Client(cluster, set_as_default=False) as stock,
    ):
        expected = clash_in(stock, cluster)
    assert clash_in(client, federation) == expected == [3] * 5
    wait_for(lambda: client.explain("clash")["phase"] == "unknown")
    assert client.submit(operator.add, 7, 7, key="clash").result() == 14


# -- strangers at the hub's door ---------------------------------------------------------------------------------------


def test_rubbish_at_the_hubs_port(client: Client, federation: Federation) -> None:
    """Random bytes, huge lengths, half a handshake and a connection that says nothing."""
    host, port = federation.scheduler_address.removeprefix("tcp://").split(":")
    noise = random.Random(0)
    said = [noise.randbytes(n) for n in (1, 7, 8, 9, 100, 5000, 200_000)]
    said += [b"\xff" * 8, (2**62).to_bytes(8, "little") * 3, b"GET / HTTP/1.1\r\n\r\n", b""]
    silent = []
    for each in said:
        connection = socket.create_connection((host, int(port)))
        connection.sendall(each)
        silent.append(connection)
    assert_works(client)
    for connection in silent:
        connection.close()


def test_rubbish_after_the_handshake(client: Client, federation: Federation) -> None:
    async def say(request: Any) -> None:
        comm = await connect_opaque(federation.scheduler_address)
        try:
            await comm.write(request)
            await asyncio.wait_for(comm.read(), 1)
        except (OSError, TimeoutError):
            pass
        finally:
            comm.abort()

    for request in (
        {"op": "no-such-op"}, {}, [], 7, "hello", None, {"op": None}, {"op": "gather"}, {"op": "gather", "keys": 3},
        {"op": "register-site", "hello": 3}, {"op": "park-channel", "site": "north", "incarnation": "x", "token": "y"},
        {"op": "relay-fetch", "site": "north", "keys": ["x"], "token": "y"}, {"op": "forward"},
    ):  # fmt: skip
        dialled(say(request))
    assert_works(client)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate that signs itself, and its key, as options of the commands."""
    return new_certificate(tmp_path_factory.mktemp("certificate"))


def new_certificate(folder: Path) -> dict[str, str]:
    key, cert = folder / "key.pem", folder / "cert.pem"
    made = (
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=daskfed",
        "-keyout",
        key,
        "-out",
        cert,
    )
    subprocess.run(["openssl", *made], check=True, capture_output=True)
    return {"--tls-ca-file": str(cert), "--tls-cert": str(cert), "--tls-key": str(key)}


def security_of(certificate: dict[str, str]) -> Security:
    ca, cert, key = certificate.values()
    roles = {f"tls_{role}_{part}": file for role in ("client", "scheduler", "worker") for part, file in
             (("cert", cert), ("key", key))}  # fmt: skip
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


@pytest.mark.needs("openssl")
def test_a_federation_with_certificates(certificate: dict[str, str], tmp_path: Path) -> None:
    """Its sites and clients use them too; who has none, or another one, is kept out."""
    with Federation({"north": {"options": ONE}}, security=security_of(certificate)) as federation:
        address = federation.scheduler_address
        assert address.startswith("tls://")
        with Client(federation, set_as_default=False) as client:
            assert client.submit(operator.add, 1, 2).result() == 3
            strangers = (address.replace("tls://", "tcp://"), None), (address, security_of(new_certificate(tmp_path)))
            for where, security in strangers:
                with pytest.raises(OSError):
                    Client(where, security=security, timeout=2, set_as_default=False)
            assert client.submit(operator.add, 2, 2).result() == 4


@pytest.mark.needs("openssl")
def test_commands_with_certificates(certificate: dict[str, str]) -> None:
    options = [word for pair in certificate.items() for word in pair]
    commands = [hub("tls://127.0.0.1:0", *options)]
    try:
        address = commands[0].line(r"daskfed hub at (tls://\S+)")[1]
        commands.append(site("north", address, *options))
        commands[1].line("site north joined")
        commands.append(Command(*MODULE, "status", "--hub", address, *options))
        commands[2].line("north +running")
        with Client(address, security=security_of(certificate), set_as_default=False) as client:
            assert client.submit(operator.add, 1, 2).result(timeout=60) == 3
    finally:
        for command in commands:
            command.kill()
