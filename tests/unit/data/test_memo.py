"""The memo store gives what was put, or nothing: whoever else uses it, dies in it, or damages it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daskfed.data.memo import ABANDONED_S, BLOBS, ENTRY_NBYTES, FILE, INLINE, Entry, Memo
from daskfed.errors import ConfigurationError

LARGE = INLINE + 1


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memo"


@pytest.fixture
def memo(folder: Path) -> Iterator[Memo]:
    store = Memo(folder, 10**9, Clock())
    yield store
    store.check()
    store.close()


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / BLOBS).rglob("*") if path.is_file()]


def put(memo: Memo, token: str, value: bytes, name: str = "f") -> None:
    memo.put([Entry(token, name, value)])


class TestValues:
    @pytest.mark.parametrize("nbytes", [0, 1, INLINE, LARGE, 3 * 10**6])
    def test_come_back_in_another_process(self, memo: Memo, folder: Path, nbytes: int) -> None:
        put(memo, "t", bytes(nbytes))
        assert Memo(folder, 10**9).get("t") == bytes(nbytes)
        assert len(files(folder)) == (nbytes > INLINE)

    def test_are_missed_before(self, memo: Memo) -> None:
        assert memo.get("t") is None and memo.known(["t"]) == set()

    def test_are_kept_once(self, memo: Memo, folder: Path) -> None:
        memo.put([Entry("a", "f", bytes(LARGE)), Entry("b", "f", bytes(LARGE))])
        put(memo, "c", bytes(LARGE))
        assert len(files(folder)) == 1 and memo.contents().nbytes == LARGE + 3 * ENTRY_NBYTES
        assert dict(memo.found(["a", "b", "c", "d"])) == dict.fromkeys("abc", bytes(LARGE))

    def test_of_one_token_stay(self, memo: Memo) -> None:
        put(memo, "t", b"first")
        put(memo, "t", b"second")
        assert memo.get("t") == b"first"

    def test_many(self, memo: Memo) -> None:
        memo.put(Entry(f"t{n}", "f", b"%d" % n) for n in range(2000))
        assert dict(memo.found([f"t{n}" for n in range(2000)])) == {f"t{n}": b"%d" % n for n in range(2000)}


class TestRoom:
    def test_what_was_not_used_for_longest_goes(self, folder: Path) -> None:
        memo = Memo(folder, 3 * (LARGE + ENTRY_NBYTES), Clock())
        for n in range(3):
            put(memo, f"t{n}", bytes([n]) * LARGE)
        memo.touch(["t0"])
        put(memo, "t3", bytes([3]) * LARGE)
        assert memo.known(["t0", "t1", "t2", "t3"]) == {"t0", "t2", "t3"}
        assert len(files(folder)) == 3
        memo.check()

    def test_a_value_that_others_have_stays(self, folder: Path) -> None:
        memo = Memo(folder, LARGE + 2 * ENTRY_NBYTES, Clock())
        for token in "abc":
            put(memo, token, bytes(LARGE))
        assert memo.known("abc") == {"b", "c"} and memo.get("c") == bytes(LARGE)
        memo.check()

    def test_what_is_larger_than_everything_is_not_kept(self, folder: Path) -> None:
        memo = Memo(folder, LARGE, Clock())
        put(memo, "small", b"x")
        put(memo, "large", bytes(LARGE + 1))
        assert memo.known(["small", "large"]) == {"small"}


class TestClear:
    def test_by_name(self, memo: Memo, folder: Path) -> None:
        memo.put([Entry("a", "fit", bytes(LARGE)), Entry("b", "fit-x", b"x" * LARGE), Entry("c", "load", bytes(LARGE))])
        assert memo.contents("fit").entries == 2
        assert memo.clear("fit") == 2
        assert memo.known("abc") == {"c"} and memo.get("c") == bytes(LARGE) and len(files(folder)) == 1
        assert memo.clear() == 1 and memo.contents().nbytes == 0 and not files(folder)

    def test_a_name_is_taken_as_it_is(self, memo: Memo) -> None:
        memo.put([Entry("a", "f_x", b""), Entry("b", "fax", b"")])
        assert memo.clear("f_") == 1 and memo.clear("%") == 0


class TestDamage:
    @pytest.mark.parametrize("damage", ["change", "shorten", "remove"])
    def test_a_damaged_value_is_a_miss_and_can_be_put_again(self, memo: Memo, folder: Path, damage: str) -> None:
        put(memo, "t", bytes(LARGE))
        (path,) = files(folder)
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(b"x" * LARGE if damage == "change" else bytes(LARGE - 1))
        assert memo.get("t") is None and memo.known(["t"]) == set() and not files(folder)
        put(memo, "t", bytes(LARGE))
        assert memo.get("t") == bytes(LARGE)

    def test_no_database(self, folder: Path) -> None:
        Memo(folder, 10**6).close()
        (folder / FILE).write_bytes(b"no database " * 1000)
        memo = Memo(folder, 10**6)
        assert memo.contents().entries == 0
        put(memo, "t", b"x")
        assert memo.get("t") == b"x" and list(folder.glob(f"{FILE}.damaged-*"))

    def test_files_without_rows_are_swept_once_they_are_old(self, memo: Memo, folder: Path) -> None:
        put(memo, "t", bytes(LARGE))
        digest = hashlib.sha256(b"lost").hexdigest()
        lost, new = folder / BLOBS / digest[:2] / digest, folder / BLOBS / "new-x"
        lost.parent.mkdir()
        for path in (lost, new):
            path.write_bytes(b"lost")
        memo._clock = time.time
        assert memo.sweep() == 0
        for path in files(folder):
            os.utime(path, (0, time.time() - ABANDONED_S - 60))
        assert memo.sweep() == 2
        assert not lost.exists() and not new.exists() and memo.get("t") == bytes(LARGE)


class TestWhoseItIs:
    def test_only_the_user_can_read_it(self, memo: Memo, folder: Path) -> None:
        put(memo, "t", bytes(LARGE))
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path

    @pytest.mark.parametrize("mode", [0o770, 0o707])
    def test_a_folder_that_others_may_write_to_is_refused(self, folder: Path, mode: int) -> None:
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(ConfigurationError, match="others may write.*chmod go-w"):
            Memo(folder, 1)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
    def test_a_folder_of_somebody_else_is_refused(self, folder: Path) -> None:
        folder.mkdir()
        os.chown(folder, 12345, -1)
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            Memo(folder, 1)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigurationError, match=r"file.*daskfed\.cache\.directory"):
            Memo(tmp_path / "file" / "memo", 1)


WRITER = """
import sys
from daskfed.data.memo import Entry, Memo
memo = Memo(sys.argv[1], 4_000_000)
print("begun", flush=True)
for n in range(int(sys.argv[2]), 10**9, 2):
    value = b"%d;" % n * (10 if n % 3 else 4000)
    memo.put([Entry(f"t{n % 400}", "f", value)])
    found = memo.get(f"t{n * 7 % 400}")
    assert found is None or len(set(found.split(b";")[:-1])) == 1
