"""Crashes and damage: nothing is lost, nothing wrong is ever read, and verify names exactly what is wrong."""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from zarr.storage import MemoryStore

from actcache.errors import ActcacheError, CorruptShardError, StorageFullError, StoreNotFoundError
from actcache.store import Store, open_store, repair, verify
from actcache.store.objects import Objects


class Died(BaseException):
    """Stands for the sudden end of the process: no handler of ours catches it."""


class FailingStore(MemoryStore):
    """A store in memory whose k-th put, and every later one, fails."""

    def __init__(self, puts_left: int, error: BaseException) -> None:
        super().__init__()
        self.puts_left, self.error = puts_left, error

    async def set(self, key, value, byte_range=None):
        if self.puts_left == 0:
            raise self.error
        self.puts_left -= 1
        await super().set(key, value, byte_range)

    async def set_if_not_exists(self, key, value):
        if not await self.exists(key):
            await self.set(key, value)


def contents(store: MemoryStore) -> dict[str, bytes]:
    return {key: value.to_bytes() for key, value in store._store_dict.items()}


@pytest.fixture(scope="module")
def plan():
    blocks = random_blocks(11, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    return blocks, spec, random_bits(spec)


@pytest.fixture(scope="module")
def unbroken(plan):
    blocks, spec, bits = plan
    counting = FailingStore(10**9, Died())
    store = write_shards(counting, spec, blocks, bits)
    return contents(counting), store.fingerprint, 10**9 - counting.puts_left


@pytest.mark.parametrize("error", [OSError("the disk went away"), Died()], ids=["error", "sudden death"])
def test_failing_at_every_put_ends_in_the_same_bytes(plan, unbroken, error):
    blocks, spec, bits = plan
    expected, fingerprint, n_puts = unbroken
    assert n_puts > 3 * (2 * 2 + 3 + 3)
    for k in range(n_puts):
        location = FailingStore(k, error)
        with pytest.raises((OSError, Died)):
            write_shards(location, spec, blocks, bits)
        location.puts_left = -1
        finished = write_shards(location, spec, blocks, bits)
        assert finished.fingerprint == fingerprint, f"put {k}"
        assert contents(location) == expected, f"put {k}"


def test_a_full_disk_is_a_clear_error_and_the_same_call_finishes(plan, unbroken):
    blocks, spec, bits = plan
    location = FailingStore(40, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageFullError, match=r"bytes needed, .* free; make room and give the same command again"):
        write_shards(location, spec, blocks, bits)
    location.puts_left = -1
    assert write_shards(location, spec, blocks, bits).fingerprint == unbroken[1]


def objects_of(store: Store) -> list[Path]:
    root = Path(store.path)
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != "zarr.json")


def read_everything(path: Path) -> list[bytes]:
    store = open_store(path)
    sites = [store.read(site, slice(None)).view(torch.uint8).numpy().tobytes() for site in store.sites]
    tables = [values.tobytes() for values in store.row_table().values()]
    tokens = [store.tokens(name).tobytes() for name in ("ids", "document")]
    stats = [store.stats(site).mean.tobytes() for site in store.sites]
    return sites + tables + tokens + stats


