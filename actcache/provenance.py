"""What made a result: versions of libraries, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from actcache._version import __version__

_OF_STORES = ("actcache", "torch", "transformers", "transformer-lens", "zarr", "numcodecs", "numpy")
_OF_RUNS = ("torch", "zarr", "numcodecs", "numpy", "transformer-lens", "datasets")


def store_versions() -> dict[str, str]:
    """Versions of the libraries that made a store."""
    return _installed(_OF_STORES)


def versions() -> dict[str, str]:
    """Versions of this library, of Python, and of the packages that decide the results of a run."""
    return {"actcache": __version__, "python": platform.python_version(), **_installed(_OF_RUNS)}


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and system."""
    found = {"processor": processor(), "cores": cores(), "system": f"{platform.system()} {platform.release()}"}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found


def cores() -> int | None:
    """Cores that this process may use."""
    # os.sched_getaffinity knows about containers and taskset, but exists on Linux only.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor() -> str:
    """The processor's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
