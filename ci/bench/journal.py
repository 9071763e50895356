"""20,000 calls through a hub that keeps a journal and one that does not: wall seconds and their ratio."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator

from _common import hub_and_sites, median, timed, verdict, wait_for

import daskfed

CALLS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
REPEATS = 20


def trivial(number: int) -> int:
    """Return the next number."""
    return number + 1


def calls(client: daskfed.Client, count: int) -> None:
    """Submit so many calls and gather their results."""
    futures = client.map(trivial, range(count), pure=False)
    if sum(client.gather(futures)) != count * (count + 1) // 2:
        raise SystemExit("the calls gave something else")
    for future in futures:
        future.release()


@contextlib.contextmanager
def federation(state: str | None) -> Iterator[daskfed.Client]:
    """Run a hub in its own process and two sites; yields a client that has made some calls."""
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(hub_and_sites(("north", "south"), state=state))
        client = stack.enter_context(daskfed.Client(address, timeout=60, set_as_default=False))
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == 2, "the sites' workers")
        calls(client, CALLS)
        yield client


def main() -> int:
    """Measure at two federations in turns, and print; return 1 where the bar is missed."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder, federation(folder) as kept, federation(None) as plain:
        for repeat in range(REPEATS):
            turn = [("with", kept), ("without", plain)]
            for name, client in turn[:: 1 if repeat % 2 else -1]:
                found[name].append(timed(lambda client=client: calls(client, CALLS)))
    with_it, without = median(found["with"]), median(found["without"])
    ratio = median([a / b for a, b in zip(found["with"], found["without"], strict=True)])
    print(json.dumps({"calls": CALLS, "seconds": found}))
    print(f"{CALLS} calls: with a journal {with_it:.2f} s, without {without:.2f} s (medians of {REPEATS}, in turns)")
    return not verdict("with a journal / without, median of the turns' ratios", ratio, 1.05)


if __name__ == "__main__":
    sys.exit(main())
