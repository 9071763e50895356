"""20,000 calls through a hub that keeps a journal and one that does not: wall seconds and their ratio."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

from _common import hub_and_sites, median, timed, verdict, wait_for

import daskfed

CALLS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
REPEATS = 5


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


def measured(state: Path | None) -> float:
    """Return the wall seconds of all calls at a federation started for them: a hub in its own process and two sites."""
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(hub_and_sites(("north", "south"), state=state))
        client = stack.enter_context(daskfed.Client(address, timeout=60, set_as_default=False))
        wait_for(lambda: sum(site["workers"] for site in client.sites().values()) == 2, "the sites' workers")
        calls(client, CALLS // 10)
        return timed(lambda: calls(client, CALLS))


def main() -> int:
    """Measure in turns, each time at a new federation, and print; return 1 where the bar is missed."""
    found: dict[str, list[float]] = {"with": [], "without": []}
    for repeat in range(REPEATS):
        for name in ("with", "without") if repeat % 2 else ("without", "with"):
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measured(Path(folder) if name == "with" else None))
    kept, plain = median(found["with"]), median(found["without"])
    ratio = median([a / b for a, b in zip(found["with"], found["without"], strict=True)])
    print(json.dumps({"calls": CALLS, "seconds": found}))
    print(f"{CALLS} calls: with a journal {kept:.2f} s, without {plain:.2f} s (medians of {REPEATS}, in turns)")
    return not verdict("with a journal / without, median of the turns' ratios", ratio, 1.05)


if __name__ == "__main__":
    sys.exit(main())
