"""Small files that several processes share: whole, for their user only, and changed by one at a time."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from daskfed.files import locked, write_whole


def test_what_is_written_is_for_this_user_only_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "told"
    file.write_text("old")
    file.chmod(0o644)
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [file]


def test_another_process_waits_for_a_lock(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lock"
    waits = "import pathlib, sys\nfrom daskfed.files import locked\nwith locked(pathlib.Path(sys.argv[1])): print('mine')"
    with locked(file):
        other = subprocess.Popen([sys.executable, "-c", waits, str(file)], stdout=subprocess.PIPE, text=True)
        with suppress(subprocess.TimeoutExpired):
            other.wait(3)
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "mine\n"
    assert file.parent.stat().st_mode & 0o077 == 0
