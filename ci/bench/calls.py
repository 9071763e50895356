"""Calls per second and per millisecond of daskfed and its peers: map, submits, one by one, sleeps; JSON and a plot.

Each system runs each case in a process of its own, in turn, ROUNDS times; medians count. Parsl and Ray are installed on
first use in environments of their own in .venvs; without them their rows are missing, and it says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _calls import CASES, SYSTEMS
from _common import median, verdict

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
LIMIT_S = 300.0
HERE = Path(__file__).parent
PEERS = {"Parsl HTEX": "parsl", "Ray": "ray"}
OUT = Path(sys.prefix) / "bench"

BARS = {  # case -> system that is compared, its ratio ours / theirs at least
    "map": {"stock Dask": 40, "Parsl HTEX": 15, "Ray": 15, "ProcessPoolExecutor": 4},
    "submits": {"stock Dask": 12, "Parsl HTEX": 6, "Ray": 6},
    "one by one": {"stock Dask": 4, "Parsl HTEX": 1, "Ray": 1},
}
SLEEPS = {"1 ms": 0.90, "10 ms": 0.97, "100 ms": 0.99}

Found = dict[str, dict[str, list[dict[str, float]]]]


def peer_python(package: str) -> str | None:
    """Return a Python that has a peer, which is installed if need be; None where that does not work."""
    folder = HERE.parents[1] / ".venvs" / package
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"installing {package} in {folder.name}", flush=True)
        done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)
        pip = [str(python), "-m", "pip", "install", "-q", "--no-input", package]
        if done.returncode != 0 or subprocess.run(pip, check=False).returncode != 0:
            print(f"{package} cannot be installed: it is left out")
            return None
        ready.touch()
    return str(python)


def measure(python: str, system: str, case: str) -> dict[str, float] | None:
    """Run one case of one system in a process of its own; None where it fails."""
    command = [python, str(HERE / "_calls.py"), system, case]
    own = {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{HERE}"} if python == sys.executable else {}
    env = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}", **own}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=LIMIT_S, env=env)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        print(f"{case}, {system}: no result")
        return None
    return found


def measure_all() -> Found:
    """Run everything, the systems in turn."""
    pythons = {name: peer_python(PEERS[name]) if name in PEERS else sys.executable for name in SYSTEMS}
    found: Found = {case: {} for case in CASES}
    for case in CASES:
        for _ in range(ROUNDS):
            for system, python in pythons.items():
                if python is not None and (told := measure(python, system, case)) is not None:
                    found[case].setdefault(system, []).append(told)
        for system, rounds in found[case].items():
            print(f"{case}, {system}: {_medians(rounds)}", flush=True)
    return found


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(f"{median([each[name] for each in rounds]):.4g}") for name in rounds[0]}


def judge(found: Found) -> bool:
    """Print how we compare; return whether all bars are met."""
    passed = True
    for case, bars in BARS.items():
        middle = {system: _medians(rounds) for system, rounds in found[case].items()}
        ours = middle["daskfed"]
        for system, bar in bars.items():
            if system in middle:
                ratio = _ratio(ours, middle[system])
                passed &= verdict(f"{case}, {bar} x {system} / daskfed", bar / ratio, 1.0)
    for name, bar in SLEEPS.items():
        share = _medians(found["sleeps"]["daskfed"])[name]
        passed &= verdict(f"calls that sleep {name}, {bar:.0%} of two threads / daskfed", bar / share, 1.0)
    return passed


def _ratio(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Return how many times as good ours is."""
    if "calls/s" in ours:
        return ours["calls/s"] / theirs["calls/s"]
    return theirs["p50 ms"] / ours["p50 ms"]


def plot(found: Found) -> str:
    """Return a drawing (SVG) of calls per second, on a logarithmic scale."""
    from math import log10

    rows: list[tuple[str, float]] = []
    for case in ("map", "submits"):
        rows += [(f"{case}: {name}", _medians(rounds)["calls/s"]) for name, rounds in found[case].items()]
    lines = []
    for n, (name, rate) in enumerate(rows):
        y, width = 24 * n + 20, 100 * max(0.0, log10(rate) - 1)
        lines.append(f'<text x="10" y="{y + 12}">{name}</text>')
        lines.append(f'<rect x="330" y="{y}" width="{width:.0f}" height="16" fill="steelblue"/>')
        lines.append(f'<text x="{335 + width:.0f}" y="{y + 12}">{rate:,.0f} calls/s</text>')
    size = f'width="900" height="{24 * len(rows) + 40}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(lines)}</svg>\n'


def main() -> int:
    """Measure, write JSON and a plot, compare; return 1 where a bar is not met."""
    found = measure_all()
    OUT.mkdir(exist_ok=True)
    told: dict[str, Any] = {"at": time.strftime("%Y-%m-%d %H:%M"), "rounds": found}
    (OUT / "calls.json").write_text(json.dumps(told, indent=1))
    (OUT / "calls.svg").write_text(plot(found))
    print(f"written: {OUT / 'calls.json'}, {OUT / 'calls.svg'}")
    return 0 if judge(found) else 1


if __name__ == "__main__":
    sys.exit(main())
