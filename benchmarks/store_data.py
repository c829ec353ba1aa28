"""The rows that the store's benchmarks write, recorded once from the embedded model.

In: a number of sequences. Out: residual streams in memory, and the settings of a store for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numcodecs
import numpy as np
import torch
from measure import embedded
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store.codecs.steps import Compressor
from actcache.store.format.site_arrays import arrays_of
from actcache.store.format.sizes import default_sizes

SITES = ["blocks.*.hook_resid_mid", "blocks.*.hook_resid_post"]
_BATCH_SEQUENCES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What is written: tokens, and for each site the rows in reading order, as bits of bfloat16."""

    blocks: TokenBlocks
    rows: dict[str, NDArray[np.uint16]]

    @property
    def gigabytes(self) -> float:
        """All sites, uncompressed."""
        return sum(rows.nbytes for rows in self.rows.values()) / 1e9

    def spec(self, codec: str) -> StoreSpec:
        """Three shards, chunks of the default size."""
        n, length = self.blocks.n_sequences, self.blocks.sequence_length
        widths = [rows.shape[1] for rows in self.rows.values()]
        per_shard, per_chunk = default_sizes(widths, "bfloat16", n, length - 1, -(-n // 3))
        return StoreSpec(
            sites=tuple(Site(name=name, shape=(rows.shape[1],), codec=codec) for name, rows in self.rows.items()),
            n_sequences=n,
            sequence_length=length,
            sequences_per_shard=per_shard,
            rows_per_chunk=per_chunk,
            text={"tokens": self.blocks.digest()},
        )


def recorded(n_sequences: int) -> Data:
    """Run the embedded model once and keep its residual streams in memory."""
    lm, blocks = embedded(n_sequences)
    sites = lm.resolve(SITES)
    per_sequence = blocks.sequence_length - 1
    rows = {s.site.name: np.empty((n_sequences * per_sequence, s.site.width), np.uint16) for s in sites}
    for first in range(0, n_sequences, _BATCH_SEQUENCES):
        ids = np.asarray(blocks.ids[first : first + _BATCH_SEQUENCES])
        for name, acts_QTD in lm.capture(ids, sites).items():
            target = torch.from_numpy(rows[name][first * per_sequence : (first + len(ids)) * per_sequence])
            target.view(torch.bfloat16).copy_(acts_QTD[:, 1:].flatten(0, 1))
    return Data(blocks=blocks, rows=rows)


def of_shard(data: Data, spec: StoreSpec, site: str, shard: int) -> NDArray[np.uint16]:
    """The rows of a site that make a shard, in reading order."""
    rows = spec.shard_rows(shard)
    return data.rows[site][rows.start : rows.stop]


def compressor_of(spec: StoreSpec) -> Compressor:
    """The preset's one compressor, as the store calls it."""
    return arrays_of(spec, spec.sites[0])[0].chain.compressors[0]


def expander_of(spec: StoreSpec) -> Any:
    """What expands its frames, as numcodecs itself offers it."""
    step: Any = compressor_of(spec)
    shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[step.shuffle]
    return numcodecs.Blosc(cname=step.cname, clevel=step.clevel, shuffle=shuffle, blocksize=step.blocksize)
