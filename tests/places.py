"""Places to put a store, for tests: a folder, memory, and the S3 server of `s3_server.py` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import zarr.storage

from actcache.store.backends import urls
from actcache.store.backends.objects import Objects

HERE = Path(__file__).parent
PATIENCE_S = 600
"""How long tests wait for other processes: never too short on a busy machine, and the end of one that hangs."""
OWN_ENVIRONMENT = HERE.parent / ".venv-s3" / "bin" / "python"


@dataclass(frozen=True)
class S3:
    """A running server."""

    port: int
    process: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
        }

    def put(self, path: str, data: bytes = b"") -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, method="PUT")
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()

    def moods(self, **moods: Any) -> None:
        """How the server answers from now on; see `s3_server.py`."""
        self.put("-moods", json.dumps(moods).encode())

    def wait_until_it_hangs(self) -> None:
        """Until as many puts were answered as `hang_after` said, and others wait."""
        until = time.monotonic() + PATIENCE_S
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-moods", timeout=PATIENCE_S) as answer:
                if json.load(answer)["hanging"]:
                    return
            assert time.monotonic() < until
            time.sleep(0.01)

    def calm(self) -> None:
        self.moods(delay_s=0.0, refuse_after=-1, refuse_with=403, refusals=-1, hang_after=-1, together=1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def python_with_moto() -> str:
    """An interpreter that can run the server, or a skip that says how to get one."""
    if find_spec("obstore") is None:
        pytest.skip("needs obstore: pip install 'actcache[remote]'")
    candidates = [os.environ.get("ACTCACHE_S3_PYTHON"), sys.executable if find_spec("moto") else None]
    candidates.append(str(OWN_ENVIRONMENT) if OWN_ENVIRONMENT.exists() else None)
    for candidate in candidates:
        if candidate:
            return candidate
    return pytest.skip("needs moto: 'make test' installs it, or ACTCACHE_S3_PYTHON names a Python that has it")


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[S3]:
    command = [python_with_moto(), str(HERE / "s3_server.py")]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True)
    try:
        server = S3(port=int(process.stdout.readline()), process=process)
        server.put(bucket)
        yield server
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """A server, and the environment with which obstore finds it."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3) -> Iterator[str]:
    """The URL of a place in the bucket that no other test uses."""
    s3.calm()
    yield f"s3://bucket/{uuid.uuid4().hex}/acts.zarr"
    s3.calm()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Somewhere empty to put a store, of the kind that the test's parameter says."""
    if request.param == "folder":
        return tmp_path / "acts.zarr"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/acts.zarr"
    return zarr.storage.MemoryStore() if request.param == "zarr memory" else request.getfixturevalue("bucket")


QUICK = {**urls.RETRIES, "max_retries": 3, "backoff": {"init_backoff": timedelta(milliseconds=20)}}
"""Retries for tests that wait until there are no more of them."""
KINDS = ("folder", "memory", "s3", "zarr memory")
everywhere = pytest.mark.parametrize("place", KINDS, indirect=True)
by_name = pytest.mark.parametrize("place", KINDS[:3], indirect=True)
elsewhere = pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
between_processes = pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)


def writable(location: Any) -> Objects:
    return Objects(location, read_only=False)
