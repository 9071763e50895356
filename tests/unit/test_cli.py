"""The command line refuses what cannot work, with one line that says what to do, before anything is started."""

from __future__ import annotations

from pathlib import Path

import dask
import pytest
from click.testing import CliRunner, Result

from daskfed import cli as module
from daskfed.cli import cli
from daskfed.config import check_listen, is_loopback
from daskfed.data.memo import Entry, Memo

SITE = ("site", "--name", "north", "--hub", "tcp://127.0.0.1:1")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def refused(result: Result, status: int, complaint: str) -> bool:
    """Say whether a command ended with this status and message, and no traceback."""
    return result.exit_code == status and complaint in result.output and isinstance(result.exception, SystemExit)


class TestHub:
    @pytest.mark.parametrize(
        "address",
        ["tcp://0.0.0.0:8700", "0.0.0.0:0", "tcp://:8700", "tcp://10.1.2.3:0", "tcp://[::]:0", "tls://0.0.0.0:0"],
    )
    def test_it_does_not_listen_for_others_without_tls(self, address: str) -> None:
        result = invoke("hub", "--listen", address)
        assert refused(result, 2, f"{address} can be reached from other machines")
        assert "--tls-ca-file" in result.output

    def test_nor_in_the_clear_with_certificates(self, certificates: tuple[str, ...]) -> None:
        result = invoke("hub", "--listen", "tcp://0.0.0.0:0", *certificates)
        assert refused(result, 2, "neither encrypted nor authenticated")

    def test_an_unknown_policy(self) -> None:
        result = invoke("hub", "--listen", "tcp://127.0.0.1:0", "--policy", "cheapest")
        assert refused(result, 1, "no placement policy 'cheapest'; there are data-only,")

    def test_half_of_tls(self, certificates: tuple[str, ...]) -> None:
        result = invoke("hub", "--listen", "tls://0.0.0.0:0", *certificates[:4])
        assert refused(result, 2, "TLS needs all of --tls-ca-file, --tls-cert and --tls-key")

    def test_certificates_that_are_not_there(self) -> None:
        result = invoke("hub", "--tls-cert", "/no/such/file")
        assert refused(result, 2, "'/no/such/file' does not exist")


class TestSite:
    @pytest.mark.parametrize("given", [(), ("--name", "north"), ("--hub", "tcp://127.0.0.1:1"), ("--name", "")])
    def test_it_needs_a_name_and_a_hub(self, given: tuple[str, ...]) -> None:
        assert refused(invoke("site", *given), 2, "a site needs --name and --hub")

    def test_options_that_are_no_json(self) -> None:
        result = invoke(*SITE, "--options", "{cores: 4}")
        assert refused(result, 2, "--options is no JSON object: Expecting property name")

    def test_options_that_are_json_but_no_object(self) -> None:
        result = invoke(*SITE, "--options", "[1, 2]")
        assert refused(result, 1, "site 'north': option 'options': Input should be a valid dictionary")

    def test_a_label_that_is_none(self) -> None:
        assert refused(invoke(*SITE, "--label", "fast"), 1, "label 'fast' must be written name=value")

    def test_a_name_that_is_none(self) -> None:
        result = invoke("site", "--name", "a/b", "--hub", "tcp://127.0.0.1:1")
        assert refused(result, 1, "'a/b' cannot name a site")

    def test_a_directory_that_is_not_there(self) -> None:
        result = invoke(*SITE, "--directory", "/no/such/folder")
        assert refused(result, 1, "there is no directory '/no/such/folder'; create it first")

    def test_all_that_is_given_reaches_the_options(self, tmp_path: Path) -> None:
        name, hub, options = module._site_arguments(
            "north", "tcp://127.0.0.1:1", "my.Cluster", '{"cores": 4}', ("country=de",), ("torch",), str(tmp_path),
            data=("/scratch/era5",), data_binding="strict",
        )  # fmt: skip
        assert (name, hub) == ("north", "tcp://127.0.0.1:1")
        assert options.model_dump(exclude_unset=True) == {
            "cluster": "my.Cluster", "options": {"cores": 4}, "labels": {"country": "de"}, "environments": ["torch"],
            "directory": tmp_path, "data": ["/scratch/era5"], "data_binding": "strict",
        }  # fmt: skip


