"""Several processes extract one store: `--part I/N` without a scheduler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import actcache as ac
from actcache.cli import main

_EXTRACT = [sys.executable, "-m", "actcache", "extract", "--sites", "blocks.*.mlp.hook_in", "blocks.3.hook_mlp_out"]
_SIZES = ["--length", "64", "--count", "480", "--sequences-per-shard", "24", "--json"]


def begin(path: Path, *more: str) -> subprocess.Popen[str]:
    """An extraction in a process of its own; of one thread, since what threads add up differs in its last bits."""
    return subprocess.Popen(
        [*_EXTRACT, *_SIZES, "--out", str(path), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> ac.Store:
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    ended(begin(path))
    return ac.open_store(path)


def contents(path: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


@pytest.mark.exhaustive
def test_parts_that_run_together_give_the_bytes_of_one_process(tmp_path, unbroken):
    path = tmp_path / "s.zarr"
    infos = [ended(process) for process in [begin(path, "--part", f"{i}/3") for i in (1, 2, 3)]]
    assert "sealed" in {info["state"] for info in infos}
    assert ac.open_store(path).fingerprint == unbroken.fingerprint
    assert contents(path) == contents(unbroken.path)


@pytest.mark.exhaustive
def test_a_part_that_was_killed_is_made_up_for_by_a_last_call(tmp_path, unbroken):
    path = tmp_path / "s.zarr"
    victim = begin(path, "--part", "1/2")
    while not list(path.glob("rows/commit/c.*")):
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert ended(begin(path, "--part", "2/2"))["state"] == "open"
    assert ended(begin(path))["state"] == "sealed"
    assert contents(path) == contents(unbroken.path)


def test_a_part_is_written_as_i_of_n(tmp_path, capsys):
    for wrong in ("2", "1:2", "0/2", "3/2", "a/b"):
        arguments = ["extract", "--sites", "blocks.3.hook_mlp_out", *_SIZES, "--out", str(tmp_path / "s.zarr")]
        assert main([*arguments, "--part", wrong]) == 1
        assert "part" in capsys.readouterr().err
    assert not (tmp_path / "s.zarr").exists()
