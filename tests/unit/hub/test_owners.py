"""Who is at the other end, what they may name, and which names are whose."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
from typing import Any

import pytest
from distributed.comm.core import connect

from daskfed.comm.opaque import listen_opaque
from daskfed.hub.owners import is_key, named_keys, proof_of, reserved
from daskfed.hub.peers import own_user, user_at, user_id_of
from daskfed.hub.server import Hub


def in_a_hub(test: Any) -> None:
    """Run ``test(hub)`` with a hub of the user who runs the tests; it does not listen."""

    async def main() -> None:
        hub = Hub()
        try:
            test(hub)
        finally:
            await hub.close()

    asyncio.run(main())


class TestPeers:
    def test_the_user_of_a_socket_is_found(self) -> None:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as listening:
                listening.bind((host, 0))
                listening.listen()
                with socket.create_connection(listening.getsockname()[:2]) as client:
                    ends = [tuple(address[:2]) for address in (client.getsockname(), client.getpeername())]
                    assert user_id_of(ends[0], ends[1]) == os.getuid() == user_id_of(ends[1], ends[0])

    def test_nobody_is_at_a_socket_that_is_not_there(self) -> None:
        assert user_id_of(("127.0.0.1", 1), ("127.0.0.1", 2)) is None

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "inproc://"])
    def test_the_user_at_a_comm(self, address: str) -> None:
        found: list[str] = []

        async def handler(comm: Any) -> None:
            found.append(user_at(comm))
            await comm.write("done")

        async def main() -> None:
            listener = await listen_opaque(address, handler)
            comm = await connect(listener.contact_address)
            await comm.read()
            await comm.close()
            listener.stop()

        asyncio.run(main())
        assert found == [own_user()] == [pwd.getpwuid(os.getuid()).pw_name]


class TestClaims:
    def test_whom_the_hubs_user_and_other_machines_act_for_is_up_to_them(self) -> None:
        def test(hub: Hub) -> None:
            assert hub.owners.accepted(hub.owners.mine, "alice") == "alice"
            assert hub.owners.accepted("@10.0.0.7", "alice") == "alice"
            assert hub.owners.accepted(hub.owners.mine, "") == hub.owners.mine

        in_a_hub(test)

    def test_another_user_of_this_machine_is_whom_the_machine_says(self) -> None:
        in_a_hub(lambda hub: assert_equal(hub.owners.accepted("mallory", "alice"), "mallory"))

    def test_no_owner_has_a_name_that_looks_like_something_else(self) -> None:
        def test(hub: Hub) -> None:
            assert hub.owners.accepted(hub.owners.mine, "al\x1fice\n") == "alice"
            assert hub.owners.accepted(hub.owners.mine, "@10.0.0.7") == "10.0.0.7"

        in_a_hub(test)

    @pytest.mark.parametrize(
        "client", ["", "variable-x", "queue-x", "published-x", "fire-and-forget", "north/Client-1"]
    )
    def test_ids_that_mean_something_to_the_hub(self, client: str) -> None:
        assert reserved(client) is not None

    def test_ids_that_clients_have(self) -> None:
        assert reserved("Client-1") is None and reserved("Client-worker-1") is None

    def test_a_proof_is_not_what_it_proves(self) -> None:
        assert proof_of("secret") == proof_of("secret") != "secret" and proof_of("") == ""


class TestKeys:
    def test_what_a_call_names(self) -> None:
        assert named_keys("gather", {"keys": ("a", ("b", 0))}) == ["a", ("b", 0)]
        assert named_keys("publish_put", {"names": ["n"], "keys": (("a", ("b", 0)), ("c",))}) == ["a", ("b", 0), "c"]
        assert named_keys("scatter", {"data": {"a": 1}}) == ["a"] and named_keys("variable_set", {"key": "a"}) == ["a"]
        assert named_keys("variable_set", {"key": None, "data": {"x": 1}}) == []
        assert named_keys("get_metadata", {"keys": ["a path"]}) == [] and named_keys("who_has", {"keys": None}) == []

    def test_what_is_a_key(self) -> None:
        assert all(map(is_key, ["x", b"x", 1, 1.5, ("x", 0, ("y",))]))

    @pytest.mark.parametrize("key", [None, {"a": 1}, ["x"], ("x", None), object()])
    def test_what_is_none(self, key: Any) -> None:
        with pytest.raises(TypeError, match="cannot be a key"):
            is_key(key)
        with pytest.raises(TypeError, match=r"^\{.{79} \.\.\. cannot be a key: it is a dict"):
            is_key({"a": "x" * 1000})


class TestNames:
    def test_the_hubs_own_user_has_the_plain_names(self) -> None:
        kwargs = {"name": "x", "client": "c"}
        in_a_hub(lambda hub: assert_equal(hub.owners.under_owner("queue_get", hub.owners.mine, kwargs), kwargs))

    @pytest.mark.parametrize("op", ["variable_set", "variable-future-received-confirm", "queue_get", "event_set"])
    def test_others_have_names_of_their_own(self, op: str) -> None:
        def test(hub: Hub) -> None:
            hers = hub.owners.under_owner(op, "alice", {"name": "x"})
            assert hers != {"name": "x"} and hers != hub.owners.under_owner(op, "bob", {"name": "x"})

        in_a_hub(test)

    def test_datasets_may_have_any_key_as_their_name(self) -> None:
        def test(hub: Hub) -> None:
            names = ["x", ("y", 0), 7]
            hers = hub.owners.under_owner("publish_get", "alice", {"names": names})["names"]
            ours = ["x", ("alice", "x"), 8]
            shown = {owner: hub.owners._shown("publish_list", owner, [*hers, *ours]) for owner in ("alice", "bob")}
            assert shown == {"alice": names, "bob": []}
            assert hub.owners._shown("publish_list", hub.owners.mine, [*hers, *ours]) == ours

        in_a_hub(test)

    def test_metadata_is_a_tree_for_each(self) -> None:
        def test(hub: Hub) -> None:
            hers = hub.owners.under_owner("set_metadata", "alice", {"keys": ["a", "b"], "value": 1})
            assert hers["keys"][1:] == ["a", "b"]
            tree = {hers["keys"][0]: {"a": {"b": 1}}, "a": 2}
            assert hub.owners._shown("get_metadata", hub.owners.mine, tree) == {"a": 2}

        in_a_hub(test)

    def test_what_names_nothing_that_is_shared_stays(self) -> None:
        in_a_hub(lambda hub: assert_equal(hub.owners.under_owner("log_event", "alice", {"name": "x"}), {"name": "x"}))


def assert_equal(found: Any, expected: Any) -> None:
    """Compare, within a lambda."""
    assert found == expected