class TestCommands:
    def test_what_there_is(self) -> None:
        result = invoke("--help")
        assert result.exit_code == 0
        assert all(f"\n  {name} " in result.output for name in ("hub", "site", "status"))
        assert "--spec" not in invoke("site", "-h").output  # for child processes only

    def test_status_needs_a_profile_or_a_hub(self) -> None:
        assert refused(invoke("status"), 1, "no profile named")
        assert refused(invoke("status", "nowhere"), 1, "no profile 'nowhere'")
        assert refused(invoke("status", "nowhere", "--hub", "tcp://127.0.0.1:9"), 2, "not both")

    @pytest.mark.parametrize("command", ["stop", "logs"])
    def test_a_site_that_never_was(self, command: str, tmp_path: Path) -> None:
        with dask.config.set({"daskfed.state": str(tmp_path)}):
            assert refused(invoke("site", command, "nat"), 1, "no site 'nat' has joined from here; and for one of a")
            assert refused(invoke("site", command, "nat", "--profile", "gone"), 1, "no profile 'gone'")

    def test_an_unknown_command(self) -> None:
        assert refused(invoke("fly"), 2, "No such command 'fly'")

    def test_the_table_of_sites(self) -> None:
        facts = {"status": "running", "workers": 2, "threads": 8, "running": 1, "queued": 0, "blocks": 3, "held": 10}
        assert module._table({}) == "no sites have joined"
        assert [line.split() for line in module._table({"north": facts}).splitlines()] == [
            ["site", *facts], ["north", "running", "2", "8", "1", "0", "3", "10"]
        ]  # fmt: skip


class TestListening:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
    def test_loopback(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""])
    def test_everything_else(self, host: str) -> None:
        assert not is_loopback(host)

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "127.0.0.1:0", "tcp://[::1]:0", "localhost:8700"])
    def test_loopback_needs_no_tls(self, address: str) -> None:
        check_listen(address, None)

    def test_with_tls_it_may_listen_everywhere(self, certificates: tuple[str, ...]) -> None:
        ca, cert, key = certificates[1::2]
        security = module._security({"tls_ca_file": ca, "tls_cert": cert, "tls_key": key})
        check_listen("tls://0.0.0.0:8700", security)
        assert security.require_encryption
        assert security.get_tls_config_for_role("scheduler")["cert"] == cert

    def test_without_certificates_there_is_no_security(self) -> None:
        assert module._security({"tls_ca_file": None, "tls_cert": None, "tls_key": None}) is None


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[str, ...]:
    """Options that name three files; nobody reads them before something is started."""
    arguments: list[str] = []
    for option in ("--tls-ca-file", "--tls-cert", "--tls-key"):
        file = tmp_path / option
        file.write_text("")
        arguments += [option, str(file)]
    return tuple(arguments)


class TestCache:
    def test_what_is_kept(self, tmp_path: Path) -> None:
        memo = Memo(tmp_path / "memo", 10**6)
        memo.put(Entry(f"{name}{n}", name, b"x") for name in ("fit", "load") for n in range(2))
        with dask.config.set({"daskfed.cache.directory": str(tmp_path / "memo"), "daskfed.cache.size": "1 MB"}):
            assert "memo: 4 results, 1.00 kiB of 0.95 MiB" in invoke("cache", "show").output
            assert "memo: 2 results" in invoke("cache", "show", "fit").output
            assert invoke("cache", "clear", "fit").output == "2 results forgotten\n"
            assert invoke("cache", "clear").output == "2 results forgotten\n" and memo.contents().entries == 0

    def test_a_folder_that_cannot_be_used(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        with dask.config.set({"daskfed.cache.directory": str(tmp_path)}):
            assert refused(invoke("cache", "show"), 1, "others may write to")
