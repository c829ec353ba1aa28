"""Memory that a loop frees is used again, not given back and faulted in anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOOP = """
import resource, torch
from actcache.memory import keep_freed_memory
keep_freed_memory()
for _ in range(20):
    torch.ones(8 << 20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "65536"}])
def test_large_tensors_of_a_loop_are_not_faulted_in_again(environment: dict[str, str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOOP], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert found.returncode == 0, found.stderr
    # Each of them has 2,048 pages; without it all twenty are faulted in.
    assert int(found.stdout) < 4000
