"""``daskfed up`` of a profile with four local sites, to its first result, against starting one stock LocalCluster.

Both from the shell: a command that starts it, then a script that connects and submits one call. Each site has one
worker, the LocalCluster four. The bar: at most 1.5 x the LocalCluster + 3 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import DASKFED, median, verdict

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 3
SITES = 4
PROFILE = """\
daskfed:
  default-profile: four
  state: {folder}/state
  keys: {folder}/keys
  profiles:
    four:
      sites:
"""
SITE = "        site{number}: {{options: {{n_workers: 1, threads_per_worker: 1, dashboard_address: ':0'}}}}\n"
OURS = """
from daskfed import Client
print(Client().submit(sum, [20, 22]).result())
"""
STOCK = f"""
from distributed import Client, LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers={SITES}, threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        print(client.submit(sum, [20, 22]).result(), flush=True)
"""


def up_s(folder: Path) -> float:
    """Return seconds from ``daskfed up`` to the first result."""
    sites = "".join(SITE.format(number=number) for number in range(SITES))
    (folder / "daskfed.yaml").write_text(PROFILE.format(folder=folder) + sites)
    environment = {**os.environ, "DASK_CONFIG": str(folder)}
    began = time.perf_counter()
    try:
        subprocess.run([*DASKFED, "up"], env=environment, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([sys.executable, "-c", OURS], env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began
    finally:
        subprocess.run([*DASKFED, "down"], env=environment, check=True, stdout=subprocess.DEVNULL)


def stock_s(folder: Path) -> float:
    """Return seconds from the start of a script with a LocalCluster to the first result."""
    (folder / "stock.py").write_text(STOCK)
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, str(folder / "stock.py")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"42\n"
        return time.perf_counter() - began


def main() -> int:
    """Print both, and say whether the bar is met."""
    ours, stock = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(up_s(Path(folder)))
            stock.append(stock_s(Path(folder)))
    bar = 1.5 * median(stock) + 3
    print(f"daskfed up, four sites: {median(ours):.2f} s; one LocalCluster: {median(stock):.2f} s; medians of {ROUNDS}")
    return 0 if verdict(f"seconds, of a bar of {bar:.2f}", median(ours) / bar, 1.0) else 1


if __name__ == "__main__":
    sys.exit(main())
