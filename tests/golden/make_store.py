"""Makes the golden store of a format version, once: `python tests/golden/make_store.py`, from the root of the project.

`v1.zarr` and what is known of it, `v1.json`, are never rewritten: stores like it lie on the disks of others, and every
later version has to open them. A new format version gets a golden store of its own beside it.

The values need no model and no random generator that may change: they are made from raw words of Philox, which numpy
promises to keep, and set at the places where a store could go wrong: NaN with a payload, infinities, zeros of both
signs, subnormals, a row without a number, features a thousand times larger than the rest, rows left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import Store, StoreWriter, open_store, verify
from actcache.store.format.root import FORMAT_VERSION

FOLDER = Path(__file__).parent
NAME = f"v{FORMAT_VERSION}"
LOSSLESS, INT8 = "blocks.0.attn.hook_z", "blocks.1/mlp out 100%"
LARGE_FEATURES = {2: 10, 7: 3}
"""Features of the int8 site, and the powers of two that they are larger by."""


def words(n: int, key: int) -> NDArray[np.uint64]:
    """`n` words that never change."""
    raw: NDArray[np.uint64] = np.random.Philox(key=np.array([key, 0], np.uint64)).random_raw(n)
    return raw


def values(n_rows: int, width: int, key: int) -> NDArray[np.uint16]:
    """`(n_rows, width)` bits of bfloat16 numbers, bell-shaped around zero: exact sums of the bytes of a word."""
    total = words(n_rows * width, key).view(np.uint8).reshape(n_rows, width, 8).sum(axis=-1, dtype=np.int32)
    floats = (total - 1020).astype(np.float32) / np.float32(128)
    return (floats.view(np.uint32) >> 16).astype(np.uint16)


def blocks() -> TokenBlocks:
    """12 sequences of 11 tokens from 5 texts."""
    ids = (words(12 * 11, 1) % np.uint64(1000)).astype(np.uint32).reshape(12, 11)
    document = np.sort((words(12 * 11, 2) % np.uint64(5)).astype(np.uint32)).reshape(12, 11)
    return TokenBlocks(ids=ids, document=document, description={"made_by": "tests/golden/make_store.py"})


def spec() -> StoreSpec:
    """Two shards, the second one partial, of several chunks each."""
    exponents = tuple(LARGE_FEATURES.get(feature, 0) for feature in range(24))
    return StoreSpec(
        sites=(
            Site(name=LOSSLESS, shape=(4, 8), codec="lossless"),
            Site(name=INT8, shape=(24,), codec="int8", feature_exponents=exponents),
        ),
        n_sequences=12,
        sequence_length=11,
        sequences_per_shard=8,
        rows_per_chunk=20,
        seed=7,
        model={"name": "no model"},
        text={**blocks().description, "tokens": blocks().digest()},
    )


def rows() -> dict[str, NDArray[np.uint16]]:
    """`(12, 10, D)` values of each site."""
    lossless, int8 = values(120, 32, 3), values(120, 24, 4)
    lossless[5, :10] = [0x7FC0, 0x7F81, 0xFFFF, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x807F, 0x7F7F]
    lossless[40], lossless[41] = 0x0000, 0x8000
    for feature, power in LARGE_FEATURES.items():
        int8[:, feature] = np.where(int8[:, feature] & 0x7FFF, int8[:, feature] + (power << 7), int8[:, feature])
    int8[9], int8[10, 3], int8[11, 4] = 0x0000, 0x7FC0, 0xFF80
    return {LOSSLESS: lossless.reshape(12, 10, 32), INT8: int8.reshape(12, 10, 24)}


def kept(shard: int) -> NDArray[np.bool_] | None:
    """The first shard leaves the last three rows of two sequences out, as for sequences that end early."""
    if shard:
        return None
    mask = np.ones((8, 10), bool)
    mask[[1, 6], -3:] = False
    return mask.reshape(-1)


def write(path: Path) -> Store:
    """Write the store through the writer."""
    text = blocks()
    with StoreWriter(path, spec(), text) as writer:
        for shard in writer.pending():
            buffers, sequences = writer.acquire(shard), writer.spec.shard_sequences(shard)
            mask = kept(shard)
            for site in writer.sites:
                given = rows()[site.name][sequences.start : sequences.stop].reshape(-1, site.width)
                given = given if mask is None else given[mask]
                buffers.rows[site.name][: len(given)] = given
            writer.submit(buffers, text.ids[sequences.start : sequences.stop], mask)
        return writer.finish()


def sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def arrays_of(path: Path) -> dict[str, str]:
    """sha256 of the values of every array, as zarr alone reads them."""
    import zarr

    members = sorted(zarr.open_group(path, mode="r").members(max_depth=None))
    return {name: sha256(member[...]) for name, member in members if isinstance(member, zarr.Array)}


def facts_of(store: Store) -> dict[str, Any]:
    """What has to be true of the store for ever."""
    return {
        "fingerprint": store.fingerprint,
        "n_rows": store.n_rows,
        "row_ids": sha256(store.row_ids()),
        "arrays": arrays_of(Path(store.path)),
        "rows": {site: sha256(store.read_stored(site, slice(None))) for site in store.sites},
        "stats": {site: store.stats(site).summary() for site in store.sites},
        "bytes": store.info()["bytes"],
    }


def main() -> None:
    path, known = FOLDER / f"{NAME}.zarr", FOLDER / f"{NAME}.json"
    if path.exists() or known.exists():
        sys.exit(f"{path} is there, and a golden store is never rewritten")
    write(path)
    faults = verify(path)
    if faults:
        sys.exit(f"not sound: {faults}")
    known.write_text(json.dumps(facts_of(open_store(path)), indent=1) + "\n")
    files = [file for file in path.rglob("*") if file.is_file()]
    print(f"{path}: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
