"""A small real store with something to learn: each row is a few of many directions, at sites of two widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import random_blocks, spec_of, write_shards

from actcache.spec import Site
from actcache.store import Store

SITE, TARGET, WIDE = "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"
WIDTHS = {SITE: 24, TARGET: 24, WIDE: 40}
N_LATENTS = 48


def planted_store(folder: Path) -> Store:
    """250 sequences of 16 rows, bfloat16: the same latents, 3 of 48 active on average, in directions of each site."""
    rng = np.random.default_rng(11)
    blocks = random_blocks(250, 17)
    sites = tuple(Site(name=name, shape=(width,)) for name, width in WIDTHS.items())
    spec = spec_of(blocks, sites=sites, sequences_per_shard=32, rows_per_chunk=64, skip_first=1)
    shape = (spec.n_sequences, spec.rows_per_sequence, N_LATENTS)
    latents = rng.exponential(2.0, shape) * (rng.random(shape) < 3 / N_LATENTS)
    bits = {}
    for site in spec.sites:
        directions = rng.standard_normal((N_LATENTS, site.width))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        values = (latents @ directions + 0.3 + 0.01 * rng.standard_normal((*shape[:2], site.width))).astype(np.float32)
        bits[site.name] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return write_shards(folder / "planted.zarr", spec, blocks, bits)
