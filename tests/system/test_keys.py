"""A hub that lets in by key: who gets in, what that allows, and that work goes to sites of its owner only."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
import zmq
from zmq.utils import z85

from daskfed import Client
from daskfed.comm import multiplex as mux
from daskfed.comm.opaque import call_opaque, connect_opaque
from daskfed.keys import Authorized, KeyFolder, KeyPair, Role, written
from daskfed.messages import PROTOCOL_VERSION, SiteHello, encode
from daskfed.site.agent import own_network
from tests.system import commands
from tests.system.commands import Command

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

BOTH = frozenset({Role.CLIENT, Role.SITE})
SOON_S = 60.0


class Keyed:
    """A hub with keys, and people who have some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub_keys = KeyFolder(folder / "hub")
        self.hub_key = self.hub_keys.new("hub")
        self.hub_keys.authorize(Authorized(KeyPair.new().public, BOTH, "nobody"))
        self.people: dict[str, KeyFolder] = {}
        self.hub = commands.hub("zmq://127.0.0.1:0", "--state", str(folder / "state"), env=self._env(self.hub_keys))
        self.address = self.hub.line(r"daskfed hub at (zmq://\S+)")[1]
        self.sites: list[Command] = []

    @staticmethod
    def _env(keys: KeyFolder) -> dict[str, str]:
        return {"DASK_DASKFED__KEYS": str(keys.path)}

    def person(self, name: str, roles: frozenset[Role] = BOTH, **how: Any) -> KeyFolder:
        """Return the key files of somebody whom the hub lets in."""
        if name not in self.people:
            keys = self.people[name] = KeyFolder(self.folder / name)
            keys.trust(self.address, self.hub_key.public)
            self.hub_keys.authorize(Authorized(keys.new("id").public, roles, name, **how))
        return self.people[name]

    def site(self, name: str, owner: str) -> Command:
        """Start a site."""
        site = commands.site(name, self.address, env=self._env(self.person(owner)))
        self.sites.append(site)
        return site

    @contextlib.contextmanager
    def client(self, name: str, **how: Any) -> Iterator[Client]:
        """Connect somebody."""
        with dask.config.set({"daskfed.keys": str(self.person(name).path)}), Client(self.address, **how) as client:
            yield client

    def call(self, name: str, op: str, **kwargs: Any) -> Any:
        """Ask the hub for something by hand."""

        async def ask() -> Any:
            comm = await connect_opaque(self.address, timeout=10, keys=self.person(name))
            try:
                return await call_opaque(comm, op, **kwargs)
            finally:
                await comm.close()

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    federation = Keyed(tmp_path_factory.mktemp("keyed"))
    try:
        for name, owner in (("ann-north", "ann"), ("ann-south", "ann"), ("bob-east", "bob")):
            federation.site(name, owner).line(rf"daskfed site {name} joined")
        yield federation
    finally:
        for command in (*federation.sites, federation.hub):
            command.press()
        for command in (*federation.sites, federation.hub):
            with contextlib.suppress(Exception):
                command.wait(20)
            command.kill()


def where() -> str:
    """Return the process of this task."""
    return str(psutil.Process().ppid())


def test_work_runs_and_data_crosses(keyed: Keyed) -> None:
    with keyed.client("ann") as client:
        big = client.submit(np.arange, 3 * 10**6, site="ann-north")
        assert client.submit(lambda x: int(x.sum()), big, site="ann-south").result() == sum(range(3 * 10**6))
        assert client.gather(client.map(lambda x: x + 1, range(50))) == list(range(1, 51))
        assert sum(moved["count"] for moved in client.transfers().values() if isinstance(moved, dict)) != 0


def test_the_owner_is_whom_the_key_names(keyed: Keyed) -> None:
    with keyed.client("ann") as ann, keyed.client("bob") as bob:
        anns = ann.submit(len, "abc", key="of-ann", site="ann-north")
        assert anns.result() == 3
        future = bob.submit(len, "abc", key="of-ann", site="bob-east")
        with pytest.raises(Exception, match="ann|another"):
            future.result(timeout=20)


def test_work_goes_to_sites_of_its_owner_only(keyed: Keyed) -> None:
    with keyed.client("bob") as bob:
        futures = bob.map(lambda n: n, range(40), pure=False)
        bob.gather(futures)
        sites = {bob.explain(future)["block"] and bob.explain(future)["sites"][0] for future in futures}
        assert sites == {"bob-east"}


