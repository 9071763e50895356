"""The hub is killed and started again on its address: what it coordinated stands, what it ran goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed import Lock, Queue, Semaphore, Variable, as_completed, fire_and_forget, get_worker
from distributed.batched import BatchedSend

from daskfed import Client
from daskfed.client.returning import Kept
from tests.system.killable import Killable, killable

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

SOON_S = 60.0  # for what takes a few seconds on a quiet machine
SLEEPER = """
import sys, time
from daskfed import Client

def slow(x):
    time.sleep(0.1)
    return x

if __name__ == "__main__":
    client = Client(sys.argv[1])
    futures = client.map(slow, range(60), pure=False)
    print("submitted", flush=True)
    print("sum", sum(client.gather(futures)), flush=True)
"""


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    with killable(tmp_path_factory.mktemp("federation"), "north", "south") as federation:
        yield federation


def note(folder: str, name: str, delay_s: float) -> str:
    """Write down when this began and ended."""
    began = time.time()
    time.sleep(delay_s)
    with open(os.path.join(folder, name), "a") as file:
        file.write(f"{began} {time.time()}\n")
    return name


def under_lock(folder: str, name: str, delay_s: float) -> str:
    with Lock("the-lock"):
        return note(folder, name, delay_s)


def leased(folder: str, name: str, delay_s: float) -> str:
    with Semaphore(max_leases=2, name="the-semaphore"):
        return note(folder, name, delay_s)


def spans(folder: Path) -> list[tuple[float, float]]:
    """Return when each note began and ended, in order."""
    lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    return sorted((float(began), float(ended)) for began, ended in map(str.split, lines))


def most_at_once(folder: Path) -> int:
    found = spans(folder)
    return max(sum(began <= moment < ended for began, ended in found) for moment, _ in found)


def wait_until(done: Callable[[], object], shown: object = None) -> None:
    deadline = time.monotonic() + SOON_S
    while not done():
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)


def test_a_lock_is_never_held_twice(fed: Killable, tmp_path: Path) -> None:
    with fed.client() as client:
        futures = [
            client.submit(under_lock, str(tmp_path), f"{site}-{n}", 1.5, site=site)
            for site in ("north", "south")
            for n in range(2)
        ]
        time.sleep(1.0)  # one of them holds the lock now
        fed.kill_hub()
        assert sorted(client.gather(futures)) == ["north-0", "north-1", "south-0", "south-1"]
    assert len(spans(tmp_path)) == 4 and most_at_once(tmp_path) == 1


def test_a_semaphore_counts_on(fed: Killable, tmp_path: Path) -> None:
    with fed.client() as client:
        semaphore = Semaphore(max_leases=2, name="the-semaphore")
        assert semaphore.acquire()  # held by the client all the time
        futures = [
            client.submit(leased, str(tmp_path), f"{site}-{n}", 1.0, site=site)
            for site in ("north", "south")
            for n in range(2)
        ]
        time.sleep(0.7)
        fed.kill_hub()
        client.gather(futures)
        semaphore.release()
        assert semaphore.get_value() == 0
    assert len(spans(tmp_path)) == 4 and most_at_once(tmp_path) == 1


def say(text: str) -> None:
    """Log an event."""
    get_worker().log_event("said", {"text": text})


def test_a_client_goes_on_hearing_its_topics(fed: Killable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what tasks say that were submitted while there was no hub, however slowly the client's stream goes."""
    heard: list[str] = []
    with fed.client() as client:
        client.subscribe_topic("said", lambda event: heard.append(event[1]["text"]))
        client.submit(say, "before", site="north").result()
        wait_until(lambda: heard == ["before"], heard)
        monkeypatch.setattr("distributed.client.BatchedSend", lambda interval, loop: BatchedSend("1s", loop=loop))
        fed.hub.process.kill()
        meanwhile = client.submit(say, "meanwhile", site="north")
        time.sleep(1)
        fed.start_hub()
        meanwhile.result()
        client.submit(say, "after", site="north").result()
        wait_until(lambda: heard == ["before", "meanwhile", "after"], heard)


def waited_there(seconds: float) -> str:
    """Wait, and return the address of the worker that did."""
    time.sleep(seconds)
    return str(get_worker().address)


def there(before: str) -> tuple[str, str]:
    """Return what ran before, and the address of this worker."""
    return before, str(get_worker().address)


