"""Other people's trainers, really installed, for the tests of our adapters to them.

A peer, and what it needs that the main environment does not have, is a list of pinned versions, `tests/peers/NAME.txt`.
The list is installed without dependencies into a folder, `.venv-peers/NAME`, which goes in front of the path of an
interpreter that has all else (torch, transformers) from the main environment: seconds and megabytes, where an
environment of its own would take a second torch. What needs the peer stands in `tests/peers/NAME_*.py`, as plain tests,
which a test outside runs once in such an interpreter (`Results`), and reports one by one.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROOT = TESTS.parent
_INSTALL_SECONDS = 900
_RUN_SECONDS = 1800
"""So much that a slow network or a busy machine is no failure, and what hangs is one."""


def folder_of(peer: str) -> Path:
    """The folder with what `tests/peers/PEER.txt` lists, installed when it is not there; skips where it cannot be."""
    wanted = (HERE / f"{peer}.txt").read_text(encoding="utf-8")
    folder = Path(os.environ.get("ACTCACHE_PEERS", ROOT / ".venv-peers")) / peer
    ready = folder / ".ready"
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{peer}-"))
    try:
        _install(peer, made)
        (made / ".ready").write_text(wanted, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another run was quicker, and put the same there
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _install(peer: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--retries",
        "1",
        "--timeout",
        "20",
        "--target",
        str(folder),
        "--requirement",
        str(HERE / f"{peer}.txt"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"needs {peer}, which pip did not install within {_INSTALL_SECONDS} seconds")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip says nothing"]
        pytest.skip(f"needs {peer}, which pip could not install: {said[-1]}")


def environment(*peers: str) -> dict[str, str]:
    """The variables with which an interpreter finds these peers, this checkout, and asks nobody on the network."""
    path = os.pathsep.join([*(str(folder_of(peer)) for peer in peers), str(ROOT), str(TESTS)])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def tests_in(file: str) -> list[str]:
    """The names of the tests in `tests/FILE`, read and not imported: what it imports is not to be had here."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


class Results:
    """What became of some tests (paths below `tests/`, or node ids) that were run in one process that has the peers."""

    def __init__(self, tests: Sequence[str], peers: Sequence[str], folder: Path) -> None:
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
        command += [f"--junitxml={report}", *(str(TESTS / test) for test in tests)]
        env, seconds = environment(*peers), _RUN_SECONDS
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=seconds
        )
        self._said = done.stdout[-6000:] + done.stderr[-2000:]
        self._cases: dict[str, list[ElementTree.Element]] = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                self._cases.setdefault(str(case.get("name")).partition("[")[0], []).append(case)

    def check(self, test: str) -> None:
        """Fail as the test of that name did with any of its parameters; skip where it skipped with all of them."""
        cases = self._cases.get(test)
        if not cases:
            pytest.fail(f"{test} did not run:\n{self._said}", pytrace=False)
        for case in cases:
            for found in (*case.iter("failure"), *case.iter("error")):
                pytest.fail(f"{case.get('name')}: {found.get('message')}\n{found.text}", pytrace=False)
        skipped = [found.get("message") for case in cases for found in case.iter("skipped")]
        if len(skipped) == len(cases):
            pytest.skip(str(skipped[0]))
