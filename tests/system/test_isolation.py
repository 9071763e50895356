"""Nobody acts as another client, and nobody reads, changes or ends what another owner has at the hub."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum
from typing import Any

import pytest
from distributed import Client as StockClient
from distributed import Event, Future, Lock, Queue, Variable, WorkerPlugin, get_client, wait

from daskfed import Client
from tests.system import commands
from tests.system.hostile import Raw

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A hub and two sites in processes of their own."""
    with commands.hub_and_sites({"north": None, "south": None}) as where:
        yield where


@pytest.fixture(scope="module")
def alice(address: str) -> Iterator[Client]:
    """A client of another owner than the user who runs the tests."""
    before = os.environ.get("LOGNAME")
    os.environ["LOGNAME"] = "alice"
    try:
        with Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            yield client
    finally:
        os.environ.pop("LOGNAME")
        if before is not None:
            os.environ["LOGNAME"] = before


@pytest.fixture(scope="module")
def secret(alice: Client) -> Any:
    """The future of a key that nobody else may have."""
    future = alice.submit(str.upper, "secret", key="the-secret", site="north")
    wait(future)
    return future


def hostile(address: str, attack: Callable[[Raw], Awaitable[None]], client: str | None = None) -> None:
    """Let a client of one's own do something."""

    async def main() -> None:
        async with Raw(address, client) as raw:
            await attack(raw)

    asyncio.run(asyncio.wait_for(main(), 60))


def still_there(alice: Client, secret: Any) -> None:
    """The victim has not noticed anything."""
    assert secret.status == "finished" and secret.result() == "SECRET"
    assert alice.submit(len, secret).result(timeout=60) == 6


READING: dict[str, dict[str, Any]] = {
    "gather": {"keys": ["the-secret"]},
    "who_has": {"keys": ["the-secret"]},
    "nbytes": {"keys": ["the-secret"], "summary": False},
    "fed_explain": {"key": "the-secret"},
    "fed_progress": {"keys": ["the-secret"]},
    "variable_set": {"name": "mine", "key": "the-secret", "data": None, "timeout": 5},
    "queue_put": {"name": "mine", "key": "the-secret", "data": None, "timeout": 5},
    "publish_put": {
        "names": ["m"],
        "keys": [["the-secret"]],
        "data": [None],
        "override": False,
        "client": "",
        "uid": b"1",
    },
    "scatter": {"data": {"the-secret": "forged"}, "workers": [], "client": ""},
}


@pytest.mark.parametrize("op", READING)
def test_a_call_that_names_anothers_key_is_refused(address: str, alice: Client, secret: Any, op: str) -> None:
    async def attack(raw: Raw) -> None:
        if op == "queue_put":
            await raw.rpc.queue_create(name="mine", client=raw.id, maxsize=0)
        with pytest.raises(PermissionError, match="the-secret.*another user"):
            who = {"client": raw.id} if "client" in READING[op] else {}
            await getattr(raw.rpc, op)(**READING[op] | who)

    hostile(address, attack)
    still_there(alice, secret)


NO_KEYS: dict[str, dict[str, Any]] = {
    "client-desires-keys": {"keys": [{"no": "key"}]},
    "client-releases-keys": {"keys": [{"no": "key"}]},
    "cancel-keys": {"keys": [("a", {"no": "key"})]},
    "report-key": {"key": {"no": "key"}},
    "fed-no-copies": {"keys": [{"no": "key"}]},
    "fed-back": {"blocks": [], "arrivals": [], "payloads": [], "wanted": [{"no": "key"}]},
}


@pytest.mark.parametrize("op", NO_KEYS)
def test_what_cannot_be_a_key_is_an_error_and_the_rest_is_heard(address: str, op: str) -> None:
    """Of one batch of messages; the connection stands."""

    async def attack(raw: Raw) -> None:
        await raw.say({"op": op, **NO_KEYS[op]}, {"op": "report-key", "key": "heard"})
        told = await raw.hears(lambda message: message["op"] == "error")
        assert "TypeError: {'no': 'key'} cannot be a key: it is a dict" in told["exception"]
        await raw.hears(lambda message: "heard" in message.get("keys", ()))
        await raw.settled()

    hostile(address, attack)