@pytest.mark.parametrize("heard", [True, False])
def test_a_worker_named_by_its_plain_address_is_still_meant(fed: Killable, heard: bool) -> None:
    """Also where the hub was killed before the client heard to which site its task was bound."""

    async def main() -> None:
        async with Client(fed.address, asynchronous=True) as client:
            north = await client.submit(waited_there, 0, site="north", pure=False)
            first = client.submit(waited_there, 6, site="south", pure=False)
            second = client.submit(there, first, workers=[north], pure=False)  # would run near its input
            unbound = client._memory.blocks[next(reversed(client._memory.blocks))].spec
            while (await client.explain(first))["phase"] != "pending" or (await client.explain(second)) is None:
                await asyncio.sleep(0.05)
            if not heard:
                client._memory.blocks[unbound.id] = Kept(unbound)
            await asyncio.to_thread(fed.kill_hub)
            assert await asyncio.wait_for(second.result(), SOON_S) == (await first, north)

    asyncio.run(main())


def test_the_items_of_a_queue_come_out_once_and_in_order(fed: Killable) -> None:
    with fed.client() as client, fed.client() as reader:
        queue, same = Queue("the-queue", client=client), Queue("the-queue", client=reader)
        for n in range(10):
            queue.put(n)
        queue.put(client.submit(sum, [1, 2], pure=False))
        taken = [same.get(timeout=SOON_S) for _ in range(3)]
        fed.kill_hub()
        queue.put("last")
        taken += [same.get(timeout=SOON_S) for _ in range(9)]
        future = taken.pop(10)
        assert taken == [*range(10), "last"] and same.qsize() == 0
        assert future.result(timeout=SOON_S) == 3


def test_a_dataset_outlives_its_client_and_its_hub(fed: Killable) -> None:
    with fed.client() as client:
        kept = client.map(pow, range(20), range(20), pure=False)
        client.publish_dataset(powers=client.submit(sum, kept))
        Variable("named").set("value")
        client.set_metadata(["a", "b"], 1)
        client.get_dataset("powers").result(timeout=SOON_S)
    fed.kill_hub()
    with fed.client() as client:
        assert client.list_datasets() == ("powers",)
        assert client.get_dataset("powers").result(timeout=SOON_S) == sum(n**n for n in range(20))
        assert Variable("named").get(timeout=SOON_S) == "value" and client.get_metadata(["a", "b"]) == 1
        future = client.get_dataset("powers")
        (holder,) = client.explain(future)["sites"]
        fed.kill_site(holder)  # the hub alone knows how it was made
        wait_until(lambda: holder not in client.explain(future)["sites"])
        assert future.result(timeout=SOON_S) == sum(n**n for n in range(20))
        client.unpublish_dataset("powers")
    fed.add(holder)


def test_what_was_fired_and_forgotten_is_done(fed: Killable, tmp_path: Path) -> None:
    with fed.client() as client:
        for n in range(6):
            fire_and_forget(client.submit(note, str(tmp_path), f"n{n}", 1.0, pure=False))
        wait_until(lambda: client.sites()["north"]["running"])
    fed.kill_hub()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 6)
    with fed.client() as client:
        wait_until(lambda: not any(site["blocks"] or site["held"] for site in client.sites().values()))


def test_sites_go_on_while_the_hub_is_away(fed: Killable, tmp_path: Path) -> None:
    with fed.client() as client:
        futures = client.map(note, [str(tmp_path)] * 30, [str(n) for n in range(30)], [0.2] * 30, pure=False)
        next(as_completed(futures))
        fed.hub.process.kill()
        fed.hub.process.wait(10)
        before = len(list(tmp_path.iterdir()))
        time.sleep(1.5)
        assert len(list(tmp_path.iterdir())) > before + 4
        fed.start_hub()
        assert client.gather(futures) == [str(n) for n in range(30)]
        assert len(spans(tmp_path)) == 30  # nothing was run twice


def test_a_client_that_slept_finds_its_work_done(fed: Killable, tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    command = [sys.executable, str(script), fed.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "submitted\n"
        time.sleep(0.5)
        sleeper.send_signal(signal.SIGSTOP)
        fed.kill_hub()
        time.sleep(2.0)
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.communicate(timeout=SOON_S)[0] == f"sum {sum(range(60))}\n"
        assert sleeper.returncode == 0
