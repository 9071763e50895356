"""Tasks that kill workers or whole sites: they are found, and given up; what ran beside them is not. Pure.

When a site dies, every output that was being made there is suspect. When a site's scheduler gives a task up because
too many workers died while they ran it, the outputs that fail with it are suspect: it may only have been beside the
culprit. Of a block with suspects, the other outputs are made first. Then the suspects are tried, those with the fewest
deaths first, in ever smaller groups, and one such trial at a time at each site: so the culprit is alone in the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from daskfed.messages import Key

ALLOWED_DEATHS = 3  # of an output, over the whole federation; as distributed.scheduler.allowed-failures at one site
GIVEN_UP = ALLOWED_DEATHS + 1  # what it counts when a site's scheduler gave up a task: so many workers died at least
SUSPECT_FROM = 2  # deaths; sites die for many reasons, and after one death everything simply runs again
SHRINK = 8  # each trial asks for so many times fewer outputs than the one before


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What speaks against an output."""

    deaths: int  # of sites and workers while it was being made
    blame: Key | None = None  # the task that a site's scheduler blamed for the last of them

    def more(self, deaths: int, blame: Key | None = None) -> Suspicion:
        """Return the suspicion after more deaths, or fewer where they are negative."""
        return Suspicion(self.deaths + deaths, blame if blame is not None else self.blame)


Suspects = Mapping[Key, Suspicion]


def is_suspect(suspects: Suspects, key: Key) -> bool:
    """Whether an output is to be tried apart from others."""
    return key in suspects and suspects[key].deaths >= SUSPECT_FROM


def on_trial(suspects: Suspects, pending: Collection[Key]) -> bool:
    """Whether all that is to be made is suspect: then it runs apart from the suspects of other blocks."""
    return bool(pending) and all(is_suspect(suspects, key) for key in pending)


def choose(suspects: Suspects, pending: Sequence[Key], noutputs: int) -> tuple[Key, ...]:
    """Return which of the outputs that are to be made the next attempt asks for; ``noutputs``: of the whole block."""
    if not on_trial(suspects, pending):
        return tuple(key for key in pending if not is_suspect(suspects, key))
    fewest = min(suspects[key].deaths for key in pending)
    group = [key for key in pending if suspects[key].deaths == fewest]
    return tuple(group[: max(1, noutputs // SHRINK ** (fewest - 1))])


def is_convicted(suspicion: Suspicion, alone: bool) -> bool:
    """Whether an output is to be given up; ``alone``: it was the only one that was tried."""
    return alone and suspicion.deaths > ALLOWED_DEATHS
