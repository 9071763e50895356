"""Key files: made with care, read with clear errors, and nothing of the secret halves ever shown."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from daskfed.cli import cli
from daskfed.errors import KeyFileError
from daskfed.keys import Authorized, KeyFolder, KeyPair, Role, moment, parsed, roles_named, written

CLIENT = frozenset({Role.CLIENT})


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "deep" / "keys")


def test_a_new_key_is_its_users_alone(folder: KeyFolder) -> None:
    made = folder.new("id")
    assert folder.own("id") == made and made.secret not in (made.public, b"")
    assert stat.S_IMODE((folder.path / "id.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert written(made.secret, "sec-") not in repr(made) and str(made.secret) not in repr(made)
    assert (folder.path / "id.public").read_text().strip() == written(made.public)


def test_a_key_is_not_written_over(folder: KeyFolder) -> None:
    made = folder.new("id")
    with pytest.raises(KeyFileError, match="already"):
        folder.new("id")
    assert folder.own("id") == made


def test_a_secret_that_others_may_read_is_refused(folder: KeyFolder) -> None:
    folder.new("id")
    (folder.path / "id.secret").chmod(0o640)
    with pytest.raises(KeyFileError, match="others may read .*chmod 600"):
        folder.own("id")


@pytest.mark.parametrize("name", ["authorized", "known-hubs"])
def test_a_file_that_others_may_change_is_refused(folder: KeyFolder, name: str) -> None:
    folder.authorize(Authorized(KeyPair.new().public, frozenset({Role.SITE}), "ann"))
    folder.trust("zmq://hub:1", KeyPair.new().public)
    read = {"authorized": folder.authorized, "known-hubs": folder.hubs}[name]
    assert len(read()) == 1
    (folder.path / name).chmod(0o620)
    with pytest.raises(KeyFileError, match="others may change .*chmod 600"):
        read()


def test_what_is_no_secret_key_is_not_repeated(folder: KeyFolder) -> None:
    folder.new("id")
    (folder.path / "id.secret").write_text("sec-hush-hush")
    with pytest.raises(KeyFileError, match="what is there is no key") as found:
        folder.own("id")
    assert "hush" not in str(found.value)


def test_a_secret_key_is_not_taken_for_a_public_one() -> None:
    with pytest.raises(KeyFileError, match="this is a secret key") as found:
        parsed(secret := written(KeyPair.new().secret, "sec-"))
    assert secret not in str(found.value)


def test_every_key_can_be_written_and_read() -> None:
    for _ in range(50):
        public = KeyPair.new().public
        text = written(public)
        assert parsed(text) == public and text.replace("-", "").replace("_", "").isalnum() and len(text) == 47


@pytest.mark.parametrize("text", ["", "pub-", "pub-abc", "pub-" + "!" * 43, "x" * 47, "pub-" + "A" * 44])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(KeyFileError, match="is no key"):
        parsed(text)


class TestAuthorized:
    def test_a_line_says_it_all(self, folder: KeyFolder) -> None:
        end = datetime(2027, 1, 31, 12, tzinfo=UTC)
        entry = Authorized(KeyPair.new().public, CLIENT | {Role.SITE}, "ann", end, frozenset({"bob", "*"}))
        folder.authorize(entry)
        assert folder.authorized() == {entry.public: entry}
        assert folder.authorized_file.read_text() == (
            f"{written(entry.public)} client+site ann expires=2027-01-31T12:00:00+00:00 shared=*,bob\n"
        )

    def test_comments_and_empty_lines(self, folder: KeyFolder) -> None:
        key = written(KeyPair.new().public)
        folder.path.mkdir(parents=True)
        folder.authorized_file.write_text(f"# the lab\n\n  {key} client ann\n")
        assert [entry.owner for entry in folder.authorized().values()] == ["ann"]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("KEY client", "must be: key, roles, owner"),
            ("KEY cleint ann", "did you mean 'client'"),
            ("KEY client ann!", "no name of a user"),
            ("KEY client ann expires=soon", "is no time"),
            ("KEY client ann expirse=2027-01-01", "did you mean 'expires'"),
            ("pub-xyz client ann", "is no key"),
        ],
    )
    def test_a_line_that_is_wrong_is_named(self, folder: KeyFolder, line: str, said: str) -> None:
        folder.path.mkdir(parents=True)
        folder.authorized_file.write_text("# first\n" + line.replace("KEY", written(KeyPair.new().public)))
        with pytest.raises(KeyFileError, match=said) as found:
            folder.authorized()
        assert f"{folder.authorized_file}, line 2: " in str(found.value)

    def test_a_file_that_is_no_text(self, folder: KeyFolder) -> None:
        folder.path.mkdir(parents=True)
        folder.authorized_file.write_bytes(b"# caf\xe9\n")
        with pytest.raises(KeyFileError, match="cannot read"):
            folder.authorized()

    def test_roles(self) -> None:
        key = KeyPair.new().public
        assert Authorized(key, CLIENT, "ann").may(Role.CLIENT) and not Authorized(key, CLIENT, "ann").may(Role.SITE)
        assert all(Authorized(key, frozenset({Role.ADMIN}), "ann").may(role) for role in Role)
        assert roles_named("site+client") == {Role.SITE, Role.CLIENT}

    def test_whom_a_site_serves(self) -> None:
        site = Authorized(KeyPair.new().public, frozenset({Role.SITE}), "ann")
        assert site.serves == ("ann",)

    def test_an_end(self) -> None:
        now = datetime.now(UTC)
        entry = Authorized(KeyPair.new().public, CLIENT, "ann", now + timedelta(hours=1))
        assert entry.valid(now) and not entry.valid(now + timedelta(hours=2))
        assert moment("2027-01-01T00:00") == datetime(2027, 1, 1, tzinfo=UTC)


class TestCommands:
    @pytest.fixture(autouse=True)
    def own_folder(self, folder: KeyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        import dask

        monkeypatch.setitem(dask.config.config, "daskfed", {"keys": str(folder.path)})

    def run(self, *words: str, status: int = 0) -> str:
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == status, result.output
        return result.output

    def test_from_a_new_key_to_its_end(self, folder: KeyFolder) -> None:
        assert "id.secret: give it to nobody" in self.run("keys", "new")
        key = self.run("keys", "show").strip()
        self.run("keys", "authorize", key, "--owner", "ann", "--expires", "30d")
        assert f"{key} client+site ann expires=" in self.run("keys", "list")
        assert f"{key} client+site ann expires=" in self.run("site", "share", "ann", "--with", "bob")
        assert "shared=bob" in self.run("keys", "list")
        self.run("site", "share", key, "--with", "bob", "--stop")
        assert "shared" not in self.run("keys", "list")
        assert f"{key} of ann is let in no more" in self.run("keys", "revoke", "ann")
        assert self.run("keys", "list") == ""

    def test_hubs_that_are_trusted(self, folder: KeyFolder) -> None:
        one, other = (written(KeyPair.new().public) for _ in range(2))
        self.run("keys", "trust", "zmq://hub.example.org:8700", one)
        self.run("keys", "trust", "hub.example.org:8700", one)
        assert folder.hubs() == {"hub.example.org:8700": parsed(one)}
        assert "has another key" in self.run("keys", "trust", "zmq://hub.example.org:8700", other, status=1)
        assert f"{one} hub hub.example.org:8700" in self.run("keys", "list")

    def test_mistakes(self) -> None:
        assert "daskfed keys new id makes one" in self.run("keys", "show", status=1)
        assert "is no key" in self.run("keys", "authorize", "pub-x", "--owner", "ann", status=1)
        assert "daskfed keys list shows who is" in self.run("keys", "revoke", "ann", status=1)
        key = written(KeyPair.new().public)
        assert "did you mean 'site'" in self.run("keys", "authorize", key, "--owner", "a", "--role", "sit", status=1)
        assert "is no time" in self.run("keys", "authorize", key, "--owner", "a", "--expires", "soon", status=1)
        assert "no site is let in as 'ann'" in self.run("site", "share", "ann", "--with", "bob", status=1)
