"""What is printed: on streams of any encoding, closed, full, or with nobody at the other end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards

import actcache
from actcache.cli import main
from actcache.cli.outlets import Outlet
from actcache.spec import Site

pytestmark = pytest.mark.exhaustive

ODD = "blöcke→😀"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    blocks = random_blocks(17, 13)
    site = Site(name=ODD, shape=(12,), codec_reason="„smaller“ ⟶ by 3 %")
    spec = spec_of(blocks, sites=(site,), model={"name": "модель"}, text={"tokens": blocks.digest(), "text": "文"})
    return write_shards(tmp_path_factory.mktemp("streams") / "ŝ.zarr", spec, blocks, random_bits(spec)).path


def said(arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command on streams that are as strict as can be."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    with monkeypatch.context() as patched:
        for name, stream in streams.items():
            patched.setattr(sys, name, stream)
        code = main(arguments)
    for stream in streams.values():
        stream.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams.values())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_encoding_has_a_way_to_write_everything(store, encoding, monkeypatch):
    code, out, err = said(["info", store], encoding, monkeypatch)
    assert (code, err) == (0, "")
    shown = ODD.encode(encoding, "backslashreplace").decode(encoding)
    assert out.count(shown) == 2
    for arguments in (["info", store, "--json"], ["verify", store], ["verify", store, "--json"]):
        code, out, _ = said(arguments, encoding, monkeypatch)
        assert code == 0
        assert "zarr" in out
    code, out, err = said(["info", f"{store}-\udcff"], encoding, monkeypatch)
    assert (code, out) == (1, "")
    assert "no activation store at" in err
    for verb in ("", "extract", "plan", "train", "demo"):
        code, out, _ = said([*verb.split(), "--help"], encoding, monkeypatch)
        assert code == 0
        assert "--json" in out


def run(store: str, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(actcache.__file__).parent.parent), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.Popen([sys.executable, "-m", "actcache", *arguments, store], env=environment, **more)


def test_a_reader_that_has_seen_enough_is_no_error(store):
    for arguments in (["info"], ["verify", "--json"], ["verify", "--help"]):
        with run(store, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            said = process.stderr.read()
            assert b"rror" not in said
            assert b"Broken pipe" not in said
            assert process.wait(60) == 0


def test_a_result_that_is_lost_on_a_full_disk_is_an_error(store):
    with open("/dev/full", "wb") as full, run(store, "info", stdout=full, stderr=subprocess.PIPE) as process:
        assert b"cannot be written to stdout: No space left on device" in process.stderr.read()
        assert process.wait(60) == 1


def test_without_stderr_the_result_is_alone_on_stdout(store):
    for closed in (["/bin/sh", "-c", 'exec "$@" 2>&-', "sh"], ["/bin/sh", "-c", 'exec "$@" 2>/dev/full', "sh"]):
        command = [*closed, sys.executable, "-m", "actcache", "verify", store, "--json"]
        environment = {**os.environ, "PYTHONPATH": str(Path(actcache.__file__).parent.parent)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=60)
        assert done.returncode == 0
        assert json.loads(done.stdout)["sound"] is True


def test_an_outlet_that_is_lost_is_silent_and_others_are_not():
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    Outlet(Broken(), or_not=True).write("x")
    with pytest.raises(OSError, match="Input/output"):
        Outlet(Broken()).write("x")
    Outlet(None).write("x")