"""


def test_processes_that_are_killed_while_they_write(tmp_path: Path) -> None:
    for round in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "memo", str(n)], stdout=subprocess.PIPE)
            for n in range(2)
        ]
        for each in writers:
            assert each.stdout is not None and each.stdout.readline() == b"begun\n"
        time.sleep(0.3 + 0.05 * round)
        for each in writers:
            assert each.poll() is None, "it has failed"
            each.send_signal(signal.SIGKILL)
            each.communicate(timeout=20)
        memo = Memo(tmp_path / "memo", 4_000_000)
        memo.check()
        for token, value in memo.found([f"t{n}" for n in range(400)]):
            (number,) = set(value.split(b";")[:-1])
            assert int(number) % 400 == int(token[1:])
        memo.clear("nothing")
        memo.close()
    assert memo_is_used(tmp_path / "memo")


def memo_is_used(folder: Path) -> bool:
    return Memo(folder, 4_000_000).contents().entries > 50


TOKENS = st.sampled_from([f"t{n}" for n in range(8)])
SIZES = st.sampled_from([1, 100, INLINE, LARGE, 3 * INLINE])


class MemoMachine(RuleBasedStateMachine):
    """Two users of one folder, one of which may die; a dict says what each token may give."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.size = 8 * INLINE
        self.memos = [Memo(self.folder / "memo", self.size, self.clock) for _ in range(2)]
        self.values: dict[str, bytes] = {}

    @rule(who=st.integers(0, 1), token=TOKENS, nbytes=SIZES, fill=st.integers(0, 2))
    def put(self, who: int, token: str, nbytes: int, fill: int) -> None:
        value = bytes([fill]) * nbytes
        known = self.memos[1 - who].known([token])
        put(self.memos[who], token, value)
        if not known:
            self.values[token] = value

    @rule(who=st.integers(0, 1), token=TOKENS)
    def get(self, who: int, token: str) -> None:
        found = self.memos[who].get(token)
        assert found is None or found == self.values[token]
        assert (found is not None) == bool(self.memos[1 - who].known([token]))

    @rule(who=st.integers(0, 1), tokens=st.lists(TOKENS))
    def touch(self, who: int, tokens: list[str]) -> None:
        self.memos[who].touch(tokens)

    @rule(who=st.integers(0, 1))
    def clear(self, who: int) -> None:
        self.memos[who].clear()
        assert not list(self.memos[1 - who].found([f"t{n}" for n in range(8)]))

    @rule(who=st.integers(0, 1))
    def reopen(self, who: int) -> None:
        self.memos[who].close()
        self.memos[who] = Memo(self.folder / "memo", self.size, self.clock)

    @rule(fill=st.integers(0, 2), named=st.booleans())
    def die_between_file_and_row(self, fill: int, named: bool) -> None:
        value = bytes([fill]) * LARGE
        digest = hashlib.sha256(value).hexdigest()
        path = self.folder / "memo" / BLOBS / (f"{digest[:2]}/{digest}" if named else f"new-{fill}")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(value)

    @precondition(lambda self: files(self.folder / "memo"))
    @rule(data=st.data(), how=st.sampled_from(["change", "remove"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        path = data.draw(st.sampled_from(sorted(files(self.folder / "memo"))))
        if how == "remove":
            path.unlink()
        else:
            path.write_bytes(b"damaged")

    @rule()
    def sweep(self) -> None:
        for path in files(self.folder / "memo"):
            os.utime(path, (0, 0))
        self.clock.now += ABANDONED_S
        self.memos[0].sweep()
        known = list(self.memos[1].found([f"t{n}" for n in range(8)]))
        assert len(files(self.folder / "memo")) == len({value for _, value in known if len(value) > INLINE})

    @invariant()
    def is_consistent(self) -> None:
        self.memos[0].check()

    def teardown(self) -> None:
        for memo in self.memos:
            memo.close()
        shutil.rmtree(self.folder)


TestMachine = MemoMachine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
