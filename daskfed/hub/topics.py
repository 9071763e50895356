"""Events by topic, each owner's apart: nobody reads or receives what the tasks and clients of another owner log.

They are kept by distributed's own ``Broker``, one for each owner, and not journalled. Whose an event is::

    a client's          its owner's
    a task's            the owner's of the task; the site names the nearest key above it that the hub knows
    anything else's     the owner's of all clients, where they have but one; else nobody's
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import dask

from daskfed.dask_private import Broker
from daskfed.messages import Key

if TYPE_CHECKING:
    from daskfed.hub.extensions import SchedulerView

logger = logging.getLogger(__name__)


class TopicsHost(Protocol):
    """What topics need of the hub."""

    def owner_of(self, client: str) -> str:
        """Return the owner for whom a connected client acts."""
        ...

    def owner_calling(self) -> str:
        """Return for whom the call is that is being served."""
        ...

    def owner_at(self, site: str, key: Key | None) -> str | None:
        """Return whose task made an event at a site; ``key`` is the task's or that of one above it, if known."""
        ...

    def origin(self, site: str, worker: str) -> Mapping[str, str]:
        """Return what an event's message is to say of where it came from: ``worker``, and ``site`` if there are more.

        ``worker`` is the address that the site knows.
        """
        ...


class Topics:
    """All topics of a federation, and the ops by which clients and sites reach them."""

    def __init__(self, view: SchedulerView) -> None:
        self.host: TopicsHost = view.host
        length = dask.config.get("distributed.admin.low-level-log-length")
        self.brokers: defaultdict[str, Any] = defaultdict(lambda: Broker(length, view))  # by owner
        view.handlers.update({"log_event": self.log_event, "events": self.get_events})
        view.stream_handlers.update({"subscribe-topic": self.subscribe, "unsubscribe-topic": self.unsubscribe})

    def log_event(self, topic: str | Collection[str], msg: Any) -> None:
        """Publish a client's ``msg`` under one topic or several."""
        self.brokers[self.host.owner_calling()].publish(topic, msg)

    def get_events(self, topic: str | None = None) -> Any:
        """Return the owner's latest events of ``topic``, or of all, as (time, message)."""
        return self.brokers[self.host.owner_calling()].get_events(topic)

    def subscribe(self, topic: str, client: str) -> None:
        """Send ``client`` each event of its owner's ``topic`` from now on."""
        self.brokers[self.host.owner_of(client)].subscribe(topic, client)

    def unsubscribe(self, topic: str, client: str) -> None:
        """Send ``client`` no more events of ``topic``."""
        self.brokers[self.host.owner_of(client)].unsubscribe(topic, client)

    def unsubscribe_all(self, client: str) -> None:
        """Send ``client`` no more events."""
        for broker in self.brokers.values():
            for topic in broker._topics.values():
                topic.unsubscribe(client)

    def from_site(self, site: str, topic: str | Collection[str], msg: Any, task: Key | None = None) -> None:
        """Publish what was logged at a site, by ``task`` or by nobody knows whom; says from where it came."""
        owner = self.host.owner_at(site, task)
        if owner is None:
            logger.info("nobody hears an event of site %s: no task of a known owner logged it", site)
            return
        if isinstance(msg, dict) and isinstance(msg.get("worker"), str):
            msg = {**msg, **self.host.origin(site, msg["worker"])}
        self.brokers[owner].publish(topic, msg)

    def publish_to_all(self, topic: str | Collection[str], msg: Any) -> None:
        """Publish what the hub itself has to say to every owner."""
        for broker in self.brokers.values():
            broker.publish(topic, msg)
