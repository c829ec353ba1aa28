"""annbatch with zarrs as a baseline: an environment of its own, and a process in it that reads epochs when asked.

Both need Python 3.12 or later, which this library does not: so it is a process, not an import.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REQUIREMENTS = ("annbatch==0.3.1", "zarrs==0.2.3", "zarr==3.4.2")
ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-annbatch"
COMPRESSED = {
    "as_float32": False,
    "blosc": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    "rows_per_chunk": 1024,
    "chunk_size": 1024,
    "preload_nchunks": 100,
}
"""The fastest way with compression that was found; larger and smaller chunks, fewer held, zstd: all slower."""
UNCOMPRESSED = COMPRESSED | {"blosc": None}
"""The fastest of all."""
DEFAULTS = {
    "as_float32": True,
    "blosc": {"cname": "lz4", "clevel": 3, "shuffle": "shuffle"},
    "rows_per_chunk": 64,
    "chunk_size": 512,
    "preload_nchunks": 32,
}
"""What annbatch itself writes (`DatasetCollection`), and how its `Loader` reads if nothing else is said."""
_EPOCHS = Path(__file__).with_name("loader_annbatch_epochs.py")
_PYTHONS = ("python3.12", "python3.13", "python3.14")


class MissingPeerError(Exception):
    """annbatch cannot be had on this machine; the message says why."""


def environment(*, install: bool = True) -> Path:
    """The interpreter of an environment with annbatch, made if need be and if that is allowed.

    Raises:
        MissingPeerError: there is no environment, and it cannot be made.
    """
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if ready.exists() and ready.read_text() == "\n".join(REQUIREMENTS):
        return python
    if not install:
        raise MissingPeerError(f"annbatch is not in {ENVIRONMENT}; 'python benchmarks/loader.py' puts it there")
    base = _working_python()
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([base, "-m", "venv", ENVIRONMENT], check=True, capture_output=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "20"]
    installed = subprocess.run([*pip, *REQUIREMENTS], capture_output=True, text=True, check=False)
    if installed.returncode:
        said = installed.stderr.strip().splitlines() or ["pip says nothing"]
        raise MissingPeerError(f"pip could not install {', '.join(REQUIREMENTS)}: {said[-1]}")
    ready.write_text("\n".join(REQUIREMENTS))
    return python


def _working_python() -> Path:
    """An interpreter that annbatch runs on. Those that pyenv puts on the PATH refuse unless they were chosen."""
    candidates = [Path(sys.executable)] if sys.version_info >= (3, 12) else []
    candidates += [Path(found) for name in _PYTHONS if (found := shutil.which(name))]
    candidates += [path for name in _PYTHONS for path in sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}"))]
    for python in candidates:
        if subprocess.run([python, "-c", "import ensurepip"], capture_output=True, check=False).returncode == 0:
            return python
    raise MissingPeerError(f"annbatch needs one of {', '.join(_PYTHONS)}, and none is on the PATH")


class Peer:
    """A process that reads epochs of float32 batches from a Zarr array of the rows in a file of bfloat16 bits.

    Settings: `bits`, `width`, the array's `folder`, `batch_size`, `epochs`, and what `DEFAULTS` names.
    """

    def __init__(self, python: Path, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [python, "-I", "-W", "ignore", _EPOCHS, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.sum_of_bits: int = self._answer()["sum_of_bits"]
        """Of all values that an epoch delivered."""

    def epochs(self) -> float:
        """Read as many as were set; how many seconds they took."""
        print(file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def _answer(self) -> Any:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"annbatch's process ended with {self._process.wait()}; what it said stands above")
        return json.loads(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()