@pytest.mark.parametrize("message", [["no", "message"], {"op": ["no", "op"]}, {"op": {"no": "op"}}, {}, 1, None], ids=str)
def test_what_is_no_message_is_an_error_and_the_rest_is_heard(address: str, message: Any) -> None:
    async def attack(raw: Raw) -> None:
        await raw.say(message, {"op": "report-key", "key": "heard"})
        assert "is no message" in (await raw.hears(lambda message: message["op"] == "error"))["exception"]
        await raw.hears(lambda message: "heard" in message.get("keys", ()))
        await raw.settled()

    hostile(address, attack)


class Colour(Enum):
    """What Python can hash, and what is nothing that a hub could know."""

    RED = 1


@pytest.mark.parametrize("key", [Colour.RED, ("a", Colour.RED), frozenset({1})], ids=str)
def test_a_future_of_what_cannot_be_a_key(alice: Client, key: Any) -> None:
    """It is an error at once: with its other futures, the client would bring it to the hub again and again."""
    with pytest.raises(TypeError, match="(?i)unexpected key type"):
        Future(key, alice)
    gc.collect()
    assert alice.submit(abs, -1, pure=False).result(timeout=60) == 1
    assert key not in alice.futures and key not in alice.refcount


def test_asking_for_all_keys_shows_ones_own(address: str, alice: Client, secret: Any) -> None:
    async def attack(raw: Raw) -> None:
        assert "the-secret" not in await raw.rpc.who_has()
        assert "the-secret" not in await raw.rpc.nbytes(summary=False)
        assert not any("the-secret" in keys for keys in (await raw.rpc.has_what()).values())

    hostile(address, attack)
    assert "the-secret" in alice.who_has() and "the-secret" in alice.nbytes(summary=False)  # the control
    assert any("the-secret" in keys for keys in alice.has_what().values())


@pytest.mark.parametrize("op", ["client-desires-keys", "report-key", "update-graph"])
def test_a_stream_that_asks_for_anothers_key_is_told_that_it_is_not_its_own(
    address: str, alice: Client, secret: Any, op: str
) -> None:
    named: dict[str, Any] = {"key": "the-secret"} if op == "report-key" else {"keys": ["the-secret"]}
    graph = {"expr_ser": None, "internal_priority": None, "code": (), "annotations": {}} if op == "update-graph" else {}

    async def attack(raw: Raw) -> None:
        await raw.say({"op": op, **named, **graph})
        told = await raw.hears(lambda message: message["op"] == "cancelled-keys")
        assert told["keys"] == ("the-secret",) and "another user" in told["reason"]
        assert not [message for message in await raw.settled() if message["op"] == "key-in-memory"]

    hostile(address, attack)
    still_there(alice, secret)


def test_a_key_that_was_asked_for_before_it_was_anybodys_is_not_told(address: str, alice: Client) -> None:
    key = f"later-{uuid.uuid4().hex}"

    async def attack(raw: Raw) -> None:
        await raw.say({"op": "client-desires-keys", "keys": [key]}, {"op": "client-desires-keys", "keys": [key]})
        await raw.settled()
        future = alice.submit(str.upper, "x", key=key)
        await asyncio.to_thread(future.result, 60)
        assert not [message for message in await raw.settled() if message["op"] == "key-in-memory"]
        with pytest.raises(PermissionError):
            await raw.rpc.gather(keys=[key])

    hostile(address, attack)


def test_anothers_keys_are_not_cancelled(address: str, alice: Client, secret: Any) -> None:
    async def attack(raw: Raw) -> None:
        await raw.say({"op": "cancel-keys", "keys": ["the-secret"], "force": True, "client": alice.id})
        assert "PermissionError" in (await raw.hears(lambda message: message["op"] == "error"))["exception"]
        await raw.say({"op": "client-releases-keys", "keys": ["the-secret"], "client": alice.id})
        await raw.settled()

    hostile(address, attack)
    still_there(alice, secret)


