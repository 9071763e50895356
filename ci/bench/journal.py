"""20,000 calls through a hub that keeps a journal and one that does not: wall seconds and their ratio."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from _common import hub_and_sites, median, timed, verdict, wait_for

import daskfed

CALLS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
REPEATS = 5


def trivial(number: int) -> int:
    """Return the next number."""
    return number + 1


def calls(client: daskfed.Client) -> None:
    """Submit all calls and gather their results."""
    futures = client.map(trivial, range(CALLS), pure=False)
    if sum(client.gather(futures)) != CALLS * (CALLS + 1) // 2:
        raise SystemExit("the calls gave something else")
    for future in futures:
        future.release()


@contextlib.contextmanager
def federation(state: Path | None) -> Iterator[daskfed.Client]:
    """Yield a client of two sites and a hub in a process of its own."""
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(hub_and_sites(("north", "south"), state=state))
        client = stack.enter_context(daskfed.Client(address, timeout=60, set_as_default=False))
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == 2, "the sites' workers")
        calls(client)
        yield client


def main() -> int:
    """Measure in turns and print; return 1 where the bar is missed."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder)) as journalled, federation(None) as plain:
        for repeat in range(REPEATS):
            turns = [("with", journalled), ("without", plain)]
            for name, client in turns if repeat % 2 else reversed(turns):
                found[name].append(timed(lambda client=client: calls(client)))  # type: ignore[misc]
    kept, plain_s = median(found["with"]), median(found["without"])
    print(json.dumps({"calls": CALLS, "seconds": found}))
    print(f"{CALLS} calls: with a journal {kept:.2f} s, without {plain_s:.2f} s (medians of {REPEATS}, in turns)")
    return not verdict("with a journal / without", kept / plain_s, 1.05)


if __name__ == "__main__":
    sys.exit(main())
