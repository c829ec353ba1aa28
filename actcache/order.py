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

    Philox-4x64 keyed by the sha256 of the integers writes n random words; sorting them (stably, so even equal words
    have one order) gives the permutation. Costs about 100 ns an element.
    """
    digest = hashlib.sha256(",".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")
