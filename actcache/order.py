"""Stable permutations from integer keys: the one source of every order in the project.

Only raw words of a counter-based bit generator are used. numpy promises that these never change (it makes no such
promise for `Generator.permutation`), so an order saved today can be continued after any upgrade.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(n)` that depends on nothing but `n` and the integers of the key.

    Philox-4x64 keyed by the sha256 of the integers writes n random words; the low bits of each word are replaced by its
    index, so that all keys differ and every sorting algorithm gives one result; the sorted keys' low bits are the
    permutation. That leaves 64 - log2(n) random bits a key, and lets numpy use its fastest sort.
    """
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    keys = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)).random_raw(n)
    index_bits = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    keys &= ~index_bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= index_bits
    return keys.view(np.int64)
