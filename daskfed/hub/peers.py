"""Who is at the other end of a connection, as far as this machine can tell: the user whose process it is.

Of a connection within one machine Linux lists both ends, each with the user id of its process (``/proc/net/tcp``): no
process can give another one. Nothing is known so of who comes from another machine.
"""

from __future__ import annotations

import os
import pwd
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from distributed.comm.addressing import parse_host_port

from daskfed.config import is_loopback
from daskfed.keys import Authorized

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
FOREIGN = "@"
"""Begins the name of a user of whom only the machine is known."""


def own_user() -> str:
    """Return the name of the user whose process this is."""
    return _name(os.getuid())


def key_holder(comm: Any) -> Authorized | None:
    """Return who is at the other end of ``comm`` by key; None where it has shown none."""
    found = getattr(comm, "who", None)
    return found if isinstance(found, Authorized) else None


def user_at(comm: Any) -> str:
    """Return the user at the other end of ``comm``: whom its key names, of this machine by name, of another ``@host``.

    Where the system does not tell (it has no ``/proc/net``), who connects within the machine is taken for this user.
    """
    if (who := key_holder(comm)) is not None:
        return who.owner
    scheme, _, peer = str(comm.peer_address).partition("://")
    peer = peer.partition("#")[0]
    if scheme == "inproc":
        return own_user()
    local = str(comm.local_address).partition("://")[2]
    host = parse_host_port(peer, 0)[0]
    uid = user_id_of(_end(peer), _end(local))
    if uid is not None:
        return _name(uid)
    return own_user() if is_loopback(host) else f"{FOREIGN}{host}"


def user_id_of(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """Return the user id of the socket from ``local`` to ``remote`` (host, port) on this machine; None for no such."""
    for table in TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, ours, theirs, _, _, _, _, uid, *_ = line.split()
            if _parsed(ours) == local and _parsed(theirs) == remote:
                return int(uid)
    return None


def _end(address: str) -> tuple[str, int]:
    host, port = parse_host_port(address, 0)
    return _plain(ip_address(host)), int(port)


def _parsed(entry: str) -> tuple[str, int]:
    """Return host and port of an entry such as ``0100007F:1F90``, whose words are in this machine's byte order."""
    host, port = entry.split(":")
    packed = b"".join(_words(host))
    return _plain(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)), int(port, 16)


def _words(host: str) -> Iterator[bytes]:
    return (struct.pack("=I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8))


def _plain(address: IPv4Address | IPv6Address) -> str:
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a user without a name
        return str(uid)
