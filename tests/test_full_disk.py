"""Full disks, wherever something is written: the error names the path and says what to do; nothing is half written."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import grow_disk, random_bits, random_blocks, small_disk_in, spec_of, write_shards

import actcache as ac
from actcache.errors import StorageFullError
from actcache.exchange import export_saelens
from actcache.files import write_whole
from actcache.load import Loader
from actcache.sparse.metrics import write_metrics
from actcache.sparse.model import SparseMLP
from actcache.sparse.training import TrainConfig, Trainer

FILL = "fill"


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A real file system with room for a few kilobytes."""
    with small_disk_in(tmp_path / "disk", "64k") as folder:
        yield folder


def files_of(disk: Path) -> list[str]:
    return sorted(str(file.relative_to(disk)) for file in disk.rglob("*") if file.is_file() and file.name != FILL)


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with open(disk / FILL, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def train(disk: Path, store: ac.Store) -> None:
    mlp = SparseMLP(d_in=12, d_out=12, n_latents=64)
    with Loader(store, store.sites[:1], batch_rows=20, epochs=None) as loader:
        sites = {"site_in": store.sites[0], "site_out": store.sites[0]}
        Trainer(mlp, loader, TrainConfig(n_steps=2, warmup_steps=0), checkpoint=disk / "run", **sites).fit()


WRITERS: dict[str, Callable[[Path, ac.Store], Any]] = {
    "store": lambda disk, store: ac.export(store, disk / "out.zarr"),
    "saelens": lambda disk, store: export_saelens(store, disk / "out"),
    "weights": lambda disk, store: SparseMLP(d_in=64, d_out=64, n_latents=256).save(disk / "run"),
    "checkpoint": train,
    "metrics.json": lambda disk, store: write_metrics(disk / "run", {"layers": []}),
    "report.html": lambda disk, store: write_whole(disk / "run" / "report.html", "x" * 99999),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_error_names_the_path_and_what_to_do_and_nothing_is_half_written(disk, small_store, name):
    fill(disk)
    with pytest.raises(StorageFullError, match=r"no room .*free; make room and give the same") as caught:
        WRITERS[name](disk, small_store)
    assert str(disk) in str(caught.value)
    assert not [name for name in files_of(disk) if not name.endswith(".zarr/tokens/ids/writer")]
    (disk / FILL).unlink()
    grow_disk(disk)
    WRITERS[name](disk, small_store)
    assert files_of(disk)
    assert not [name for name in files_of(disk) if ".partial" in name]


def test_what_was_there_stays(disk):
    write_whole(disk / "a.json", b"old")
    fill(disk)
    with pytest.raises(StorageFullError, match=r"a\.json: 90,000 bytes needed"):
        write_whole(disk / "a.json", bytes(90000))
    assert (disk / "a.json").read_bytes() == b"old"


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_a_full_temporary_folder_is_named(disk, monkeypatch, packing):
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    documents = [np.arange(1000, dtype=np.uint32)] * 100
    with pytest.raises(StorageFullError, match=f"{disk}.*TMPDIR"):
        ac.token_blocks(documents, None, length=100, packing=packing)


def test_no_temporary_folder_with_room_at_all(monkeypatch):
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    with pytest.raises(StorageFullError, match=r"temporary.*'/tmp'.*TMPDIR"):
        ac.token_blocks([np.arange(99, dtype=np.uint32)], None, length=9)


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files_is_said_to_be_one(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    with largest_file(1000), pytest.raises(StorageFullError, match=r"s\.zarr.*ulimit -f"):
        write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    with largest_file(1000), pytest.raises(StorageFullError, match=r"a\.json.*ulimit -f"):
        write_whole(tmp_path / "a.json", bytes(2000))
    assert write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec)).sealed
