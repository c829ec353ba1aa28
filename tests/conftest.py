"""Shared by all tests: small real stores, written through the real writer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packaging.requirements import Requirement
from places import bucket, place, s3  # noqa: F401 (fixtures)

from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import Store, StoreWriter, open_store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models in tests are small: a team of threads costs more than it gains, and far more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests against the S3 server are exhaustive; those that another environment runs are left out here."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "s3" in getattr(item, "fixturenames", ()) or any(isinstance(p, str) and p == "s3" for p in parameters):
            item.add_marker(pytest.mark.exhaustive)
    elsewhere = [item for item in items if not all(is_installed(mark.args[0]) for mark in item.iter_markers("needs"))]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)


def is_installed(requirement: str) -> bool:
    """Whether a package is there, in a version that the requirement allows."""
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with its tokenizer, as transformers saves them: 5 layers, grouped queries, 512 ids."""
    from lm_models import random_model
    from tokenizers_at_hand import byte_level

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 172, "vocab_size": 512, "max_position_embeddings": 512}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": True}
    random_model("llama", **sizes, **special).save_pretrained(folder)
    byte_level("<|bos|> $A", bos_token="<|bos|>", eos_token="<|end|>").save_pretrained(folder)
    return folder


def random_blocks(n_sequences: int, length: int, seed: int = 0) -> TokenBlocks:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2048, (n_sequences, length)).astype(np.uint32)
    document = np.sort(rng.integers(0, n_sequences, (n_sequences, length)).astype(np.uint32), axis=None)
    document = document.reshape(ids.shape)
    return TokenBlocks(ids=ids, document=document, description={"length": length})


def spec_of(blocks: TokenBlocks, codec: str = "lossless", **changes: Any) -> StoreSpec:
    settings: dict[str, Any] = {
        "sites": (Site(name="blocks.0.hook_mlp_out", shape=(12,)), Site(name="blocks.1.attn.hook_z", shape=(2, 5))),
        "n_sequences": blocks.n_sequences,
        "sequence_length": blocks.sequence_length,
        "sequences_per_shard": 8,
        "rows_per_chunk": 16,
        "model": {"name": "random"},
        "text": {**blocks.description, "tokens": blocks.digest()},
    }
    settings |= changes
    settings["sites"] = tuple(replace(site, codec=codec) for site in settings["sites"])
    return StoreSpec(**settings)


def random_bits(spec: StoreSpec, seed: int = 1) -> dict[str, NDArray[Any]]:
    """`(Q, rows_per_sequence, D)` values of the stored dtype for every site: finite, so that statistics are defined."""
    rng = np.random.default_rng(seed)
    out = {}
    for site in spec.sites:
        values = rng.standard_normal((spec.n_sequences, spec.rows_per_sequence, site.width)).astype(np.float32)
        if spec.dtype == "bfloat16":
            out[site.name] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            out[site.name] = values.astype(spec.dtype)
    return out


def write_shards(
    location: Any,
    spec: StoreSpec,
    blocks: TokenBlocks,
    bits: dict[str, NDArray[Any]],
    shards: Iterable[int] | None = None,
    *,
    grow: bool = False,
) -> Store:
    """Write the pending shards (or those of them that are named) through the real writer."""
    with StoreWriter(location, spec, blocks, grow=grow) as writer:
        for shard in writer.pending():
            if shards is not None and shard not in shards:
                continue
            buffers = writer.acquire(shard)
            sequences = spec.shard_sequences(shard)
            for site in writer.sites:
                rows = bits[site.name][sequences.start : sequences.stop].reshape(-1, site.width)
                buffers.rows[site.name][: len(rows)] = rows
            writer.submit(buffers, blocks.ids[sequences.start : sequences.stop])
        return writer.finish()


@contextmanager
def small_disk_in(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of its own, too small for what is to be written; `grow_disk` makes room."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def grow_disk(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A sealed store of 29 sequences in 4 shards (the last one partial), 2 sites."""
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    path = tmp_path_factory.mktemp("stores") / "small.zarr"
    write_shards(path, spec, blocks, random_bits(spec))
    return open_store(path)
