"""Batches as numpy arrays, on the memory that the loader made them in; JAX runs beside, where it is installed."""

from __future__ import annotations

import sys

import numpy as np
import peers
import pytest
import torch

from actcache.adapters.arrays import as_numpy, numpy_batches
from actcache.errors import ConfigError
from actcache.load import Loader

ARRAYS = "peers/jax_arrays.py"
SITE, OTHER = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    return peers.Results([ARRAYS], ["jax"], tmp_path_factory.mktemp("jax"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", peers.tests_in(ARRAYS))
def test_jax(results: peers.Results, name: str) -> None:
    results.check(name)


def loader_of(store, **changes):
    return Loader(store, ["*"], **{"batch_rows": 50, "seed": 3, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_are_the_loaders_batches_and_stay_what_they_are(small_store, dtype):
    settings = {"dtype": getattr(torch, dtype), "epochs": 3, "drop_last": False}
    expected = list(loader_of(small_store, **settings))
    kept = list(numpy_batches(loader_of(small_store, **settings)))
    assert len(kept) == len(expected)
    for batch, other in zip(kept, expected, strict=True):
        assert batch.keys() == {SITE, OTHER, "rows"}
        assert batch["rows"].tolist() == other.rows.tolist()
        for site in (SITE, OTHER):
            assert batch[site].dtype.name == dtype
            assert np.array_equal(batch[site].astype(np.float32), other[site].float().numpy())


def test_bits_of_bfloat16_need_no_other_package(small_store, monkeypatch):
    expected = list(loader_of(small_store, dtype=torch.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for batch, other in zip(
        numpy_batches(loader_of(small_store, dtype=torch.bfloat16), bfloat16="uint16"), expected, strict=True
    ):
        assert batch[SITE].dtype == np.uint16
        assert np.array_equal((batch[SITE].astype(np.uint32) << 16).view(np.float32), other[SITE].float().numpy())
    with pytest.raises(ConfigError, match=r"pip install ml_dtypes.*bfloat16=\"uint16\".*dtype=torch\.float32"):
        next(numpy_batches(loader_of(small_store, dtype=torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_array_is_the_tensors_memory(small_store, dtype):
    batch = next(iter(loader_of(small_store, dtype=dtype)))
    array = as_numpy(batch[SITE])
    assert array.ctypes.data == batch[SITE].data_ptr()
    assert array.flags.writeable
    array[0, 0] = 7
    assert batch[SITE][0, 0] == 7


def test_arrays_of_other_devices_are_refused():
    with pytest.raises(ConfigError, match=r'on the CPU, not on meta: device="cpu"'):
        as_numpy(torch.zeros(2, device="meta"))