def test_only_who_serves_the_same_owners_is_told_the_door_of_a_site(keyed: Keyed) -> None:
    async def told(owner: str, network: str) -> tuple[dict[str, Any], str]:
        """Join as a site of somebody, by hand, and ask where another site is; return that, and the sites' secret."""
        keys = keyed.person(owner)
        nothing: Any = {"labels": (), "environments": (), "resources": (), "versions": ()}
        nothing |= {"data_address": "", "dashboard": ""}
        hello = SiteHello(site=f"{owner}-by-hand", incarnation="1", protocol=PROTOCOL_VERSION, **nothing)
        comm = await connect_opaque(keyed.address, timeout=10, keys=keys)
        try:
            first = {"op": "register-site", "hello": encode(hello), "token": "", "session": "", "received": 0}
            await comm.write({**first, "reply": False})
            welcome = await comm.read()
            other = await connect_opaque(keyed.address, timeout=10, keys=keys)
            token = welcome["federation"]
            try:
                where = {"site": "ann-north", "network": network}
                return await call_opaque(other, "site-address", token=token, **where), welcome["door"]
            finally:
                await other.close()
        finally:
            await comm.close()

    async def first_of(address: str, token: str) -> dict[str, Any]:
        """Ask an agent for a key, and return the first that it answers."""
        comm = await connect_opaque(address, timeout=10)
        try:
            await comm.write({"op": "get_keys", "site": "ann-north", "keys": ["x"], "token": token, "reply": False})
            return dict(await comm.read())
        finally:
            comm.abort()

    anns, _ = asyncio.run(told("ann", own_network()))
    assert anns["address"] and anns["door"]
    far, _ = asyncio.run(told("ann", "of another machine"))
    assert (far["address"], far["door"]) == ("", "")
    bobs, own_door = asyncio.run(told("bob", own_network()))
    assert (bobs["address"], bobs["door"]) == ("", "")
    assert "stranger" not in asyncio.run(first_of(anns["address"], anns["door"]))
    assert asyncio.run(first_of(anns["address"], own_door))["stranger"]


def test_a_site_that_is_shared_serves_others_too_and_then_no_more(keyed: Keyed) -> None:
    keyed.person("carl")
    with keyed.client("carl") as carl, dask.config.set({"daskfed.client.site-timeout": "1s"}):
        with pytest.raises(Exception, match="no site serves 'carl'"):
            carl.submit(len, "abc", pure=False).result(timeout=30)
        keyed.hub_keys.share("bob", ["carl"])
        deadline = time.monotonic() + SOON_S
        while True:
            with contextlib.suppress(Exception):
                assert carl.submit(len, "abc", pure=False).result(timeout=10) == 3
                break
            assert time.monotonic() < deadline
        keyed.hub_keys.share("bob", ["carl"], shared=False)
        while True:
            try:
                carl.submit(len, "abc", pure=False).result(timeout=10)
            except Exception:
                break
            assert time.monotonic() < deadline


def refusal(address: str, keys: KeyFolder) -> str:
    """Return why a hub cannot be connected to with these keys."""

    async def dial() -> None:
        comm = await connect_opaque(address, timeout=15, keys=keys)
        comm.abort()

    start = time.monotonic()
    with pytest.raises(OSError) as found:
        asyncio.run(dial())
    assert time.monotonic() - start < 10
    return str(found.value)


