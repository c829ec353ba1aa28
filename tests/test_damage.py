"""Crashes and damage: nothing is lost, nothing wrong is ever read, and verify names exactly what is wrong."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import grow_disk, random_bits, random_blocks, small_disk_in, spec_of, write_shards
from zarr.storage import MemoryStore

from actcache.errors import ActcacheError, CorruptShardError, StorageFullError, StoreIncompleteError, StoreNotFoundError
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import Store, StoreWriter, open_store, repair, verify
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import site_prefix


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
    """Three shards, the last one partial, of two lossless sites and an int8 one."""
    blocks = random_blocks(11, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    spec = replace(spec, sites=(*spec.sites, Site(name="blocks.1.hook_mlp_out", shape=(7,), codec="int8")))
    return blocks, spec, random_bits(spec)


@pytest.fixture(scope="module")
def unbroken(plan):
    blocks, spec, bits = plan
    counting = FailingStore(10**9, Died())
    store = write_shards(counting, spec, blocks, bits)
    return contents(counting), store, 10**9 - counting.puts_left


@pytest.mark.exhaustive
@pytest.mark.parametrize("error", [OSError("the disk went away"), Died()], ids=["error", "sudden death"])
def test_failing_at_every_put_ends_in_the_same_bytes(plan, unbroken, error):
    blocks, spec, bits = plan
    expected, whole, n_puts = unbroken
    assert n_puts > 3 * (3 * 3 + 1 + 3 + 1)
    everything = [read() for read in reads_of(whole).values()]
    for k in range(n_puts):
        location = FailingStore(k, error)
        with pytest.raises((OSError, Died)):
            write_shards(location, spec, blocks, bits)
        location.puts_left = -1
        finished = write_shards(location, spec, blocks, bits)
        assert finished.fingerprint == whole.fingerprint, f"put {k}"
        assert [read() for read in reads_of(finished).values()] == everything, f"put {k}"
        assert contents(location) == expected, f"put {k}"


def test_a_full_disk_is_a_clear_error_and_the_same_call_finishes(plan, unbroken):
    blocks, spec, bits = plan
    location = FailingStore(40, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageFullError, match=r"bytes needed, .* free; make room and give the same command again"):
        write_shards(location, spec, blocks, bits)
    location.puts_left = -1
    assert write_shards(location, spec, blocks, bits).fingerprint == unbroken[1].fingerprint


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_in(tmp_path / "disk", "200k") as folder:
        yield folder


def plan_of(n_sequences: int, codec: str) -> tuple[TokenBlocks, StoreSpec, dict[str, Any]]:
    blocks = random_blocks(n_sequences, 13)
    spec = spec_of(blocks, codec=codec)
    return blocks, spec, random_bits(spec)


def test_a_disk_that_fills_up_leaves_a_sound_part_and_the_same_call_finishes(small_disk, tmp_path):
    """Noise in a codec for zeros takes fifty times of what could be foreseen."""
    blocks, spec, bits = plan_of(700, "sparse")
    path = small_disk / "s.zarr"
    with pytest.raises(
        StorageFullError, match=r"[\d,]+ bytes needed, [\d,]+ free; make room and give the same"
    ) as raised:
        write_shards(path, spec, blocks, bits)
    assert raised.value.errno == errno.ENOSPC
    begun = open_store(path)
    assert 0 < len(begun.committed) < spec.n_shards
    assert verify(path) == []
    assert np.isin(begun.read_stored(begun.sites[0], begun.row_ids()), bits[begun.sites[0]]).all()
    grow_disk(small_disk)
    finished = write_shards(path, spec, blocks, bits)
    assert finished.fingerprint == write_shards(tmp_path / "elsewhere.zarr", spec, blocks, bits).fingerprint
    assert verify(path) == []
    assert not list(path.rglob("*.partial"))


def test_a_disk_that_is_too_small_is_left_as_it_was(small_disk):
    blocks, spec, bits = plan_of(700, "raw")
    path = small_disk / "s.zarr"
    with pytest.raises(StorageFullError, match=r"about [\d,]+ bytes needed, [\d,]+ free; make room") as raised:
        write_shards(path, spec, blocks, bits)
    assert raised.value.errno == errno.ENOSPC
    assert not [file for file in small_disk.rglob("*") if file.is_file()]
    grow_disk(small_disk)
    assert write_shards(path, spec, blocks, bits).sealed


def zeros(n_sequences: int) -> tuple[TokenBlocks, StoreSpec]:
    """As many sequences as one likes of a wide site, without the memory for them."""
    ids = np.broadcast_to(np.uint32(0), (n_sequences, 9))
    site = Site(name="blocks.0.hook_resid_post", shape=(1 << 14,), codec="raw")
    sizes = {"sequence_length": 9, "sequences_per_shard": 1 << 12, "rows_per_chunk": 8}
    spec = StoreSpec(sites=(site,), n_sequences=n_sequences, **sizes, text={"tokens": ""})
    return TokenBlocks(ids=ids, document=ids, description={}), spec


def test_a_store_for_which_there_is_no_room_is_not_begun(tmp_path):
    blocks, spec = zeros(1 << 24)
    assert shutil.disk_usage(tmp_path).free < spec.n_rows * (1 << 15)
    with pytest.raises(StorageFullError, match=r"about [\d,]+ bytes needed, [\d,]+ free"):
        StoreWriter(tmp_path / "s.zarr", spec, blocks)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_store_for_whose_growth_there_is_no_room_stays_as_it_was(tmp_path):
    blocks, spec = zeros(1)
    spec = replace(spec, text={"tokens": blocks.digest()})
    write_shards(tmp_path, spec, blocks, {site.name: np.zeros((1, 8, 1 << 14), np.uint16) for site in spec.sites})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    more, grown = zeros(1 << 24)
    with pytest.raises(StorageFullError, match=r"about [\d,]+ bytes needed, [\d,]+ free"):
        StoreWriter(tmp_path, grown, more, grow=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def objects_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")


def reads_of(store: Store) -> dict[str, Callable[[], bytes]]:
    """Every way to get values out of a store, as bytes."""

    def table() -> bytes:
        return b"".join(values.tobytes() for values in store.row_table().values())

    reads: dict[str, Callable[[], bytes]] = {"row table": table}
    for site in store.sites:
        reads[site] = lambda site=site: store.read(site, slice(None), threads=1).view(torch.uint8).numpy().tobytes()
        reads[f"{site}, statistics"] = lambda site=site: statistics_of(store, site)
    for array in ("ids", "document"):
        reads[array] = lambda array=array: store.tokens(array).tobytes()
    return reads


def statistics_of(store: Store, site: str) -> bytes:
    found = store.stats(site)
    arrays = (found.mean, found.variance, found.dimension_abs_max, np.array(list(found.summary().values())))
    return b"".join(values.tobytes() for values in arrays)


def read_everything(path: Path) -> dict[str, bytes | None]:
    """What every read gives; None where it is an error of ours."""
    try:
        reads = reads_of(open_store(path))
    except ActcacheError:
        return {}
    found: dict[str, bytes | None] = {}
    for name, read in reads.items():
        try:
            found[name] = read()
        except ActcacheError:
            found[name] = None
    return found


@pytest.fixture
def copy(tmp_path, small_store):
    shutil.copytree(small_store.path, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def test_a_sound_store_verifies(small_store):
    seen = []
    assert verify(small_store.path, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (12, 12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two stores of the same shape and other values, with a site of every preset; their whole content is known."""
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("s.zarr", "other.zarr")):
        blocks = random_blocks(29, 13, seed=seed)
        sites = tuple(
            Site(name=f"blocks.{i}.hook_mlp_out", shape=(width,), codec=codec)
            for i, (codec, width) in enumerate([("raw", 10), ("lossless", 12), ("sparse", 12), ("int8", 10)])
        )
        spec = replace(spec_of(blocks), sites=sites)
        bits = random_bits(spec, seed=seed)
        bits[sites[2].name][np.random.default_rng(seed).random(bits[sites[2].name].shape) < 0.8] = 0
        write_shards(folder / name, spec, blocks, bits)
    return folder / "s.zarr", folder / "other.zarr"