def test_a_stream_speaks_for_its_own_client_whatever_it_names(address: str, alice: Client, secret: Any) -> None:
    key = f"mine-{uuid.uuid4().hex}"

    async def attack(raw: Raw) -> None:
        await raw.say({"op": "client-desires-keys", "keys": [key], "client": alice.id})
        await raw.say({"op": "subscribe-topic", "topic": key, "client": alice.id})
        await raw.say({"op": "close-client", "client": alice.id})
        await raw.hears(lambda message: message["op"] in ("stream-closed", "hung up"))

    hostile(address, attack)
    assert key not in alice.futures
    still_there(alice, secret)


def test_a_call_does_not_speak_for_another_client(address: str, alice: Client, secret: Any) -> None:
    async def attack(raw: Raw) -> None:
        with pytest.raises(PermissionError, match="does not speak for client"):
            await raw.rpc.scatter(data={"theirs": 1}, workers=[], client=alice.id)
        for client in (alice.id, "variable-x", "announced-north", "nobody"):
            with pytest.raises(PermissionError, match="does not speak for client"):
                await raw.rpc.variable_get(name="x", client=client, timeout=1)

    hostile(address, attack)


@pytest.mark.parametrize("who", ["daskfed's", "a stock one", "what holds a variable", "a site's"])
def test_nobody_registers_as_another_client(address: str, alice: Client, secret: Any, who: str) -> None:
    """An id that is taken is refused, or needs the secret of whoever had it; names of the hub's own are refused."""

    async def attack(_: Raw) -> None:
        async with Raw(address) as stock:
            ids = {"daskfed's": alice.id, "a stock one": stock.id, "a site's": f"north/{alice.id}"}
            async with Raw(address, ids.get(who, "variable-x")) as thief:
                if who == "daskfed's":
                    hello = {"protocol": 1, "owner": "alice", "secret": "a guess"}
                    await thief.say({"op": "fed-hello", **hello}, {"op": "client-desires-keys", "keys": ["the-secret"]})
                await thief.hears(lambda message: message["op"] == "hung up" or "error" in message)
                assert not [message for message in thief.heard if message["op"] == "key-in-memory"]

    hostile(address, attack)
    still_there(alice, secret)


def test_who_knows_the_secret_comes_back(address: str, alice: Client, secret: Any) -> None:
    """The control: the client itself, whose connection breaks."""
    alice.loop.add_callback(alice.scheduler_comm.comm.abort)
    time.sleep(0.2)
    still_there(alice, secret)


def test_blocks_and_data_of_others_are_not_forged(address: str, alice: Client, secret: Any) -> None:
    """A block that would make another's key, need it, or is named after another client is refused whole."""
    from daskfed.messages import PROTOCOL_VERSION, BlockKind, BlockSpec, Constraint, encode

    def block(raw: Raw, **fields: Any) -> dict[str, Any]:
        common = {"client": "", "owner": "alice", "kind": BlockKind.WHOLE, "ntasks": 1, "prefixes": ()}
        given = {"id": f"{raw.id}/0/0", "inputs": (), "outputs": (), "constraint": Constraint(), **common, **fields}
        return encode(BlockSpec(**given))  # type: ignore[no-any-return]

    async def attack(raw: Raw) -> None:
        hello = {"op": "fed-hello", "protocol": PROTOCOL_VERSION, "owner": "mallory"}
        submit = {"op": "fed-submit", "payloads": [None], "wait": True}
        makes, needs = block(raw, outputs=("the-secret",)), block(raw, inputs=("the-secret",), outputs=("stolen",))
        await raw.say(hello, {**submit, "blocks": [makes], "wanted": ["the-secret"]})
        told = await raw.hears(lambda message: message["op"] == "cancelled-keys")
        assert told["keys"] == ("the-secret",)
        await raw.say({**submit, "blocks": [needs], "wanted": ["stolen"]})
        assert "another user" in (await raw.hears(lambda m: m.get("keys") == ("stolen",)))["reason"]
        await raw.say({**submit, "blocks": [block(raw, id=f"{alice.id}/0/9", outputs=("z",))], "wanted": ["z"]})
        assert "not named after" in (await raw.hears(lambda m: m["op"] == "error"))["exception"]
        back = {"op": "fed-back", "blocks": [], "arrivals": [], "payloads": []}
        await raw.say({**back, "wanted": ["the-secret"], "kept": ["the-secret"]})
        assert not [message for message in await raw.settled() if message["op"] in ("key-in-memory", "fed-bring-data")]

    hostile(address, attack)
    still_there(alice, secret)