class TestRefused:
    def test_a_key_that_is_not_let_in(self, keyed: Keyed, tmp_path: Path) -> None:
        keys = KeyFolder(tmp_path)
        mine = keys.new("id")
        keys.trust(keyed.address, keyed.hub_key.public)
        said = refusal(keyed.address, keys)
        assert f"does not let in the key {written(mine.public)}: daskfed keys authorize" in said
        assert written(mine.secret, "sec-") not in keyed.hub.output + said

    def test_a_key_that_has_expired(self, keyed: Keyed) -> None:
        keys = keyed.person("old", expires=datetime.now(UTC) - timedelta(seconds=1))
        assert "does not let in the key" in refusal(keyed.address, keys)

    def test_a_hub_with_another_key(self, keyed: Keyed, tmp_path: Path) -> None:
        keys = KeyFolder(tmp_path)
        keyed.hub_keys.authorize(Authorized(keys.new("id").public, BOTH, "dora"))
        other = KeyPair.new().public
        keys.trust(keyed.address, other)
        assert f"its key is not {written(other)}" in refusal(keyed.address, keys)

    def test_no_key_at_all(self, keyed: Keyed, tmp_path: Path) -> None:
        assert "wants encrypted connections: daskfed keys trust" in refusal(keyed.address, KeyFolder(tmp_path))

    def test_no_key_at_all_where_the_hub_says_so_before_this_end_has_greeted(
        self, keyed: Keyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tell = mux.Multiplexer.tell

        def late(self: mux.Multiplexer, kind: mux.Kind, **what: Any) -> list[mux.Buffer]:
            time.sleep(0.2)
            return tell(self, kind, **what)

        monkeypatch.setattr(mux.Multiplexer, "tell", late)
        assert "wants encrypted connections: daskfed keys trust" in refusal(keyed.address, KeyFolder(tmp_path))

    def test_a_client_that_would_be_a_site(self, keyed: Keyed) -> None:
        keyed.person("user", frozenset({Role.CLIENT}))
        assert keyed.site("of-user", "user").wait() != 0
        assert "let in as client, and 'register-site' is for a site" in keyed.sites.pop().output

    def test_a_site_that_would_submit_work(self, keyed: Keyed) -> None:
        keyed.person("machine", frozenset({Role.SITE}))
        with (
            pytest.raises(Exception, match="let in as site|refused|is for a client"),
            keyed.client("machine", timeout=5),
        ):
            pass

    def test_a_site_in_the_name_of_another(self, keyed: Keyed) -> None:
        assert keyed.site("ann-north", "bob").wait() != 0
        assert "'ann-north'" in keyed.sites.pop().output
        with pytest.raises(Exception, match="does not speak for site 'ann-north'"):
            keyed.call("bob", "announce-keys", site="ann-north", keys=["x"], token="")

    def test_the_data_of_another(self, keyed: Keyed) -> None:
        with keyed.client("ann") as ann:
            future = ann.submit(len, "abc", key="private-to-ann", site="ann-north")
            future.result()
            said = keyed.call("bob", "relay-fetch", site="ann-north", keys=["private-to-ann"], token="")
            with pytest.raises(Exception, match="does not let a site have what is 'ann'"):
                keyed.call("bob", "bring-keys", site="bob-east", keys=["private-to-ann"], token="")
            assert said["error"] == "the key of 'bob' does not let a site have what is 'ann''s"

    def test_a_public_hub_without_a_key(self, tmp_path: Path) -> None:
        command = commands.hub("zmq://0.0.0.0:0", env={"DASK_DASKFED__KEYS": str(tmp_path)})
        assert command.wait() == 2
        assert "daskfed keys new hub" in command.output


def test_who_is_revoked_is_cut_off_at_once_and_the_others_work_on(keyed: Keyed) -> None:
    with keyed.client("ann") as ann:
        with dask.config.set({"daskfed.client.grace": "2s"}), keyed.client("eve") as eve:
            eve.submit(len, "abc")
            running = ann.submit(lambda: time.sleep(2) or "done", site="ann-north", pure=False)
            keyed.hub_keys.revoke("eve")
            start = time.monotonic()
            while eve.status == "running":
                assert time.monotonic() - start < 10
                time.sleep(0.05)
        assert running.result() == "done"


class Recorder:
    """Passes one connection on to a hub, and keeps what was sent there."""

    def __init__(self, port: int) -> None:
        self.sent: list[bytes] = []
        self._hub = ("127.0.0.1", port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"zmq://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._server.accept()[0] as near, socket.create_connection(self._hub) as far:
            back = threading.Thread(target=self._pass, args=(far, near, []), daemon=True)
            back.start()
            self._pass(near, far, self.sent)
            back.join(5)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, kept: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                kept.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_what_was_recorded_is_of_no_use_again(keyed: Keyed) -> None:
    port = int(keyed.address.rpartition(":")[2])
    recorder = Recorder(port)
    keys = keyed.person("ann")
    keys.trust(recorder.address, keyed.hub_key.public)

    async def act() -> None:
        comm = await connect_opaque(recorder.address, timeout=10, keys=keys)
        await call_opaque(comm, "log_event", topic="recorded", msg=1)
        await comm.close()
        await asyncio.sleep(0.3)

    def happened() -> int:
        return len(keyed.call("ann", "events", topic="recorded"))

    asyncio.run(act())
    assert happened() == 1 and sum(map(len, recorder.sent)) > 500
    with socket.create_connection(("127.0.0.1", port), timeout=5) as again:
        again.settimeout(0.3)
        answered = b""
        for piece in [*recorder.sent, b""]:
            with contextlib.suppress(OSError):
                again.sendall(piece)
                answered += again.recv(2**16)
        assert b"ERROR" in answered or len(answered) < 500  # the hub's half of the handshake, and no message
    assert happened() == 1
    with keyed.client("ann") as client:
        assert client.submit(len, "abc", pure=False).result(timeout=60) == 3


class Stranger:
    """Speaks zmq by hand, with a key that is let in."""

    def __init__(self, keyed: Keyed, name: str) -> None:
        keys = keyed.person(name)
        own = keys.own("id")
        assert own is not None
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.curve_serverkey = z85.encode(keyed.hub_key.public)
        self.socket.curve_publickey, self.socket.curve_secretkey = z85.encode(own.public), z85.encode(own.secret)
        self.socket.linger = 0
        self.socket.connect(keyed.address.replace("zmq://", "tcp://"))

    def greet(self) -> mux.Multiplexer:
        """Shake hands as whoever dials does, and return the link."""
        link = mux.Multiplexer(random.randbytes(16), dialled=True)
        self.socket.send_multipart(link.tell(mux.Kind.HELLO, body=mux.GREETING.pack(mux.PROTOCOL, link.session)))
        while self.socket.poll(20):  # it says nothing where the line has not ended meanwhile
            self.socket.recv_multipart()
        link.goes_on(0, 0.0)
        return link

    def close(self) -> None:
        self.socket.close()
        self.context.term()


def recorded(link: mux.Multiplexer) -> list[bytes]:
    """Return packets as a client sends them."""
    channel = link.open()
    channel.send([b"\x80", b"x" * 100], 101)
    channel.send([b"y" * 200_000], 200_000)
    channel.send([b"z"], 1)
    packets = []
    while (parts := link.outgoing(0.0)) is not None:
        packets.append(b"".join(map(bytes, parts)))
    return packets


def mangled(packet: bytes, dice: random.Random) -> bytes:
    """Return a packet that is damaged in one way or another."""
    damaged = bytearray(packet)
    for _ in range(dice.randint(1, 4)):
        kind = dice.randrange(4)
        if kind == 0 and damaged:
            damaged[dice.randrange(min(len(damaged), 60))] = dice.randrange(256)
        elif kind == 1:
            del damaged[dice.randrange(len(damaged) + 1) :]
        elif kind == 2:
            damaged[dice.randrange(len(damaged) + 1) : 0] = dice.randbytes(dice.randint(1, 50))
        elif damaged:
            damaged[: mux.HEADER.size] = dice.randbytes(mux.HEADER.size)
    return bytes(damaged)


def test_nonsense_harms_nobody(keyed: Keyed) -> None:
    """10,000 inputs: half of them garbage on the open port, half damaged packets of somebody who was let in."""
    dice = random.Random(5)
    port = int(keyed.address.rpartition(":")[2])
    hub = psutil.Process(keyed.hub.process.pid)
    with keyed.client("ann") as ann:
        job = ann.map(lambda n: time.sleep(0.05) or n, range(200), pure=False)
        before = hub.memory_info().rss, hub.num_fds()
        for _ in range(50):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                for _ in range(100):
                    raw.sendall(dice.randbytes(dice.randint(1, 200)))
        for _ in range(25):
            stranger = Stranger(keyed, "mallory")
            for _ in range(20):
                packets = recorded(stranger.greet())
                for _ in range(10):
                    stranger.socket.send(mangled(dice.choice(packets), dice))
            stranger.close()
        assert sorted(ann.gather(job)) == list(range(200))
        deadline = time.monotonic() + SOON_S
        while hub.num_fds() > before[1] + 20:
            assert time.monotonic() < deadline, (before, hub.num_fds())
            time.sleep(0.2)
        assert hub.memory_info().rss < before[0] + 300 * 2**20
        with keyed.client("bob") as bob:
            assert bob.submit(len, "abc", pure=False).result(timeout=30) == 3
    assert hub.is_running()
    for person in keyed.people.values():
        own = person.own("id")
        assert own is not None and written(own.secret, "sec-") not in keyed.hub.output
