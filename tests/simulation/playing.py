"""One history in a process of a pool."""

from __future__ import annotations

from tests.simulation.federation import Broken, Result, Simulation


def play(seed: int) -> Result | str:
    """Return what a history went through, or how it broke a rule."""
    try:
        return Simulation(seed).run()
    except Broken as broken:
        return str(broken)
