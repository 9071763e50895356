"""What a hub writes down is there for the next one, and for nobody else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from daskfed.errors import ConfigurationError
from daskfed.hub.journal import FILE, Journal


def test_who_was_there_is_known_to_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    journal.epoch = 7
    for site in ("north", "south"):
        journal.keep_site(site)
    for client in ("c", "d"):
        journal.keep_client(client, "ann")
    journal.forget_site("south")
    journal.forget_client("d")
    secret = journal.secret
    journal.close()
    again = Journal(tmp_path / "state")
    assert (again.secret, again.epoch) == (secret, 7)
    assert again.awaited().sites == {"north"} and again.awaited().clients == {"c": "ann"}
    again.close()


def test_things_come_back_in_the_order_in_which_they_were_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in ("b", ("a", 1), b"c", 1, 1.5):
        journal.keep("thing", name, [name])
    journal.keep("thing", "b", "later")
    journal.forget("thing", 1)
    journal.keep("other", "b")
    journal.close()
    things = Journal(tmp_path).things("thing")
    assert things == [(("a", 1), (("a", 1),)), (b"c", (b"c",)), (1.5, (1.5,)), ("b", "later")]


def test_what_is_kept_together_is_kept_at_once(tmp_path: Path) -> None:
    code = (
        "import os; from daskfed.hub.journal import Journal; "
        f"journal = Journal({str(tmp_path)!r}); journal.keep('thing', 'a')\n"
        "with journal.together():\n journal.keep('thing', 'b'); journal.forget('thing', 'a'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    journal = Journal(tmp_path)
    assert journal.things("thing") == [("a", None)]
    with journal.together(), journal.together():
        journal.keep("thing", "b")
    assert journal.things("thing") == [("a", None), ("b", None)]


def test_without_a_folder_nothing_is_kept() -> None:
    journal = Journal()
    journal.keep("thing", "a")
    with journal.together():
        journal.forget("thing", "b")
    assert journal.things("thing") == [] and journal.secret and not journal.durable
    journal.close()


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    journal.keep("thing", "a")
    assert stat.S_IMODE(os.stat(tmp_path / "state").st_mode) == 0o700
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    journal.close()


def test_one_hub_at_a_time(tmp_path: Path) -> None:
    code = f"from daskfed.hub.journal import Journal; Journal({str(tmp_path)!r})"
    journal = Journal(tmp_path)
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "another hub keeps its state in" in second.stderr and "end it, or name another folder" in second.stderr
    journal.close()
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="the hub cannot keep its state in .*file"):
        Journal(tmp_path / "file")


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("this is not a database, and never was one " * 100)
    with pytest.raises(ConfigurationError, match="the hub cannot keep its state in .*not a database"):
        Journal(tmp_path)
