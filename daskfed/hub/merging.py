"""One answer from the answers of several sites, for what :mod:`.observing` asks of them. Pure."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from daskfed.messages import Key

Series = Sequence[tuple[float, int]]
"""Samples of memory: (seconds since the epoch, bytes)."""


def merge_task_streams(
    by_site: Mapping[str, Iterable[Mapping[str, Any]]], shown: Callable[[str, str], str]
) -> list[dict[str, Any]]:
    """Return the records of all sites in the order in which the tasks ended, with workers as they are ``shown``."""
    records = [
        {**record, "worker": shown(site, record["worker"])} for site, stream in by_site.items() for record in stream
    ]
    return sorted(records, key=lambda record: max(each["stop"] for each in record["startstops"]))


def first_or_last(records: list[dict[str, Any]], count: int | None, *, first: bool) -> list[dict[str, Any]]:
    """Return ``count`` of the records, the first ones or the last ones; all where ``count`` is None."""
    if count is None:
        return records
    return records[:count] if first else records[max(0, len(records) - count) :]


def merge_task_metadata(replies: Iterable[Mapping[str, Mapping[Key, Any]]]) -> dict[str, dict[Key, Any]]:
    """Return ``metadata`` and ``state`` of all keys; of one that was also imported elsewhere, where it was made.

    An import has no metadata, and fails only where the key had failed already.
    """
    metadata: dict[Key, Any] = {}
    state: dict[Key, Any] = {}
    for reply in replies:
        for key, facts in reply["metadata"].items():
            metadata[key] = facts or metadata.get(key, facts)
        state.update(reply["state"])
    return {"metadata": metadata, "state": state}


def merge_stories(
    schedulers: Mapping[str, Any], workers: Mapping[str, Any], shown: Callable[[str, str], str], *, alone: bool
) -> list[tuple[str, *tuple[Any, ...]]]:
    """Return the stories of schedulers and workers as one list; each entry begins with who tells it.

    A site that raised (an exception in place of its reply) is left out.
    """
    found: list[tuple[str, *tuple[Any, ...]]] = []
    for site, entries in schedulers.items():
        who = "scheduler" if alone else f"scheduler at {site}"
        found += [(who, *entry) for entry in entries] if not isinstance(entries, BaseException) else []
    for site, by_worker in workers.items():
        if not isinstance(by_worker, BaseException):
            found += [(shown(site, worker), *entry) for worker, told in by_worker.items() for entry in told]
    return found


def merge_benchmarks(replies: Iterable[tuple[Mapping[str, Mapping[str, float]], int]]) -> dict[str, dict[str, float]]:
    """Return kind -> size -> mean over workers, from the means of sites and how many workers each has."""
    totals: dict[str, dict[str, float]] = {"disk": {}, "memory": {}, "network": {}}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for reply, workers in replies:
        for kind, by_size in reply.items():
            for size, value in by_size.items():
                totals[kind][size] = totals[kind].get(size, 0.0) + value * max(1, workers)
                counts[kind, size] += max(1, workers)
    return {
        kind: {size: total / counts[kind, size] for size, total in by_size.items()} for kind, by_size in totals.items()
    }


def add_series(series: Iterable[Series], started_at: float) -> list[tuple[float, int]]:
    """Return one series whose values are the sums of those of several, each of which keeps its value until its next.

    All began at ``started_at``, in seconds: sites' clocks may differ, so each series counts from its first sample.
    """
    changes: list[tuple[float, int, int]] = []  # when, which series, its new value
    for n, samples in enumerate(series):
        changes += [(started_at + at - samples[0][0], n, nbytes) for at, nbytes in samples]
    current: dict[int, int] = {}
    found: dict[float, int] = {}
    for at, n, nbytes in sorted(changes):
        current[n] = nbytes
        found[at] = sum(current.values())
    return list(found.items())


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Dask Performance Report</title><style>
body {{ margin: 0; font-family: sans-serif }} nav {{ padding: 0.5em 1em; background: #eee }}
nav a {{ margin-right: 1em }} section {{ height: 95vh }} iframe {{ width: 100%; height: 90vh; border: 0 }}
h2 {{ margin: 0.5em 1em }} p {{ margin: 1em }}
</style></head><body>
<nav><b>Dask Performance Report of {count} sites:</b> {links}</nav>
{sections}
</body></html>
"""
_FRAME = '<iframe sandbox="allow-scripts allow-downloads" title="{site}" srcdoc="{report}"></iframe>'
_SECTION = '<section id="site-{n}"><h2>{site}</h2>\n{body}\n</section>'


def page_of_reports(replies: Mapping[str, Any]) -> str:
    """Return an HTML page with a section for each site: the page that it made, or in words why it made none.

    The pages of sites run their scripts in frames, which reach neither each other nor this page.
    """
    sections, links = [], []
    for n, (name, reply) in enumerate(sorted(replies.items())):
        site = html.escape(name)
        if isinstance(reply, BaseException):
            body = f"<p>This site made no report: {html.escape(str(reply))}</p>"
        else:
            body = _FRAME.format(site=site, report=html.escape(str(reply)))
        sections.append(_SECTION.format(n=n, site=site, body=body))
        links.append(f'<a href="#site-{n}">{site}</a>')
    return _PAGE.format(count=len(replies), links=" ".join(links), sections="\n".join(sections))
