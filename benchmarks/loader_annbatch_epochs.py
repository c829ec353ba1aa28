"""annbatch's side of `loader.py`, run by an interpreter of an environment that has annbatch and zarrs.

In: settings as one argument of JSON, then a line whenever epochs are wanted. Out: lines of JSON. The first says
what the bits of an epoch add up to, which is not timed; each other one, how many seconds the epochs took.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
import zarr
from annbatch import Loader  # type: ignore[import-not-found]  # in the other environment only
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

ROWS_PER_SHARD = 65536


def written(settings: dict[str, Any]) -> Any:
    """The rows of a file of bfloat16 bits as a Zarr array, opened again."""
    rows = np.fromfile(settings["bits"], "<u2").reshape(-1, settings["width"])
    values = widened(rows) if settings["as_float32"] else rows
    array = zarr.create_array(
        settings["folder"],
        shape=values.shape,
        chunks=(settings["rows_per_chunk"], values.shape[1]),
        shards=(ROWS_PER_SHARD, values.shape[1]),
        dtype=values.dtype,
        compressors=BloscCodec(**settings["blosc"]) if settings["blosc"] else None,
    )
    array[:] = values
    return zarr.open_array(settings["folder"], mode="r")


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits are the upper half of a float32."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def epoch(loader: Any) -> Iterator[NDArray[np.float32]]:
    """Batches as float32."""
    for batch in loader:
        values = batch["X"]
        yield values if values.dtype == np.float32 else widened(values)


def main() -> None:
    """Write the array, and read it as often as asked."""
    settings = json.loads(sys.argv[1])
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True})
    sizes = {name: settings[name] for name in ("batch_size", "chunk_size", "preload_nchunks")}
    loader = Loader(**sizes, shuffle=True, preload_to_gpu=False).add_datasets([written(settings)])
    bits = sum(int(values.view(np.uint32).sum(dtype=np.uint64)) >> 16 for values in epoch(loader))
    print(json.dumps({"sum_of_bits": bits}), flush=True)
    for _ in sys.stdin:
        began = perf_counter()
        for _ in range(settings["epochs"]):
            for _ in epoch(loader):
                pass
        print(json.dumps({"seconds": perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
