"""Tokens: what they carry, and that each is of use once, for a while, to one site."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dask
import pytest

from daskfed.errors import ConfigurationError, KeyFileError
from daskfed.keys import Authorized, KeyFolder, KeyPair, Role, written
from daskfed.reach.tokens import INVITATIONS, Token, enrolled, invite

HUB = "zmq://hub.example.org:8700"
TOLD = {"reach": "waiting", "options": {"cores": 4, "password": "s3cret"}}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[KeyFolder]:
    with dask.config.set({"daskfed.keys": str(tmp_path)}):
        yield KeyFolder()


def test_it_carries_where_the_hub_is_and_how_it_is_known(folder: KeyFolder) -> None:
    token = Token.read(f" {invite('cloud', TOLD, HUB, 'ann').text()}\n")
    assert token.hub == HUB
    assert token.hub_key == folder.ensured("hub").public
    assert token.keys.own("id") == token.pair
    assert token.keys.hub_at("zmq://anywhere:1") == token.hub_key


@pytest.mark.parametrize("text", ["", "join-", "join-abc", "join-e30", "tok-WzEsMiwzXQ", "join-WyJhIiwgImIiLCAiYyJd"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="this is no token") as failed:
        Token.read(text)
    assert len(text) < 6 or text not in str(failed.value)


def test_it_lets_another_key_in_once(folder: KeyFolder) -> None:
    token, own = invite("cloud", TOLD, HUB, "ann"), KeyPair.new().public
    assert enrolled(folder, token.pair.public, own) == {"site": "cloud", "options": TOLD}
    assert folder.authorized() == {own: Authorized(own, frozenset({Role.SITE}), "ann")}
    with pytest.raises(KeyFileError, match="was used or taken back, or has expired"):
        enrolled(folder, token.pair.public, KeyPair.new().public)
    assert list(folder.authorized()) == [own]


def test_it_expires(folder: KeyFolder) -> None:
    token = invite("cloud", TOLD, HUB, "ann", valid_s=-1)
    with pytest.raises(KeyFileError, match="has expired"):
        enrolled(folder, token.pair.public, KeyPair.new().public)


def test_a_new_one_takes_the_place_of_that_before(folder: KeyFolder) -> None:
    before = invite("cloud", TOLD, HUB, "ann")
    others = [invite("lab", TOLD, HUB, "ann"), invite("cloud", TOLD, "zmq://another:1", "ann")]
    after = invite("cloud", TOLD, HUB, "ann")
    assert set(folder.authorized()) == {each.pair.public for each in (*others, after)}
    assert len(list((folder.path / INVITATIONS).iterdir())) == 3
    assert before.pair.public not in folder.authorized()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_where_nobody_knows_what_it_is_for_it_is_not_used(folder: KeyFolder, damage: Any) -> None:
    token = invite("cloud", TOLD, HUB, "ann")
    damage(folder.path / INVITATIONS / written(token.pair.public))
    with pytest.raises(KeyFileError, match="is here no more"):
        enrolled(folder, token.pair.public, KeyPair.new().public)
    assert set(folder.authorized()) == {token.pair.public}


def test_a_key_of_another_owner_does_not_use_it_up(folder: KeyFolder) -> None:
    bobs, token = KeyPair.new().public, invite("cloud", TOLD, HUB, "ann")
    folder.authorize(Authorized(bobs, frozenset({Role.CLIENT}), "bob"))
    with pytest.raises(KeyFileError, match="is the key of 'bob', not of 'ann'"):
        enrolled(folder, token.pair.public, bobs)
    assert token.pair.public in folder.authorized()


def test_a_key_that_has_expired_is_not_let_in_again_by_the_way(folder: KeyFolder) -> None:
    old = Authorized(KeyPair.new().public, frozenset({Role.SITE}), "ann", datetime.now(UTC) - timedelta(days=1))
    folder.authorize(old)
    with pytest.raises(KeyFileError, match="has expired: daskfed keys authorize"):
        folder.admit(Authorized(old.public, frozenset({Role.SITE}), "ann"))


def test_an_owner_whose_name_would_spoil_the_file_is_refused(folder: KeyFolder) -> None:
    folder.admit(Authorized(KeyPair.new().public, frozenset({Role.SITE}), "DOM\\ann"))
    with pytest.raises(KeyFileError, match="is no name of a user"):
        folder.admit(Authorized(KeyPair.new().public, frozenset({Role.SITE}), "ann b"))
    assert len(folder.authorized()) == 1


def test_what_a_site_is_told_is_for_this_user_only(folder: KeyFolder) -> None:
    token = invite("cloud", TOLD, HUB, "ann")
    file = folder.path / INVITATIONS / written(token.pair.public)
    assert file.stat().st_mode & 0o077 == 0
    enrolled(folder, token.pair.public, KeyPair.new().public)
    assert not file.exists()


def test_a_key_that_is_let_in_for_more_stays_so(folder: KeyFolder) -> None:
    own = KeyPair.new().public
    folder.authorize(Authorized(own, frozenset({Role.CLIENT}), "ann", shared=frozenset({"bob"})))
    folder.admit(Authorized(own, frozenset({Role.SITE}), "ann"))
    assert folder.authorized()[own] == Authorized(
        own, frozenset({Role.CLIENT, Role.SITE}), "ann", shared=frozenset({"bob"})
    )
    with pytest.raises(KeyFileError, match="is the key of 'ann', not of 'eve'"):
        folder.admit(Authorized(own, frozenset({Role.SITE}), "eve"))


def test_a_line_of_a_token_is_read_as_it_was_written() -> None:
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    entry = Authorized(KeyPair.new().public, frozenset({Role.JOIN}), "ann", ends, site="cloud")
    assert Authorized.read(entry.line()) == entry
