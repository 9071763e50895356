"""Network namespaces for tests: sites that see only themselves and the hub, and may have the same addresses inside."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

HUB = "10.79.0.254"  # where the hub listens, inside its namespace


def ip(*arguments: str) -> None:
    """Call ``ip``; raises CalledProcessError where it refuses."""
    subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True)


def inside(namespace: str) -> tuple[str, ...]:
    """Return what a command has to begin with to run inside a namespace."""
    return ("nsenter", f"--net=/run/netns/{namespace}")


def why_not() -> str:
    """Return why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"dfprobe{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", probe)
        ip("netns", "del", probe)
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"network namespaces cannot be made: {getattr(exc, 'stderr', exc)}"
    return ""


@contextmanager
def star(*sites: str) -> Iterator[dict[str, str]]:
    """Yield the namespaces of a hub, at :data:`HUB`, and of sites that are joined with it: name -> namespace."""
    tag = uuid.uuid4().hex[:6]
    names = {name: f"df{tag}{name}" for name in ("hub", *sites)}
    made = []
    try:
        for namespace in names.values():
            ip("netns", "add", namespace)
            made.append(namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        hub = names["hub"]
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{HUB}/24", "dev", "br0")
        ip("-n", hub, "link", "set", "br0", "up")
        for number, site in enumerate(sites, 1):
            ip("link", "add", "eth0", "netns", names[site], "type", "veth", "peer", "name", f"v{number}", "netns", hub)
            ip("-n", names[site], "addr", "add", f"10.79.0.{number}/24", "dev", "eth0")
            ip("-n", names[site], "link", "set", "eth0", "up")
            ip("-n", hub, "link", "set", f"v{number}", "master", "br0", "up")
        yield names
    finally:
        for namespace in made:
            ip("netns", "del", namespace)
