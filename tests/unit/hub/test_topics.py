"""Events of one owner are not told to another."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from daskfed.hub.topics import Topics

OWNERS = {"client-of-a": "a", "client-of-b": "b"}


class Host:
    """Two clients of two owners, and a site where both have a task; ``told`` is what they heard."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.caller = "nobody"

    def owner_of(self, client: str) -> str:
        return OWNERS[client]

    def owner_calling(self) -> str:
        return self.caller

    def owner_at(self, site: str, key: Any) -> str | None:
        return {"task-of-a": "a", "task-of-b": "b"}.get(key)

    def origin(self, site: str, worker: str) -> Mapping[str, str]:
        return {"worker": f"fed://{site}/{worker}", "site": site}

    def send_all(self, client_msgs: Mapping[str, list[dict[str, Any]]], worker_msgs: Mapping[str, Any]) -> None:
        self.told += [(client, message["event"][1]) for client, sent in client_msgs.items() for message in sent]


def topics() -> tuple[Topics, Host]:
    """Return topics to which both clients listen."""
    host = Host()
    view = SimpleNamespace(host=host, send_all=host.send_all, plugins={}, handlers={}, stream_handlers={})
    made = Topics(view)  # type: ignore[arg-type]
    for client in OWNERS:
        made.subscribe("t", client)
    return made, host


def test_a_clients_event_is_its_owners() -> None:
    made, host = topics()
    host.caller = "a"
    made.log_event("t", 1)
    assert host.told == [("client-of-a", 1)]
    assert [msg for _, msg in made.get_events("t")] == [1]
    host.caller = "b"
    assert made.get_events("t") == ()
    host.caller = "nobody"
    assert made.get_events() == {}


def test_a_tasks_event_is_its_owners_and_says_where_it_was() -> None:
    made, host = topics()
    made.from_site("north", ["t"], {"text": "hello", "worker": "w"}, task="task-of-b")
    made.from_site("north", ["t"], 5, task="task-of-a")
    made.from_site("north", ["t"], "whose?", task="unknown")
    assert host.told == [
        ("client-of-b", {"text": "hello", "worker": "fed://north/w", "site": "north"}),
        ("client-of-a", 5),
    ]


def test_who_unsubscribes_hears_no_more() -> None:
    made, host = topics()
    made.unsubscribe("t", "client-of-a")
    made.unsubscribe_all("client-of-b")
    made.publish_to_all("t", "from the hub")
    assert host.told == []
    made.subscribe("t", "client-of-a")
    made.publish_to_all("t", "again")
    assert host.told == [("client-of-a", "again")]