def test_what_is_shared_by_name_is_shared_within_one_owner(address: str, alice: Client) -> None:
    """Variables, queues, locks, events, datasets and metadata of one name are others for another owner."""
    name = uuid.uuid4().hex
    Variable(name, client=alice).set("hers")
    Queue(name, client=alice).put("hers")
    Event(name, client=alice).set()
    alice.publish_dataset("hers", name=name)
    alice.publish_dataset("hers", name=("a tuple", name))
    alice.set_metadata([name], "hers")
    with StockClient(address, set_as_default=False) as other:
        with pytest.raises(TimeoutError):
            Variable(name, client=other).get(timeout=0.5)
        assert Queue(name, client=other).qsize() == 0
        assert not Event(name, client=other).is_set()
        assert other.list_datasets() == () or name not in str(other.list_datasets())
        with pytest.raises(KeyError):
            other.get_dataset(name)
        assert other.get_metadata([name], default=None) is None and name not in str(other.get_metadata([]))
        other.publish_dataset("ours", name=name)
        Variable(name, client=other).set("ours")
        other.unpublish_dataset(name)
    assert (
        Variable(name, client=alice).get(timeout=10) == "hers" == alice.get_dataset(name) == alice.get_metadata([name])
    )
    assert Queue(name, client=alice).get(timeout=10) == "hers" and Event(name, client=alice).is_set()
    assert set(alice.list_datasets()) == {name, ("a tuple", name)}


def test_what_a_task_shares_is_its_owners(alice: Client) -> None:
    """The hub knows whose tasks a site runs."""
    name = uuid.uuid4().hex
    Variable(name, client=alice).set("hers")
    assert alice.submit(lambda: Variable(name).get(timeout=10), pure=False).result(timeout=60) == "hers"
    with Lock(name):
        assert alice.submit(lambda: Lock(name).acquire(timeout=0.2), pure=False).result(timeout=60) is False


LOST = ("CancelledError", "FutureCancelledError")  # what a task hears of a key that is not there


def make_inside() -> Any:
    """Submit a task inside of a task, and return its future."""
    return get_client().submit(str.upper, "nested", key="nested-secret")


def take(key: str) -> Any:
    """Return the value of a key, or the name of the error that says that there is none."""
    client = get_client()
    future = Future(key, client)
    client._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})
    try:
        return future.result(timeout=20)
    except Exception as exc:
        return type(exc).__name__


