"""Another quantiser is one class and one preset: stores, loaders, devices and checks take it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.auditing.compare import row_errors
from actcache.errors import StoreVersionError
from actcache.kernels.bits import NAN, round_bits_up, widen, widen_bits
from actcache.load import Loader
from actcache.load.batches import maker
from actcache.load.device.link import DeviceLink
from actcache.load.device.streams import PlainStream
from actcache.spec import Site
from actcache.store import PRESETS, Store, export, open_store, verify
from actcache.store.codecs import StoredArray, expected_row_bytes, parse_codec
from actcache.store.codecs.presets import Preset
from actcache.store.format.keys import sharded_key

GROUP = 4
SITES = (Site(name="even", shape=(12,)), Site(name="odd", shape=(7,)), Site(name="heads", shape=(2, 5)))


class Int4:
    """Two features a byte, and a scale for every four of them: another dtype, width and shape than any other array."""

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        return (
            StoredArray(name="acts", element="uint8", row_shape=(-(-width // 2),)),
            StoredArray(name="scale", element="bfloat16", row_shape=(-(-width // GROUP),)),
        )

    def fit(self, values: Any, logical: str) -> Any:
        return np.zeros(values.shape[1], np.int8)

    def encode(self, values: Any, logical: str, powers: Any, out: Any) -> None:
        packed, scales = out
        groups = np.zeros((len(values), scales.shape[1], GROUP), np.float32)
        groups.reshape(len(values), -1)[:, : values.shape[1]] = widen(values, logical)
        largest = np.abs(groups).max(axis=2)
        scales[:] = np.where(np.isfinite(largest), round_bits_up(largest / 7), NAN)
        with np.errstate(invalid="ignore", divide="ignore"):
            codes = np.nan_to_num(np.rint(groups / widen_bits(scales)[:, :, None])).clip(-7, 7) + 8
        codes = codes.astype(np.uint8).reshape(len(values), -1)
        packed[:] = (codes[:, 0::2] | codes[:, 1::2] << 4)[:, : packed.shape[1]]

    def decode(self, parts: Any, powers: Any, out: Any) -> None:
        packed, scales = parts
        codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(out), -1)[:, : out.shape[1]]
        out[:] = codes.astype(np.float32) - 8
        out *= np.repeat(widen_bits(scales), GROUP, axis=1)[:, : out.shape[1]]

    def largest_error(self, values: Any, powers: Any) -> Any:
        n_groups = -(-values.shape[1] // GROUP)
        groups = np.zeros((len(values), n_groups * GROUP))
        groups[:, : values.shape[1]] = np.abs(values)
        largest = groups.reshape(len(values), n_groups, GROUP).max(axis=2)
        return np.repeat(largest / 14 * 1.01, GROUP, axis=1)[:, : values.shape[1]]

    def loop(self, parts: Any, powers: Any, *, normalised: bool, rounded: bool) -> None:
        return None

    def device_steps(self, parts: Any, width: int) -> Any:
        packed, scales = parts
        codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :width].float() - 8
        return codes, [(torch.mul, scales.float().repeat_interleave(GROUP, 1)[:, :width])]


@pytest.fixture(scope="module", autouse=True)
def four():
    with pytest.MonkeyPatch.context() as patch:
        preset = Preset(name="int4", codec=Int4(), says="half a byte a value", lossless=False)
        patch.setitem(PRESETS, "int4", preset)
        yield


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """A store, and what was written: one row is not finite, one has a group of zeros."""
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks, "int4", sites=SITES, dtype=request.param)
    bits = random_bits(spec)
    for values in bits.values():
        values[5, 3] = {"bfloat16": 0x7F80}.get(request.param, np.inf)
        values[7, 2, :GROUP] = 0
    store = write_shards(tmp_path_factory.mktemp("int4") / "s.zarr", spec, blocks, bits)
    table = store.row_table()
    return store, {site: widen(v[table["sequence"], table["position"] - 1], spec.dtype) for site, v in bits.items()}


def as_stored(store: Store) -> dict[str, np.ndarray]:
    """float32 values of all rows, from the arrays as zarr-python reads them."""
    found, group = {}, zarr.open_group(store.path, mode="r")
    for site in store.spec.sites:
        found[site.name] = np.empty((store.n_rows, site.width), np.float32)
        arrays = group[f"sites/{site.name}"]
        assert arrays["acts"].attrs["codec"] == "int4"
        assert arrays["scale"].shape == (store.n_rows, -(-site.width // GROUP))
        Int4().decode((arrays["acts"][:], arrays["scale"][:]), None, found[site.name])
    return found


def test_a_store_reads_what_was_written_as_far_as_it_is_kept(written):
    store, values = written
    assert verify(store.path) == []
    for site, stored in as_stored(store).items():
        read, exact = store.read(site, slice(None)), values[site].astype(np.float64)
        torch.testing.assert_close(read, torch.from_numpy(stored).to(read.dtype), rtol=0, atol=0, equal_nan=True)
        finite = np.isfinite(exact).all(axis=1)
        assert (~np.isfinite(stored)).any(axis=1).tolist() == (~finite).tolist()
        error = np.abs(stored[finite] - exact[finite])
        assert (error <= Int4().largest_error(exact[finite], None)).all()
        assert error.max() > 0.01
        about = store.spec.site(site)
        assert row_errors(store.spec, about, exact, read.double().numpy()).max() < 2**-7
        assert store.info()["sites"][site]["bytes"] > expected_row_bytes("int4", store.spec.dtype, about.width) * len(
            exact
        )


@pytest.mark.parametrize("normalize", [None, "center-rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loader_without_a_loop_gathers_and_decodes(written, monkeypatch, dtype, normalize):
    store, _ = written
    stored = as_stored(store)
    settings = {"batch_rows": 20, "memory": 6000, "threads": 2, "dtype": dtype, "normalize": normalize, "epochs": 2}
    with Loader(store, ["*"], **settings) as loader:
        here = list(loader)
    assert loader.plan.n_windows >= 2
    for batch in here:
        for site in batch:
            expected, done = torch.from_numpy(stored[site][batch.rows]), loader.normalization.get(site)
            if done is not None:
                expected = (expected - torch.from_numpy(done.mean)) * np.float32(done.scale)
            assert torch.equal(batch[site].isnan(), expected.to(dtype).isnan())
            assert torch.equal(batch[site].nan_to_num(), expected.to(dtype).nan_to_num())
    monkeypatch.setattr(maker, "link_to", lambda _: DeviceLink(torch.device("cpu"), PlainStream))
    with Loader(store, ["*"], **settings) as loader:
        for there, batch in zip(loader, here, strict=True):
            for site in batch:
                assert torch.equal(there[site].nan_to_num(), batch[site].nan_to_num())


def test_a_store_is_exported_from_it_and_into_it(written, tmp_path):
    store, _ = written
    plain = export(store, tmp_path / "raw.zarr", codec="raw")
    again = export(plain, tmp_path / "int4.zarr", codec={"even": "int4", "*": parse_codec("lossless")})
    for site in store.sites:
        read = store.read(site, slice(None))
        assert torch.equal(plain.read(site, slice(None)).nan_to_num(), read.nan_to_num())
        assert torch.equal(again.read(site, slice(None)).isnan(), read.isnan())
    assert [site.codec for site in again.spec.sites] == ["int4", "lossless", "lossless"]


def test_damage_to_its_second_array_is_found(written, tmp_path):
    store = export(written[0], tmp_path / "copy.zarr")
    path = Path(store.path) / sharded_key("odd", "scale", 1)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert [(fault.column, fault.shard) for fault in verify(store.path)] == [("odd", 1)]


def test_a_store_of_a_quantiser_that_is_not_known_here_names_it(written, tmp_path, monkeypatch):
    store = export(written[0], tmp_path / "copy.zarr")
    monkeypatch.delitem(PRESETS, "int4")
    with pytest.raises(StoreVersionError, match="no codec preset 'int4'; there are raw, lossless, sparse, int8, or"):
        open_store(store.path)
