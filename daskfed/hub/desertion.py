"""Sites that have lost all their workers, and have got none since: their blocks go elsewhere. Pure.

A cluster brings lost workers back, or starts its first ones for the work that waits for them. Where that does not come
about in time, the site is *deserted*: what it was to do is given to sites that have workers, and it gets nothing more
while there are such, until it has workers again or was left alone for some minutes. What no other site may do waits.
"""

from __future__ import annotations

from daskfed.hub.dispatch import AT_ONCE, Dispatcher, SiteState
from daskfed.hub.ledger import Ledger

PATIENCE_S = 30.0  # without workers, beside twice the time that the site says new ones take
REST_S = 300.0  # until a deserted site is given work once more


class Desertion:
    """Finds such sites, and takes their blocks back."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher) -> None:
        self.ledger = ledger
        self.dispatcher = dispatcher

    def tick(self) -> None:
        """See which sites are deserted now."""
        for site in self.dispatcher.sites.values():
            self._look_at(site)
            if site.deserted:
                self._take_back(site)

    def _look_at(self, site: SiteState) -> None:
        now, since = self.ledger.now, site.empty_since
        if site.status is None or site.status.workers or (since is None and not site.blocks):
            site.empty_since, site.deserted = None, False
        elif since is None or (site.deserted and now - since > REST_S):
            site.empty_since, site.deserted = now, False
        elif now - since > patience_s(site):
            site.deserted = True

    def _take_back(self, site: SiteState) -> None:
        for name in list(site.blocks):
            block = self.ledger.blocks[name]
            others = self.dispatcher.eligible(block.spec.constraint)
            if block.spec.kind not in AT_ONCE and any(map(has_workers, others)):
                self.ledger.take_back(block)
        self.dispatcher.update()


def patience_s(site: SiteState) -> float:
    """Return how many seconds a site may be without workers before its blocks go elsewhere."""
    if site.status is None:
        return PATIENCE_S
    cold_start_s = max((seconds for _, seconds in site.status.cold_start_s), default=0.0)
    return PATIENCE_S + 2 * (site.status.queue_wait_s + cold_start_s)


def has_workers(site: SiteState) -> bool:
    """Say whether a site has workers and takes blocks."""
    return site.status is not None and site.status.workers > 0 and not site.draining
