"""The hub killed half way through a job and started again 2 s later: its time, and what sites finished meanwhile."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from _common import Diary, hub_and_sites, hub_command, running, verdict
from _halfway import SITES, THREADS, Job, all_workers, seconds_given

import daskfed

AWAY_S = 2.0


def measure(job: Job, folder: Path, kill: bool) -> dict[str, float]:
    """Run the job on two sites, whose hub may be killed half way."""
    diary = Diary(folder / f"diary-{kill}")
    told: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        sites = hub_and_sites(SITES, state=folder / f"state-{kill}", threads_per_worker=THREADS)
        address, processes = stack.enter_context(sites)
        client = stack.enter_context(daskfed.Client(address, timeout=60))
        all_workers(client)

        def disturb() -> None:
            processes["hub"].kill()
            processes["hub"].wait()
            told["killed_at"] = time.time()
            time.sleep(AWAY_S)
            stack.enter_context(running(*hub_command(address, folder / f"state-{kill}")))
            client.sites()  # waits until the hub answers
            told["back_at"] = time.time()

        told["seconds"] = job.run(client, diary, disturb if kill else None)
        began_s, ended_s = told.get("killed_at", 0.0), told.get("back_at", 0.0)
        told["meanwhile"] = sum(began_s < at < ended_s for *_, at in diary.entries("ended"))
        told["again"] = len(diary.entries("began")) - job.ntasks
        client.close()  # before the second hub ends
    return told


def main() -> int:
    """Measure and print; return 1 where a bar is missed."""
    job = Job(seconds_given())
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = (measure(job, Path(folder), kill) for kill in (False, True))
    away_s = killed["back_at"] - killed["killed_at"]
    print(json.dumps({"ntasks": job.ntasks, "undisturbed": calm, "killed": killed}))
    print(f"{job.ntasks} tasks: undisturbed {calm['seconds']:.1f} s, killed {killed['seconds']:.1f} s")
    print(f"the hub was away for {away_s:.1f} s, sites finished {killed['meanwhile']} tasks; again: {killed['again']}")
    passed = [
        verdict("seconds, hub killed half way", killed["seconds"], 1.15 * calm["seconds"] + 10),
        verdict("1 / tasks finished while the hub was away", 1 / max(1e-9, killed["meanwhile"]), 1),
    ]
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