@pytest.fixture
def copy(tmp_path, small_store):
    shutil.copytree(small_store.path, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def test_a_sound_store_verifies(small_store):
    seen = []
    assert verify(small_store.path, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (12, 12)


def test_every_flip_truncation_and_deletion_is_noticed(copy, small_store):
    """Random damages: reading gives an error or the right values, and verify finds each one."""
    rng = np.random.default_rng(0)
    sound = read_everything(copy)
    files = objects_of(open_store(copy))
    for i in range(250):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        kind = ("flip", "flip", "truncate", "delete")[rng.integers(4)]
        if kind == "flip":
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
        elif kind == "truncate":
            file.write_bytes(data[: rng.integers(len(data))])
        else:
            file.unlink()
        where = f"damage {i}: {kind} {file}"
        with contextlib.suppress(CorruptShardError):
            assert read_everything(copy) == sound, where
        faults = verify(copy)
        assert faults, where
        file.write_bytes(data)
    assert verify(copy) == []


def test_faults_name_site_shard_and_reason(copy):
    store = open_store(copy)
    (copy / "sites/blocks.1.attn.hook_z/acts/c.2.0").unlink()
    file = copy / "sites/blocks.0.hook_mlp_out/acts/c.1.0"
    file.write_bytes(file.read_bytes()[:50])
    (copy / "rows/token/c.0").write_bytes(b"")
    found = {(fault.column, fault.shard): fault.reason for fault in verify(copy)}
    assert set(found) == {("blocks.1.attn.hook_z", 2), ("blocks.0.hook_mlp_out", 1), ("rows", 0)}
    assert "missing" in found["blocks.1.attn.hook_z", 2]
    assert "truncated" in found["blocks.0.hook_mlp_out", 1]
    with pytest.raises(CorruptShardError, match=r"shard 2 of blocks\.1\.attn\.hook_z .* missing: there is no .*; run 'actcache verify"):
        store.read("blocks.1.attn.hook_z", slice(None))


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_swapped_and_stale_objects_are_noticed(tmp_path, codec):
    blocks = random_blocks(24, 9)
    spec = spec_of(blocks, codec=codec)
    path = tmp_path / "s.zarr"
    write_shards(path, spec, blocks, random_bits(spec))
    write_shards(tmp_path / "other.zarr", spec, blocks, random_bits(spec, seed=5))
    key = "sites/blocks.0.hook_mlp_out/acts/c.{}.0"
    first, second = (path / key.format(0)).read_bytes(), (path / key.format(1)).read_bytes()
    (path / key.format(0)).write_bytes(second)
    (path / key.format(1)).write_bytes(first)
    assert {fault.shard for fault in verify(path)} == {0, 1}
    with pytest.raises(CorruptShardError, match="not the one that was committed"):
        open_store(path).read("blocks.0.hook_mlp_out", [0])
    (path / key.format(0)).write_bytes((tmp_path / "other.zarr" / key.format(0)).read_bytes())
    (path / key.format(1)).write_bytes(second)
    assert [(f.column, f.shard) for f in verify(path)] == [("blocks.0.hook_mlp_out", 0)]


def test_repair_uncommits_only_the_bad_shards_and_the_same_call_mends_them(copy, small_store):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    (copy / "sites/blocks.1.attn.hook_z/acts/c.2.0").unlink()
    untouched = (copy / "sites/blocks.1.attn.hook_z/acts/c.1.0").stat().st_mtime_ns
    assert repair(copy, verify(copy)) == [2]
    assert open_store(copy).committed == [0, 1, 3]
    finished = write_shards(copy, spec, blocks, random_bits(spec))
    assert finished.fingerprint == small_store.fingerprint
    assert (copy / "sites/blocks.1.attn.hook_z/acts/c.1.0").stat().st_mtime_ns == untouched
    assert verify(copy) == []


@pytest.mark.parametrize("victim", ["ledger/c.0.0.0", "sites/blocks.1.attn.hook_z/total/c.0"])
def test_a_damaged_ledger_or_total_blames_no_shard_and_is_made_again(copy, small_store, victim):
    data = bytearray((copy / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / victim).write_bytes(data)
    assert [(fault.column, fault.shard) for fault in verify(copy)] == [("ledger", -1)]
    assert repair(copy, verify(copy)) == []
    assert verify(copy) == []
    assert open_store(copy).fingerprint == small_store.fingerprint


def test_changed_attributes_are_noticed_and_not_blessed(copy):
    root = copy / "zarr.json"
    root.write_text(root.read_text().replace('"random"', '"another"'))
    assert [fault.column for fault in verify(copy)] == ["attributes"]
    with pytest.raises(CorruptShardError, match="cannot be repaired"):
        repair(copy, verify(copy))


def test_damaged_tokens_cannot_be_repaired_and_say_so(copy):
    next(copy.glob("tokens/ids/c.*.0")).unlink()
    with pytest.raises(CorruptShardError, match="cannot be repaired"):
        repair(copy, verify(copy))


def test_hostile_metadata_does_not_allocate_or_execute(copy):
    """An index that points far outside its object, with a checksum that is right, is an error and no huge read."""
    store = open_store(copy)
    file = copy / "sites/blocks.0.hook_mlp_out/acts/c.0.0"
    data = file.read_bytes()
    n_bytes = 6 * 16 + 4
    index = np.frombuffer(data[-n_bytes:-4], "<u8").copy()
    index[1] = 1 << 60
    import google_crc32c

    file.write_bytes(data[:-n_bytes] + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(CorruptShardError):
        store.read("blocks.0.hook_mlp_out", [0])


def test_a_store_that_died_while_being_created_begins_again(plan):
    blocks, spec, bits = plan
    location = FailingStore(3, Died())
    with pytest.raises(Died):
        write_shards(location, spec, blocks, bits)
    with pytest.raises(StoreNotFoundError, match="never finished being created"):
        open_store(Objects(location, read_only=True))
    location.puts_left = -1
    other = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8, codec="raw")
    assert write_shards(location, other, blocks, bits).sealed


def test_every_damage_error_is_ours(copy):
    (copy / "zarr.json").write_text("{")
    with pytest.raises(ActcacheError, match="no activation store"):
        open_store(copy)
