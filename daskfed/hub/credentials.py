"""What a key lets its holder do at the hub: ops by role, a site speaks for itself, and gets what is its owner's.

Connections without keys (``tcp://``, ``tls://``, loopback) may do what they could do ever since: who is at the other
end is a user of this machine, or has a certificate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from distributed.core import Status

from daskfed.hub.keytable import KeyState
from daskfed.hub.peers import key_holder
from daskfed.keys import Authorized, Role
from daskfed.messages import Key, SiteHello

ENROL = "enrol"  # the one op that a token is for
SITES = (
    ENROL, "register-site", "park-channel", "relay-fetch", "forward", "announce-keys", "bring-keys", "actor-answer",
    "site-address",
)  # fmt: skip
OF_OTHERS = ("relay-fetch", "site-address")  # these name another site
STREAMS: dict[str, Callable[[str], Any]] = {  # ops that are answered by what is written, and how they are refused
    "register-client": lambda why: [{"op": "stream-start", "error": why}],
    "register-site": lambda why: {"status": "error", "reason": why},
    "park-channel": lambda why: {"status": "error", "reason": why},
    "relay-fetch": lambda why: {"end": True, "error": why},
}
ANYBODYS = ("identity", "echo", "fed_sites")  # whatever a key is for


class Credentials:
    """Who holds which key, and what that allows; ``sites`` and ``keys`` are those that the hub knows of."""

    def __init__(self, sites: Collection[str], keys: Mapping[Key, KeyState]) -> None:
        self._connected = sites
        self._keys = keys
        self._sites: dict[str, bytes] = {}  # site -> public key that it joined with

    def joins(self, comm: Any, hello: SiteHello) -> SiteHello:
        """Return a site's hello with whom it serves; raises ValueError where the site's name is another's."""
        who = key_holder(comm)
        if who is None:
            return hello
        if hello.site in self._connected and self._sites.get(hello.site) != who.public:
            raise ValueError(f"{hello.site!r} is the name of a site with another key: give this one another name")
        self._sites[hello.site] = who.public
        return replace(hello, serves=who.serves)

    def guarded(self, op: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Have a handler refuse whose key does not allow what it asks."""
        with_comm = next(iter(inspect.signature(handler).parameters), None) == "comm"

        async def serve(comm: Any = None, **kwargs: Any) -> Any:  # a site in this process calls without one
            if (who := key_holder(comm)) is not None:
                try:
                    self.check(who, op, kwargs)
                except PermissionError as exc:
                    if op not in STREAMS:
                        raise
                    await comm.write(STREAMS[op](str(exc)))
                    return Status.dont_reply
            result = handler(*((comm,) if with_comm else ()), **kwargs)
            return await result if inspect.isawaitable(result) else result

        serve.__name__ = getattr(handler, "__name__", op)
        return serve

    def check(self, who: Authorized, op: str, kwargs: Mapping[str, Any]) -> None:
        """Raise PermissionError where a key does not allow an op, or that its holder speaks for this site."""
        if Role.JOIN in who.roles and op != ENROL and not (op == "identity" and kwargs.get("n_workers") == 0):
            raise PermissionError(f"the key of a token is for joining, not for {op!r}")
        role = Role.SITE if op in SITES else Role.CLIENT
        allowed = who.may(role) or (op == ENROL and Role.JOIN in who.roles)
        if op not in ANYBODYS and not allowed:
            roles = " and ".join(sorted(who.roles))
            raise PermissionError(f"the key of {who.owner!r} is let in as {roles}, and {op!r} is for a {role}")
        if role is not Role.SITE or Role.ADMIN in who.roles:
            return
        site = kwargs.get("site")
        if site is not None and op not in OF_OTHERS and self._sites.get(site) != who.public:
            raise PermissionError(f"the key of {who.owner!r} does not speak for site {site!r}")
        if op in ("relay-fetch", "bring-keys"):
            self._check_fetch(who, kwargs.get("keys", ()))

    def _check_fetch(self, who: Authorized, keys: Iterable[Key]) -> None:
        owners = {state.owner for key in keys if (state := self._keys.get(key)) is not None}
        if who.serves and (others := owners.difference(who.serves, ("",))):
            raise PermissionError(f"the key of {who.owner!r} does not let a site have what is {sorted(others)[0]!r}'s")


def may_have_all_of(who: Authorized | None, serves: Collection[str]) -> bool:
    """Whether a site with this key serves everybody whom another one ``serves``; of that, nobody means everybody."""
    if who is None or Role.ADMIN in who.roles or not who.serves:
        return True
    return bool(serves) and set(serves) <= set(who.serves)


def is_admin(comm: Any) -> bool:
    """Whether the key at the other end, if it has one, is an admin's."""
    who = key_holder(comm)
    return who is not None and Role.ADMIN in who.roles
