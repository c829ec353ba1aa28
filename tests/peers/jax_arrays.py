"""Batches as JAX arrays: the values of the loader, on its memory, and not overwritten while anything holds them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from actcache.adapters.arrays import jax_batches
from actcache.load import Loader

SITE, OTHER = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


def loader_of(store: Any, **changes: Any) -> Loader:
    return Loader(store, ["*"], **{"batch_rows": 50, "seed": 3, "epochs": 3, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arrays_are_the_loaders_batches_and_stay_what_they_are(small_store, dtype):
    expected = list(loader_of(small_store, dtype=dtype))
    kept = list(jax_batches(loader_of(small_store, dtype=dtype)))  # all at once: no buffer is used again meanwhile
    assert len(kept) == len(expected)
    for batch, other in zip(kept, expected, strict=True):
        assert batch.keys() == {SITE, OTHER, "rows"}
        assert batch["rows"].tolist() == other.rows.tolist()
        for site in (SITE, OTHER):
            assert isinstance(batch[site], jax.Array)
            assert batch[site].dtype == str(dtype).removeprefix("torch.")
            assert np.array_equal(np.asarray(batch[site], np.float32), other[site].float().numpy())


def test_no_value_is_copied(small_store):
    for batch in loader_of(small_store):
        (arrays,) = jax_batches([batch])
        for site in batch:
            assert batch[site].data_ptr() % 64 == 0
            assert arrays[site].unsafe_buffer_pointer() == batch[site].data_ptr()


def test_an_autoencoder_learns_in_jax(small_store):
    rng = np.random.default_rng(0)
    weights = {
        "encoder": jnp.asarray(rng.standard_normal((12, 24)) / 4, jnp.float32),
        "decoder": jnp.asarray(rng.standard_normal((24, 12)) / 4, jnp.float32),
    }

    def loss_of(weights: Any, acts: Any) -> Any:
        return jnp.square(jax.nn.relu(acts @ weights["encoder"]) @ weights["decoder"] - acts).mean()

    @jax.jit
    def step(weights: Any, acts: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(weights, acts)
        return jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, weights, gradients), loss

    losses = []
    for batch in jax_batches(loader_of(small_store, epochs=20)):
        weights, loss = step(weights, batch[SITE])
        losses.append(float(loss))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
