"""The collector looks less often while it is wanted so, and is then as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

PROGRAM = """
import gc
from daskfed.collecting import RELAXED, Relaxed
usual = gc.get_threshold()
one, two = Relaxed(), Relaxed()
assert gc.get_threshold() == RELAXED
one.end()
one.end()
assert gc.get_threshold() == RELAXED
del two
assert gc.get_threshold() == usual
gc.set_threshold(1000, 5, 5)
one = Relaxed()
assert gc.get_threshold() == (1000, 5, 5)
one.end()
assert gc.get_threshold() == (1000, 5, 5)
"""


def test_it_is_relaxed_until_the_last_one_is_done_and_what_the_user_has_set_counts() -> None:
    before = gc.get_threshold()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert gc.get_threshold() == before
