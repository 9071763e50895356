"""Tell the story of one history: ``python -m tests.simulation.replay SEED [TEXT]`` (only lines that have TEXT)."""

from __future__ import annotations

import sys

from tests.simulation.federation import Broken, Simulation


def main(seed: int, text: str = "") -> int:
    """Play the history of ``seed`` and print it; return 1 where it breaks a rule."""
    story: list[str] = []
    try:
        result = Simulation(seed, story=story).run()
        end = f"{result.sites} sites, {result.tasks} tasks, {result.events} events, {result.seconds:.1f} s: clean"
    except Broken as exc:
        end = str(exc)
    for line in story:
        if text in line:
            print(line)
    print(end)
    return 0 if end.endswith("clean") else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:3]))
