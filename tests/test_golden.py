"""The golden store: what a format version once wrote opens for ever, with the same values, and can be grown.

`golden/make_store.py` made it; it is never rewritten.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import make_store

from actcache.load import Loader
from actcache.spec import TokenBlocks
from actcache.store import Store, StoreWriter, delete_sites, export, open_store, verify
from actcache.store.codecs.int8 import Int8
from actcache.store.codecs.quantiser import decode_rows

GOLDEN = Path(__file__).parent / "golden" / "v1.zarr"


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def golden() -> Store:
    return open_store(GOLDEN)


def test_it_opens_and_is_sound(golden, known):
    assert golden.sealed
    assert golden.fingerprint == known["fingerprint"]
    assert golden.n_rows == known["n_rows"] < golden.spec.n_rows
    assert verify(GOLDEN) == []


def test_every_array_has_the_values_it_had(known):
    assert make_store.arrays_of(GOLDEN) == known["arrays"]


def test_rows_and_statistics_are_what_they_were(golden, known):
    facts = make_store.facts_of(golden)
    for site, stats in facts.pop("stats").items():
        assert stats == pytest.approx(known["stats"][site], rel=1e-12)
    assert facts == {name: value for name, value in known.items() if name != "stats"}


def test_rows_are_those_that_were_given(golden):
    """Against the values themselves, which are made again from integers, not against digests."""
    table, given = golden.row_table(), make_store.rows()
    found = golden.read_stored(make_store.LOSSLESS, slice(None))
    np.testing.assert_array_equal(found, given[make_store.LOSSLESS][table["sequence"], table["position"] - 1])
    assert np.array_equal(golden.tokens(), make_store.blocks().ids)
    wanted = floats(given[make_store.INT8][table["sequence"], table["position"] - 1])
    restored = floats(golden.read_stored(make_store.INT8, slice(None)))
    strange = ~np.isfinite(wanted).all(axis=1)
    assert strange.sum() == 2
    assert np.isnan(restored[strange]).all()
    exponents = np.array(golden.spec.site(make_store.INT8).feature_exponents)
    wanted, restored = wanted[~strange], restored[~strange]
    scale = np.abs(wanted / np.exp2(exponents)).max(axis=1, keepdims=True) / 127 * (1 + 2**-7)
    # Half a step, and the rounding of the result to a bfloat16.
    allowed = scale * np.exp2(exponents) / 2 + np.abs(wanted) * 2**-8
    assert (np.abs(wanted - restored) <= allowed).all()


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def test_it_is_loaded_row_by_row(golden):
    seen = []
    for batch in Loader(golden, golden.sites, batch_rows=7, drop_last=False):
        seen += batch.rows.tolist()
    assert sorted(seen) == golden.row_ids().tolist()


def test_what_is_written_today_holds_the_same_values(golden, known, tmp_path):
    """Compressed bytes, and with them records and fingerprint, may change with a compressor; values may not."""
    make_store.write(tmp_path / "today.zarr")
    today = make_store.arrays_of(tmp_path / "today.zarr")
    assert today.keys() == known["arrays"].keys()
    depends_on_bytes = ("commit", "ledger", "stats", "total")
    same = [name for name in today if not name.endswith(depends_on_bytes)]
    assert len(same) == 8
    assert {name: today[name] for name in same} == {name: known["arrays"][name] for name in same}


def test_a_copy_of_it_grows(golden, tmp_path):
    path = tmp_path / "grown.zarr"
    shutil.copytree(GOLDEN, path)
    old, more = make_store.blocks(), make_store.words(3 * 11, 9).reshape(3, 11) % np.uint64(1000)
    more_tokens = TokenBlocks(ids=more.astype(np.uint32), document=np.full((3, 11), 5, np.uint32), description={})
    blocks = old.join(more_tokens)
    spec = replace(golden.spec, n_sequences=15, text={**golden.spec.text, "tokens": blocks.digest()})
    rows = {
        site.name: np.concatenate(
            [make_store.rows()[site.name], make_store.values(30, site.width, 5).reshape(3, 10, -1)]
        )
        for site in spec.sites
    }
    with StoreWriter(path, spec, blocks, grow=True) as writer:
        assert writer.pending() == [1]
        buffers = writer.acquire(1)
        for site in writer.sites:
            buffers.rows[site.name][:70] = rows[site.name][8:].reshape(70, site.width)
        writer.submit(buffers, blocks.ids[8:])
        grown = writer.finish()
    assert grown.sealed
    assert verify(path) == []
    assert grown.n_rows == golden.n_rows + 30
    first = np.arange(74)  # the first shard is as it was
    for site in golden.sites:
        assert np.array_equal(grown.read_stored(site, first), golden.read_stored(site, first))
    table = grown.row_table()
    expected = rows[make_store.LOSSLESS][table["sequence"], table["position"] - 1]
    assert np.array_equal(grown.read_stored(make_store.LOSSLESS, slice(None)), expected)
    delete_sites(path, [make_store.LOSSLESS])
    assert verify(path) == []


def test_it_can_be_exported(golden, tmp_path):
    copy = export(golden, tmp_path / "copy.zarr", codec="raw")
    assert verify(copy.objects) == []
    for site in golden.sites:
        assert np.array_equal(copy.read_stored(site, slice(None)), golden.read_stored(site, slice(None)))


def test_its_int8_rows_are_code_times_scale(golden):
    """The formula of `docs/format.md`, on the arrays as zarr alone reads them."""
    import zarr

    group = zarr.open_group(GOLDEN, mode="r")
    names = {array.attrs["hook"]: path for path, array in group.members(max_depth=None) if path.endswith("/acts")}
    site = group[names[make_store.INT8].removesuffix("/acts")]
    codes, bits = site["acts"][:], site["scale"][:]
    scale = (bits.astype(np.uint32) << 16).view(np.float32)
    exponents = np.array(site["acts"].attrs["feature_exponents"])
    values = codes * scale[:, None] * np.exp2(exponents).astype(np.float32)
    ours = np.empty(codes.shape, np.float32)
    decode_rows(Int8(), (codes, bits), np.exp2(exponents, dtype=np.float32), ours)
    np.testing.assert_array_equal(values, ours)
