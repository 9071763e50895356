"""Tokens: a site joins with one, once, and is told by the hub what it is.

A token has the hub's address and public key, and a key of its own that the hub lets in for one thing only: to have
another key let in, that of the site. What the site is told lies beside the hub's keys until then.
"""

from __future__ import annotations

import base64
import binascii
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from daskfed.errors import ConfigurationError, KeyFileError
from daskfed.keys import SECRET, Authorized, GivenKeys, KeyFolder, KeyPair, Role, pair_of, parsed, written

MARK = "join-"
VALID_S = 24 * 3600.0
INVITATIONS = "invitations"


@dataclass(frozen=True, slots=True)
class Token:
    """What lets one site join one hub."""

    hub: str  # address
    hub_key: bytes
    pair: KeyPair

    def text(self) -> str:
        """Return it as the user hands it over."""
        told = [self.hub, written(self.hub_key), written(self.pair.secret, SECRET)]
        return MARK + base64.urlsafe_b64encode(json.dumps(told).encode()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> Token:
        """Return the token that a text is; raises ConfigurationError, which does not repeat it."""
        text = text.strip()
        with suppress(ValueError, TypeError, binascii.Error, ConfigurationError):
            body = text.removeprefix(MARK)
            hub, key, secret = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            if text.startswith(MARK):
                return cls(hub, parsed(key), pair_of(parsed(secret, SECRET)))
        raise ConfigurationError(f"this is no token, which begins with {MARK}; was a part of it lost in copying?")

    @property
    def keys(self) -> GivenKeys:
        """The keys to connect with."""
        return GivenKeys(self.hub_key, self.pair)


def invite(site: str, told: dict[str, Any], hub: str, owner: str, valid_s: float = VALID_S) -> Token:
    """Return a token for a site of this user's hub; earlier ones for the same site are of no use any more.

    ``told`` is what the site is started with, as written in a profile.
    """
    folder, pair = KeyFolder(), KeyPair.new()
    hub_key = folder.ensured("hub").public
    _take_back(folder, site, owner, hub)
    file = _invitation(folder, pair.public)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.touch(0o600)
    file.write_text(json.dumps({"hub": hub, "options": told}))
    expires = datetime.now(UTC) + timedelta(seconds=valid_s)
    folder.authorize(Authorized(pair.public, frozenset({Role.JOIN}), owner, expires, site=site))
    return Token(hub, hub_key, pair)


def enrolled(folder: KeyFolder, token: bytes, public: bytes) -> dict[str, Any]:
    """Let in a key in place of a token; return what its site is told. Raises KeyFileError where that is too late."""
    told = _told(folder, token)
    if told is None and token in folder.authorized():
        raise KeyFileError("what this token's site is told is here no more: ask for a new one")
    used = folder.enrol(token, public)
    _invitation(folder, token).unlink(missing_ok=True)
    assert told is not None  # else there was no such token
    return {"site": used.site, "options": told["options"]}


def _take_back(folder: KeyFolder, site: str, owner: str, hub: str) -> None:
    """Have earlier tokens for a site of this hub be of no use, and forget what belongs to none."""
    entries = folder.authorized()
    for token, entry in entries.items():
        same = (entry.site, entry.owner, (_told(folder, token) or {}).get("hub")) == (site, owner, hub)
        if Role.JOIN in entry.roles and same:
            with suppress(KeyFileError):  # it was used meanwhile
                folder.revoke(written(token))
    known = {written(token) for token in folder.authorized()}
    for file in (folder.path / INVITATIONS).glob("*"):
        if file.name not in known:
            file.unlink(missing_ok=True)


def _told(folder: KeyFolder, token: bytes) -> dict[str, Any] | None:
    """Return what was written down with a token; None where that cannot be read."""
    try:
        told: dict[str, Any] = json.loads(_invitation(folder, token).read_text())
    except (OSError, ValueError):
        return None
    return told


def _invitation(folder: KeyFolder, token: bytes) -> Path:
    return folder.path / INVITATIONS / written(token)
