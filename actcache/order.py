"""Stable permutations from integer keys: the one source of every order in the project.

Only raw words of a counter-based bit generator are used. numpy promises that these never change (it makes no such
promise for `Generator.permutation`), so an order saved today can be continued after any upgrade.

Every order has a key, and keys of different orders differ in length or in a constant of this module:

    sequences of packed text       (seed of the text,)                              source/pack.py
    rows of a shard                (seed of the store, shard)                       store/writing, store/reading
    chunks of an epoch             (seed of the loader, CHUNK_ORDER, epoch)         load/plan/epochs.py
    rows of a window               (seed of the loader, ROW_ORDER, epoch, window), and the lane if there are several
    shards that a sample verifies  (0,)                                             store/maintenance/verify.py

Estimates use the key of shard 0. The remaining seeds draw something other than permutations: `split_sequences` (see
there), the turns of a `MixedLoader`, and the initial weights of a sparse MLP, for which torch's generator is used.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

CHUNK_ORDER, ROW_ORDER = 1, 2
"""Second integer of the keys of a loader's orders."""


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(n)` that depends only on `n` and the integers of the key.

    Philox-4x64, keyed by the sha256 of the integers, writes n random words. The low bits of each word are replaced by
    its index, so that all words differ and every sorting algorithm gives the same result; the low bits of the sorted
    words are the permutation. That leaves 64 - log2(n) random bits a word, and lets numpy use its fastest sort.
    """
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    keys = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)).random_raw(n)
    index_bits = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    keys &= ~index_bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= index_bits
    return keys.view(np.int64)
