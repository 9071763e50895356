"""One of two sites killed half way through a job: its time, and tasks run again per task lost."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import psutil
from _common import Diary, hub_and_sites, kill_tree, verdict
from _halfway import SITES, THREADS, Job, all_workers, seconds_given

import daskfed


def measure(job: Job, folder: Path, kill: bool) -> dict[str, float]:
    """Run the job on two sites, of which one may be killed half way."""
    diary = Diary(folder / f"diary-{kill}")
    told: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        address, processes = stack.enter_context(hub_and_sites(SITES, threads_per_worker=THREADS))
        client = stack.enter_context(daskfed.Client(address, timeout=60))
        all_workers(client)
        victims = {each.pid for each in psutil.Process(processes["south"].pid).children(recursive=True)}
        told["seconds"] = job.run(client, diary, (lambda: kill_tree(processes["south"])) if kill else None)
    began = diary.entries("began")
    told["lost"] = len({task for task, pid, _ in began if pid in victims}) if kill else 0
    told["again"] = len(began) - len({task for task, _, _ in began})
    return told


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    job = Job(seconds_given())
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = (measure(job, Path(folder), kill) for kill in (False, True))
    print(json.dumps({"ntasks": job.ntasks, "undisturbed": calm, "killed": killed}))
    print(f"{job.ntasks} tasks: undisturbed {calm['seconds']:.1f} s, killed {killed['seconds']:.1f} s")
    print(f"tasks begun at the killed site: {killed['lost']}, run again: {killed['again']}")
    passed = [
        verdict("seconds, one of two sites killed half way", killed["seconds"], 2 * calm["seconds"] + 10),
        verdict("tasks run again / lost", killed["again"] / max(1, killed["lost"]), 1.5),
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
