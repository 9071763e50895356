"""What tasks of benchmarks run; workers import it."""

from __future__ import annotations


def leaf(number: int) -> float:
    """Return a number after a little work."""
    return float(sum(range(number % 100)))


def combine(numbers: list[float]) -> float:
    """Return the mean."""
    return sum(numbers) / len(numbers)


def large(number: int) -> bytes:
    """Return a megabyte that compresses to little, distinct for each ``number``."""
    return number.to_bytes(8, "big") * 125_000
