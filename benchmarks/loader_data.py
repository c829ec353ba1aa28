"""What the loader's benchmarks read: rows of 768 real values, and stores of them.

In: a number of sequences. Out: rows in memory, and a sealed store of them in a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from store import write_store
from store_data import Data, recorded

from actcache.store import Store

STREAMS = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_mid")
SITE = STREAMS[0]
BATCH_ROWS = 4096
_TOKENS = 6


def wide(n_sequences: int, streams: Sequence[str] = (SITE,)) -> Data:
    """Residual streams of the embedded model, 128 wide, that of each token beside those of the next five.

    255 rows a sequence. Streams of several layers side by side would not do: they resemble each other, and a codec
    finds that within a row, as it never does in a site of a real model.
    """
    data = recorded(n_sequences)
    rows = {
        name: np.concatenate([np.roll(data.rows[name], -n, axis=0) for n in range(_TOKENS)], axis=1) for name in streams
    }
    return Data(blocks=data.blocks, rows=rows)


def store_of(data: Data, codec: str, folder: Path) -> Store:
    """A sealed store of them: three shards, chunks of the default size."""
    return write_store(data, data.spec(codec), folder / f"{codec}.zarr")
