"""What made a result: versions of libraries, and the machine."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from actcache._version import __version__

_LIBRARIES = ("actcache", "torch", "transformers", "transformer-lens", "zarr", "numcodecs", "numpy")


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


_PACKAGES = ("torch", "zarr", "numcodecs", "numpy", "transformer-lens", "datasets")


def versions() -> dict[str, str]:
    """Versions of this library, of Python, and of the packages that decide results."""
    found = {"actcache": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and system."""
    # os.sched_getaffinity knows about containers and taskset, but exists on Linux only.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"processor": _processor(), "cores": cores, "system": f"{platform.system()} {platform.release()}"}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
