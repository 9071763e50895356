"""Which workers a user means."""

from __future__ import annotations

import pytest

from daskfed.errors import UnknownSiteError, UnknownWorkerError
from daskfed.hub.addresses import Worker, address_at, fill, found, listed, resolve, take_from_largest, workers_of
from daskfed.messages import SiteHello

A = Worker("north", "tcp://10.0.0.1:1000", "alice", "10.0.0.1")
B = Worker("north", "tcp://10.0.0.1:1001", "0", "10.0.0.1")
C = Worker("south", "tcp://10.0.0.1:1000", "carol", "10.0.0.1")  # the address of A, in another private network
D = Worker("south", "tcp://10.0.0.2:1000", "0", "10.0.0.2")
WORKERS = (A, B, C, D)


def hello(site: str, **labels: str) -> SiteHello:
    return SiteHello(
        site=site, incarnation="1", protocol=1, labels=tuple(labels.items()), environments=("default",), resources=(),
        data_address="", dashboard="", versions=(),
    )  # fmt: skip


SITES = (hello("north", disk="fast"), hello("south"))


@pytest.mark.parametrize(
    ("selector", "targets"),
    [
        ("fed://north/10.0.0.1:1000", {"north": [A.address]}),
        ("fed://south/10.0.0.1:1000", {"south": [C.address]}),
        ("tcp://10.0.0.1:1001", {"north": [B.address]}),
        ("10.0.0.2:1000", {"south": [D.address]}),
        ("alice", {"north": [A.address]}),
        ("10.0.0.2", {"south": [D.address]}),
        ("north", {"north": None}),
        ("fed://north", {"north": None}),
        ("disk=fast", {"north": None}),
    ],
)
def test_what_names_a_worker(selector: str, targets: object) -> None:
    assert resolve([selector], WORKERS, SITES) == targets


def test_a_host_is_all_its_workers() -> None:
    assert resolve(["10.0.0.1"], (A, B, D), SITES) == {"north": [A.address, B.address]}


def test_several_names_are_all_of_them_once() -> None:
    named = ["alice", "fed://north/10.0.0.1:1000", "fed://north/10.0.0.1:1001", "carol"]
    assert resolve(named, WORKERS, SITES) == {"north": [A.address, B.address], "south": [C.address]}


def test_a_site_and_one_of_its_workers_is_the_site() -> None:
    assert resolve(["alice", "north"], WORKERS, SITES) == {"north": None}
    assert resolve(["north", "alice"], WORKERS, SITES) == {"north": None}


@pytest.mark.parametrize(
    ("selector", "problem"),
    [
        ("tcp://10.0.0.1:1000", "a worker 'tcp://10.0.0.1:1000' is at several sites: name one of {a}, {c}"),
        ("10.0.0.1:1000", "a worker '10.0.0.1:1000' is at several sites: name one of {a}, {c}"),
        ("0", "a worker named '0' is at several sites: name one of {b}, {d}"),
        ("10.0.0.1", "a host '10.0.0.1' is at several sites: name one of {a}, {b}, {c}"),
        ("bob", "no worker 'bob'; there are {a}, {b}, {c}, {d}, or name a site"),
        ("fed://north/10.9.9.9:1", "no worker 'fed://north/10.9.9.9:1'; there are {a}, {b}, {c}, {d}, or name a site"),
    ],
)
def test_what_names_none_or_too_many_names_the_candidates(selector: str, problem: str) -> None:
    shown = {name: worker.shown for name, worker in zip("abcd", WORKERS, strict=True)}
    with pytest.raises(UnknownWorkerError) as caught:
        resolve([selector], WORKERS, SITES)
    assert str(caught.value) == problem.format(**shown)
    assert isinstance(caught.value, ValueError)


def test_an_error_does_not_list_a_thousand_workers() -> None:
    many = [Worker("north", f"tcp://10.0.0.1:{port}", str(port), "10.0.0.1") for port in range(1000, 2000)]
    with pytest.raises(UnknownWorkerError, match=r"fed://north/10.0.0.1:1007 and 992 more"):
        found("bob", many)
    with pytest.raises(UnknownWorkerError, match="there are none so far"):
        found("bob", [])


def test_a_site_that_does_not_exist() -> None:
    with pytest.raises(UnknownSiteError, match="no site matches 'west'; sites are north"):
        resolve(["fed://west"], WORKERS, SITES)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("alice", ["alice"]),
        (0, ["0"]),
        (["alice", 0], ["alice", "0"]),
        ([("10.0.0.1", 1000)], ["10.0.0.1:1000"]),
        ({"alice"}, ["alice"]),
        ((), []),
    ],
)
def test_one_or_several_are_listed(given: object, names: list[str]) -> None:
    assert listed(given) == names


def test_no_workers_are_none_at_all() -> None:
    assert resolve([], WORKERS, SITES) == {}


def test_workers_of_what_a_scheduler_says() -> None:
    identity = {"workers": {"tcp://10.0.0.2:1000": {"name": 0, "host": "10.0.0.2", "nthreads": 2}}}
    assert workers_of("south", identity) == [D]


def test_an_address_across_sites() -> None:
    assert address_at("north", "tcp://10.0.0.1:1000") == A.shown == "fed://north/10.0.0.1:1000"
    assert address_at("north", "inproc://10.0.0.1/7/8") == "fed://north/10.0.0.1/7/8"


@pytest.mark.parametrize(
    ("count", "room", "shares"),
    [
        (1, {"a": 2, "b": 2}, {"a": 1}),
        (3, {"a": 2, "b": 2}, {"a": 2, "b": 1}),
        (9, {"a": 2, "b": 2}, {"a": 2, "b": 2}),
        (2, {"a": 0, "b": 3}, {"b": 2}),
        (0, {"a": 1}, {}),
    ],
)
def test_sites_are_filled_in_order(count: int, room: dict[str, int], shares: dict[str, int]) -> None:
    assert fill(count, room) == shares


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (1, {"a": 1, "b": 3}, {"b": 1}),
        (3, {"a": 2, "b": 3}, {"b": 2, "a": 1}),
        (9, {"a": 2, "b": 1}, {"a": 2, "b": 1}),
        (0, {"a": 2}, {}),
    ],
)
def test_who_has_most_gives_up_the_next(count: int, sizes: dict[str, int], shares: dict[str, int]) -> None:
    assert take_from_largest(count, sizes) == shares
