"""The memory of an extraction does not depend on how much text there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_tokens():
    options = ["--tokens", "1048576", "--width", "128", "--sequences-per-shard", "64", "--lines", "40"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = [json.loads(line) for line in done.stdout.splitlines()]
    held, stored = [line["held_bytes"] for line in lines], last["stored_bytes"] * 3 // 4
    assert len(held) == 40
    assert stored > 380 << 20
    early, late = max(held[:10]), max(held[-10:])
    # The allocator takes another 20 MB now and then, and keeps them.
    assert late - early < stored // 5, f"{late - early:,} bytes more held after {stored:,} more were stored"
