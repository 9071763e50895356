"""The hub's page: which sites there are, how they do, and where each one's own dashboard is.

It is a small one by the hub itself, served by tornado as Dask's dashboards are. JupyterLab's Dask extension finds on it
what it asks of any dashboard (``individual-plots.json``). The hub dials nobody, so it links the sites' dashboards and
fetches nothing from them.

It listens where only this machine can reach it, unless ``daskfed.hub.dashboard-address`` says otherwise.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import dask
from dask.utils import format_bytes
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.template import Template
from tornado.web import Application, HTTPError, RequestHandler

from daskfed.dask_private import format_dashboard_link
from daskfed.errors import ConfigurationError

logger = logging.getLogger(__name__)

Sites = Mapping[str, Mapping[str, Any]]
"""Name -> what ``client.sites()`` shows."""

LOOPBACK = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
COLUMNS = ("status", "workers", "threads", "running", "queued", "blocks")

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>Dask: {{ hub }}</title><style>
body { font-family: sans-serif; margin: 1em } table { border-collapse: collapse }
td, th { border-bottom: 1px solid #ccc; padding: 0.3em 0.8em; text-align: left }
</style></head><body>
<h1>Sites</h1><p>Hub at {{ hub }}</p>
{% if rows %}<table><tr>{% for name in columns %}<th>{{ name }}</th>{% end %}</tr>
{% for row, link in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% end %}
<td>{% if link %}<a href="{{ link }}">{{ link }}</a>{% else %}none{% end %}</td></tr>
{% end %}</table>{% else %}<p>No site has joined.</p>{% end %}
</body></html>
""",
    autoescape="xhtml_escape",
)


class Dashboard:
    """Serves the page of a hub; ``sites`` tells of its sites, ``address`` is where the hub listens.

    Raises ConfigurationError where the configuration says no address to listen on.
    """

    def __init__(self, sites: Callable[[], Sites], address: Callable[[], str]) -> None:
        self.sites = sites
        self.address = address
        self._server: HTTPServer | None = None
        self._host, self._port = listen_on(dask.config.get("daskfed.hub.dashboard-address", None))

    def start(self) -> None:
        """Listen; where that cannot be, say so in the log and do without."""
        routes: list[Any] = [
            (r"/(?:status)?", _Page, {"dashboard": self}),
            (r"/individual-sites", _Page, {"dashboard": self}),
            (r"/individual-site/(.+)", _SiteLink, {"dashboard": self}),
            (r"/individual-plots.json", _Plots, {"dashboard": self}),
        ]
        try:
            sockets = bind_sockets(self._port, self._host)
            self._server = HTTPServer(Application(routes), ssl_options=tls())
        except OSError as exc:
            where = f"{self._host}:{self._port}"
            logger.warning("no page for the hub at %s (daskfed.hub.dashboard-address): %s", where, exc)
            return
        self._server.add_sockets(sockets)
        self._port = sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def services(self) -> dict[str, int]:
        """Return what a scheduler says of its dashboard in its ``identity``."""
        return {"dashboard": self._port} if self._server is not None else {}

    @property
    def link(self) -> str:
        """URL of the page; empty where there is none."""
        host = self._host if self._host not in ("", "0.0.0.0", "::") else "localhost"
        return str(format_dashboard_link(host, self._port)) if self._server is not None else ""


class _Handler(RequestHandler):
    dashboard: Dashboard

    def initialize(self, dashboard: Dashboard) -> None:
        """Know the dashboard."""
        self.dashboard = dashboard

    def set_default_headers(self) -> None:
        """Allow the page no scripts, and nothing from elsewhere."""
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Keep what browsers ask for in vain out of the log."""
        if not isinstance(value, HTTPError):
            super().log_exception(typ, value, tb)


class _Page(_Handler):
    def get(self) -> None:
        self.finish(page(self.dashboard.address(), self.dashboard.sites()))


class _Plots(_Handler):
    def get(self) -> None:
        self.finish(individual_plots(self.dashboard.sites()))


class _SiteLink(_Handler):
    def get(self, site: str) -> None:
        facts = self.dashboard.sites().get(site)
        link = safe_link(facts["dashboard"]) if facts is not None else ""
        if not link:
            raise HTTPError(404, reason="No such site, or it has no dashboard")
        self.redirect(link)


def page(hub: str, sites: Sites) -> bytes:
    """Return the page as HTML; everything that sites say of themselves is escaped."""
    rows = [(_row(name, facts), safe_link(facts["dashboard"])) for name, facts in sorted(sites.items())]
    columns = ("site", *COLUMNS, "memory", "held", "labels", "dashboard")
    return _PAGE.generate(hub=hub, rows=rows, columns=columns)  # type: ignore[no-any-return]


def _row(name: str, facts: Mapping[str, Any]) -> list[str]:
    memory = f"{format_bytes(facts['memory_used'])} of {format_bytes(facts['memory_limit'])}"
    labels = ", ".join(f"{label}={value}" for label, value in facts["labels"].items())
    return [name, *(str(facts[column]) for column in COLUMNS), memory, format_bytes(facts["held"]), labels]


def individual_plots(sites: Sites) -> dict[str, str]:
    """Return title -> path of what JupyterLab's Dask extension offers: this page, and each site's own dashboard."""
    linked = [name for name, facts in sites.items() if safe_link(facts["dashboard"])]
    return {"Sites": "/individual-sites", **{f"Site {name}": f"/individual-site/{quote(name)}" for name in linked}}


def safe_link(url: Any) -> str:
    """Return a site's URL if it is one of a web page, else an empty string: a site may say anything."""
    try:
        parts = urlsplit(str(url))
        safe = parts.scheme in ("http", "https") and bool(parts.hostname) and str(url).isprintable()
    except ValueError:
        return ""
    return str(url) if safe else ""


def listen_on(setting: Any) -> tuple[str, int]:
    """Return host and port to listen on, from ``host:port``, ``:port`` or a port; by default any of this machine only.

    Raises ConfigurationError for anything else.
    """
    host, _, port = str("" if setting is None else setting).rpartition(":")
    try:
        return host.strip("[]") or LOOPBACK, int(port or 0)
    except ValueError:
        problem = f"daskfed.hub.dashboard-address is {setting!r}: give it as host:port, :port, or a port"
        raise ConfigurationError(problem) from None


def tls() -> ssl.SSLContext | None:
    """Return what ``distributed.scheduler.dashboard.tls`` asks for, as for any dashboard of Dask's."""
    settings = dask.config.get("distributed.scheduler.dashboard.tls")
    if not settings["cert"]:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings["ca-file"])
    context.load_cert_chain(settings["cert"], keyfile=settings["key"])
    return context
