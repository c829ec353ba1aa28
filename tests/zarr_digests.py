"""Every array of a store as zarr alone sees it: one line of JSON a array, with its shape, dtype and sha256.

The tests run this file in an environment that has nothing but zarr: `python zarr_digests.py STORE`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def array_paths(store: str | Path) -> list[str]:
    """Where the arrays of a store lie in it, found by their metadata and not by what they are expected to be."""
    root = Path(store)
    files = (file for file in root.rglob("zarr.json") if json.loads(file.read_text())["node_type"] == "array")
    return sorted(file.parent.relative_to(root).as_posix() for file in files)


def digest(values: Any) -> dict[str, Any]:
    """Shape, dtype and sha256 of an array's values."""
    whole = np.ascontiguousarray(values)
    return {"shape": list(whole.shape), "dtype": whole.dtype.str, "sha256": hashlib.sha256(whole).hexdigest()}


def main() -> None:
    import zarr

    group = zarr.open_group(sys.argv[1], mode="r")
    found = {path: digest(group[path][:]) for path in array_paths(sys.argv[1])}
    print(json.dumps({"zarr": zarr.__version__, "arrays": found}))


if __name__ == "__main__":
    main()