def test_what_a_task_made_is_its_owners(address: str, alice: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a client of another owner nor its tasks get it: before its own client asked for it, and after."""

    async def attack(raw: Raw) -> None:
        await raw.say({"op": "client-desires-keys", "keys": ["nested-secret"]})
        assert not [message for message in await raw.settled() if message["op"] == "key-in-memory"]

    outer = alice.submit(make_inside, site="north", pure=False)
    wait(outer)
    monkeypatch.setenv("LOGNAME", "mallory")
    with Client(address, timeout=60, set_as_default=False) as mallory:
        hostile(address, attack)
        assert mallory.submit(take, "nested-secret", site="south", pure=False).result(timeout=60) in LOST
        inner = outer.result(timeout=60)
        assert inner.result(timeout=60) == "NESTED"
        hostile(address, attack)
        assert mallory.submit(take, "nested-secret", site="south", pure=False).result(timeout=60) in LOST
    assert alice.submit(str.lower, inner, site="south").result(timeout=60) == "nested"


class Named(WorkerPlugin):
    """A plugin with a name that others may want to use."""

    name = "the-plugin"

    def __init__(self, whose: str) -> None:
        self.whose = whose

    def setup(self, worker: Any) -> None:
        worker.whose_plugin = self.whose

    def teardown(self, worker: Any) -> None:
        worker.whose_plugin = None


def whose_plugin(dask_worker: Any) -> Any:
    return getattr(dask_worker, "whose_plugin", None)


def test_a_plugin_is_its_owners(address: str, alice: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another owner can neither replace it nor take it away; the hub's own user can."""
    alice.register_plugin(Named("alice"))
    monkeypatch.setenv("LOGNAME", "mallory")
    with Client(address, timeout=60, set_as_default=False) as mallory:
        for idempotent in (False, True):
            mine = Named("mallory")
            mine.idempotent = idempotent
            with pytest.raises(PermissionError, match="worker plugin 'the-plugin' belongs to 'alice'"):
                mallory.register_plugin(mine)
        with pytest.raises(PermissionError, match="'alice'"):
            mallory.unregister_worker_plugin("the-plugin")
        assert set(mallory.run(whose_plugin).values()) == {"alice"}
    alice.register_plugin(Named("alice again"))
    assert set(alice.run(whose_plugin).values()) == {"alice again"}
    monkeypatch.delenv("LOGNAME")
    with Client(address, timeout=60, set_as_default=False) as own:
        own.register_plugin(Named("the hub's"))
        with pytest.raises(PermissionError, match="the-plugin"):
            alice.unregister_worker_plugin("the-plugin")
        assert set(alice.run(whose_plugin).values()) == {"the hub's"}
        own.unregister_worker_plugin("the-plugin")


def test_only_the_hubs_own_user_ends_it_or_changes_its_sites(
    address: str, alice: Client, secret: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, dict[str, Any]] = {"scale": {"n": 0}, "adapt": {}, "logs": {}, "drain": {}}
    for method, kwargs in calls.items():
        with pytest.raises(PermissionError, match=f"'alice' may not call '{method}' of the cluster of site 'north'"):
            alice.sync(alice.scheduler.fed_cluster, site="north", method=method, kwargs=kwargs)
    with pytest.raises(PermissionError, match="'alice' may not end the hub"):
        alice.sync(alice.scheduler.terminate)
    another = Client(address, timeout=60, set_as_default=False)
    with pytest.raises(PermissionError, match="only .* may"):
        another.shutdown()
    assert another.status == "closed"
    monkeypatch.delenv("LOGNAME")
    with Client(address, timeout=60, set_as_default=False) as own:
        assert own.sync(own.scheduler.fed_cluster, site="north", method="logs", kwargs={})
    time.sleep(0.5)  # it would have ended
    still_there(alice, secret)


class Purse:
    """An actor."""

    coins = 3


def test_an_actor_is_its_owners(address: str, alice: Client) -> None:
    """Nobody else calls it, or reads what it has."""
    purse = alice.submit(Purse, actor=True, key="the-purse", site="north").result(timeout=60)

    async def attack(raw: Raw) -> None:
        msg = {"op": "actor_attribute", "actor": "the-purse", "attribute": "coins"}
        with pytest.raises(PermissionError, match="the-purse.*another user"):
            await raw.rpc.proxy(worker=purse._address, msg=msg)

    hostile(address, attack)
    assert purse.coins == 3


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_this_machine_is_whom_the_kernel_says(address: str, alice: Client, secret: Any) -> None:
    """Whatever it says of itself in its hello."""
    script = f"""
import asyncio, os, sys
sys.path.insert(0, {str(commands.Path(__file__).parents[2])!r})
from daskfed.messages import PROTOCOL_VERSION
from tests.system.hostile import Raw

async def main():
    async with Raw({address!r}) as raw:
        await raw.say({{"op": "fed-hello", "protocol": PROTOCOL_VERSION, "owner": "alice", "secret": "mine"}})
        await raw.hears(lambda message: message["op"] == "fed-sites")
        try:
            print(await raw.rpc.gather(keys=["the-secret"], fed_session="mine"))
        except PermissionError as exc:
            print("refused:", exc)

os.setgid(65534); os.setuid(65534)
asyncio.run(main())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert told.stdout.startswith("refused: 'the-secret'"), told.stderr