class Damage:
    """Random damage to files of a store: each `inflict` harms one object, or swaps two, and `mend` undoes it."""

    KINDS = ("flip", "flip", "truncate", "delete", "append", "zero", "swap", "stale")

    def __init__(self, path: Path, other: Path, files: list[Path], seed: int) -> None:
        self.path, self.other, self.files = path, other, files
        self.rng = np.random.default_rng(seed)
        self.sound = {file: file.read_bytes() for file in files}
        self.harmed: list[Path] = []

    def inflict(self) -> str:
        """What was done; the files that are not as they were are in `harmed`."""
        self.harmed = []
        while not self.harmed:
            file, kind = self._any(), str(self.rng.choice(self.KINDS))
            changed = self._changed(kind, file)
            for victim, data in changed.items():
                if data is None:
                    victim.unlink()
                elif data != self.sound[victim]:
                    victim.write_bytes(data)
                else:
                    continue
                self.harmed.append(victim)
        return f"{kind} of {', '.join(str(victim.relative_to(self.path)) for victim in self.harmed)}"

    def mend(self) -> None:
        for file in self.harmed:
            file.write_bytes(self.sound[file])

    def _any(self) -> Path:
        return self.files[self.rng.integers(len(self.files))]

    def _changed(self, kind: str, file: Path) -> dict[Path, bytes | None]:
        data, rng = bytearray(self.sound[file]), self.rng
        place = int(rng.integers(len(data)))
        if kind == "flip":
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == "truncate":
            del data[place:]
        elif kind == "delete":
            return {file: None}
        elif kind == "append":
            data += rng.bytes(int(rng.integers(1, 600)))
        elif kind == "zero":
            block = slice(place // 512 * 512, min(len(data), place // 512 * 512 + 512))
            data[block] = bytes(block.stop - block.start)
        elif kind == "swap":
            second = self._any()
            return {file: self.sound[second], second: self.sound[file]}
        else:
            data = bytearray((self.other / file.relative_to(self.path)).read_bytes())
        return {file: bytes(data)}


def blamed(store: Store, file: Path) -> tuple[str, int]:
    """The column and shard that verify has to name for an object."""
    parts = file.relative_to(store.path).parts
    first, array, shard = parts[0], parts[-2], int(parts[-1].split(".")[1])
    if first == "rows":
        return "rows", shard
    if first == "sites" and array != "total":
        return next(site for site in store.sites if f"/{site_prefix(site)}/" in str(file)), shard
    return ("tokens" if first == "tokens" else "ledger"), -1


@pytest.mark.exhaustive
def test_a_thousand_damages_are_all_noticed_and_named(pair):
    """Whatever is damaged, reading gives an error or the right values, and verify names just what was damaged."""
    path, other = pair
    store, sound = open_store(path), read_everything(path)
    assert None not in sound.values()
    damage, n_errors = Damage(path, other, objects_of(path), seed=0), 0
    for i in range(1000):
        where = f"damage {i}: {damage.inflict()}"
        found = read_everything(path)
        assert {name for name, data in found.items() if data not in (sound[name], None)} == set(), where
        n_errors += None in found.values()
        faults = {(fault.column, fault.shard) for fault in verify(path)}
        assert faults == {blamed(store, file) for file in damage.harmed}, where
        damage.mend()
    assert verify(path) == []
    assert n_errors > 800  # all but the statistics of single shards, which a finished store reads only to verify


@pytest.mark.exhaustive
def test_damage_to_an_unfinished_store_is_noticed(pair, tmp_path):
    path, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    for seed, (place, source) in enumerate(zip((path, other), pair, strict=True)):
        blocks, spec = random_blocks(29, 13, seed=seed), open_store(source).spec
        write_shards(place, spec, blocks, random_bits(spec, seed=seed), shards=[0, 3])

    def table(found: Store) -> list[bytes]:
        ids = found.row_ids()
        return [ids.tobytes(), *(found.read_stored(site, ids).tobytes() for site in found.sites)]

    sound, n_noticed = table(open_store(path)), 0
    damage = Damage(path, other, objects_of(path), seed=1)
    for i in range(200):
        where = f"damage {i}: {damage.inflict()}"
        # A shard without one of its commit records is a shard that was not finished.
        uncommitted = any(not file.exists() and "commit" in file.parts for file in damage.harmed)
        try:
            assert table(open_store(path)) == sound or uncommitted, where
        except ActcacheError:
            n_noticed += 1
        assert verify(path) or uncommitted, where
        damage.mend()
    assert n_noticed > 80
    assert table(open_store(path)) == sound
    with pytest.raises(StoreIncompleteError, match="not written yet"):
        open_store(path).read(open_store(path).sites[0], slice(None))


def test_damage_to_the_root_is_an_error_or_does_no_harm(pair):
    path, other = pair
    sound = read_everything(path)
    damage = Damage(path, other, [path / "zarr.json"], seed=2)
    unseen = 0
    for i in range(150):
        where = f"damage {i}: {damage.inflict()}"
        found = read_everything(path)
        assert {name for name, data in found.items() if data not in (sound.get(name, data), None)} == set(), where
        with contextlib.suppress(ActcacheError):
            unseen += not verify(path)
        damage.mend()
    assert read_everything(path) == sound
    assert unseen < 30  # spaces, and words that say the same


@pytest.mark.exhaustive
def test_damage_to_the_metadata_of_arrays_does_not_touch_our_reads_and_is_named_and_mended(pair):
    path, other = pair
    sound, fingerprint = read_everything(path), open_store(path).fingerprint
    files = sorted(set(path.rglob("zarr.json")) - {path / "zarr.json"})
    assert len(files) == 2 + 3 + 1 + 4 * 4 + 1 + 1 + 3 + 4  # arrays, the ledger, and groups
    damage, unseen = Damage(path, other, files, seed=3), 0
    for i in range(100):
        where = f"damage {i}: {damage.inflict()}"
        assert read_everything(path) == sound, where
        faults = verify(path)
        assert {(fault.column, fault.shard) for fault in faults} <= {("metadata", -1)}, where
        if faults:
            assert len(faults) == len(damage.harmed)
            assert all(any(f"{f.relative_to(path)} " in fault.reason for f in damage.harmed) for fault in faults)
            assert repair(path, faults) == []
            assert verify(path) == [], where
        unseen += not faults
        damage.mend()
    assert unseen < 30  # spaces, and names that zarr does not know
    assert open_store(path).fingerprint == fingerprint
    assert verify(path) == []


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
    with pytest.raises(
        CorruptShardError, match=r"shard 2 of blocks\.1\.attn\.hook_z .* missing: there is no .*; run 'actcache verify"
    ):
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
    with pytest.raises(StoreNotFoundError, match=r"the creation of the store at .* was not finished"):
        open_store(Objects(location, read_only=True))
    location.puts_left = -1
    other = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8, codec="raw")
    assert write_shards(location, other, blocks, bits).sealed


def test_every_damage_error_is_ours(copy):
    (copy / "zarr.json").write_text("{")
    with pytest.raises(ActcacheError, match="is not an activation store"):
        open_store(copy)
