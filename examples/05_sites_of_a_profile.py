"""Measure at every site of a profile, and bring the measurements together: the sites are named once, not in the script.

Each site makes its own field of numbers, which stays there; then the mean over all sites is taken away from each field,
and what is left is squared and summed. Only the means travel. The result is checked against the same on this machine.

    python examples/05_sites_of_a_profile.py                     two sites on this machine, as a profile of its own
    python examples/05_sites_of_a_profile.py --profile climate   your sites, however far (docs/profiles.md)
    daskfed up climate                                           … which may run already

``--pause`` has each piece of a field take so many seconds more, so that there is time to pull a cable.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import dask
import dask.array as da
import numpy as np

from daskfed import Client, at

SIZE, PIECES = 1_000_000, 8  # numbers, and pieces, of a field
WORKER = {"options": {"n_workers": 1, "threads_per_worker": 1}}
OWN = {"here": {"sites": {"north": WORKER, "south": WORKER}}}


def measure(piece: Any, pause: float) -> Any:
    """Return what a piece is measured to be; that may take its time."""
    time.sleep(pause)
    return np.sin(piece * 1e-3) + piece % 7


def field(number: int, pause: float) -> Any:
    """Return a field that differs from site to site, as a lazy array."""
    start = number * SIZE
    return da.arange(start, start + SIZE, chunks=SIZE // PIECES).map_blocks(measure, pause, dtype=float)


def spread(fields: list[Any]) -> Any:
    """Return how far the fields are from their common mean, squared and summed over all of them."""
    mean = sum(each.mean() for each in fields) / len(fields)
    return sum(((each - mean) ** 2).sum() for each in fields)


def main() -> None:
    """Compute it at all sites of a profile, and here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="its name; by default one of two sites on this machine")
    parser.add_argument("--sites", type=int, default=0, help="wait for so many sites")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds more for each piece")
    args = parser.parse_args()
    own = {} if args.profile else {"daskfed.profiles": OWN}
    with dask.config.set(own), Client(profile=args.profile or "here") as client:
        while len(client.sites()) < args.sites:
            time.sleep(0.1)
        fields = []
        for number, site in enumerate(sorted(client.sites())):
            with at(site):
                fields.append(field(number, args.pause))
        began = time.monotonic()
        result = spread(fields).compute()
        took = time.monotonic() - began
        sites = client.sites()
        moved = sum(facts["nbytes"] for facts in client.transfers().values())

    print(f"{len(fields)} sites: {', '.join(sorted(sites))}; {took:.1f} s, {moved / 1e3:.1f} kB between them")
    here = spread([field(number, 0.0) for number in range(len(fields))]).compute(scheduler="threads")
    assert np.isclose(result, here, rtol=1e-12), (result, here)
    print(f"spread {result:.6g}, the same as on this machine: yes")


if __name__ == "__main__":
    main()
