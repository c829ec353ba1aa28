"""Whether text that a sparse MLP is evaluated on was also trained on.

In: the facts of the training store, and token blocks. Out: that store, and a warning if it has much of the text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError

if TYPE_CHECKING:
    from actcache.spec import TokenBlocks
    from actcache.store import Store

_PASSAGE_TOKENS = 24
_SHARED_AT_MOST = 0.2
"""Share of passages that simple texts have in common by chance."""


def training_store(facts: Mapping[str, Any]) -> Store | None:
    """The store that a run was trained on, if it can still be opened there and is the same."""
    from actcache.store import open_store

    try:
        store = open_store(facts["path"])
    except (ActcacheError, OSError):  # a URL may need credentials that are missing here
        return None
    return store if store.fingerprint == facts.get("fingerprint") else None


def warn_of_overlap(trained_on: Store, blocks: TokenBlocks) -> None:
    """Warn if many passages of the blocks are in the training store."""
    shared = np.isin(_passages(blocks.ids), _passages(trained_on.tokens())).mean()
    if shared > _SHARED_AT_MOST:
        warnings.warn(
            f"{shared:.0%} of this text is in {trained_on.path} too, so it is not held out and the results flatter; "
            "take other text, or leave out what was read before (--skip-documents)",
            stacklevel=3,
        )


def _passages(ids_QT: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A hash of every passage of 24 tokens (fewer in shorter sequences)."""
    length = min(_PASSAGE_TOKENS, ids_QT.shape[1])
    n_starts = ids_QT.shape[1] - length + 1
    hashes = np.zeros((len(ids_QT), n_starts), np.uint64)
    for offset in range(length):
        # A polynomial in an odd multiplier, modulo 2**64: numpy's integers wrap.
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += ids_QT[:, offset : offset + n_starts]
    return hashes.ravel()
