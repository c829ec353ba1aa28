"""No way around the guards: edited roots, torn copies, shards of other stores, stores in stores, stores that grow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from places import everywhere, writable

from actcache.errors import (
    ConfigError,
    CorruptShardError,
    StoreError,
)
from actcache.exchange import export_saelens
from actcache.load import Loader
from actcache.sparse.metrics import write_metrics
from actcache.sparse.model import SparseMLP
from actcache.spec import Site
from actcache.store import Store, StoreWriter, delete_sites, export, open_store, refuse_inside_store, repair, verify
from actcache.store.format.keys import (
    LEDGER_KEY,
    ROW_ARRAYS,
    ROWS,
    commit_key,
    row_key,
    sharded_key,
    site_prefix,
    stats_key,
)
from actcache.store.format.records import read_record, record_object
from actcache.store.format.root import read_root

ONE, TWO = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"
NEW = Site(name="blocks.1.hook_mlp_out", shape=(7,))
GOLDEN = Path(__file__).parent / "golden" / "v1.zarr"


@pytest.fixture(scope="module")
def plan() -> tuple[Any, Any, Any]:
    """13 sequences in 4 shards, the last one partial; a lossless and an int8 site of equal shape."""
    blocks = random_blocks(13, 9)
    sites = (Site(name=ONE, shape=(2, 5)), Site(name=TWO, shape=(2, 5), codec="int8", feature_exponents=(0, 1) * 5))
    spec = replace(spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8), sites=sites)
    return blocks, spec, random_bits(replace(spec, sites=(*sites, NEW)))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory) -> Store:
    blocks, spec, bits = plan
    return write_shards(tmp_path_factory.mktemp("whole") / "s.zarr", spec, blocks, bits)


@pytest.fixture
def sealed(whole, tmp_path) -> Path:
    shutil.copytree(whole.path, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = json.loads((path / "zarr.json").read_text())
    change(root["attributes"]["actcache"])
    (path / "zarr.json").write_text(json.dumps(root))


def unseal(path: Path) -> None:
    edit(path, lambda about: about.update(state="open", fingerprint=None, digests=[]))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- an edited root ---------------------------------------------------------------------------------------------------


def rename(path: Path) -> None:
    edit(path, lambda about: about["spec"]["sites"][0].update(name="blocks.7.hook_mlp_out"))
    (path / site_prefix(ONE)).rename(path / site_prefix("blocks.7.hook_mlp_out"))


def site(number: int, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda about: about["spec"]["sites"][number].update(values))


def spec(**values: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, lambda about: about["spec"].update(values))


def reopen_and_seal(path: Path) -> None:
    edit(path, lambda about: about.update(state="open"))


EDITS: dict[str, Callable[[Path], None]] = {
    "dtype": spec(dtype="float16"),
    "exponents": site(1, feature_exponents=[0] * 10),
    "name": rename,
    "shape": site(0, shape=[5, 2]),
    "meaning": site(0, meaning={"module": "model.layers.9", "side": "out"}),
    "order of sites": lambda path: edit(path, lambda about: about["spec"]["sites"].reverse()),
    "seed": spec(seed=7),
    "skip_first": spec(skip_first=0, sequence_length=8),
    "model": spec(model={"name": "another"}),
    "text": lambda path: edit(path, lambda about: about["spec"]["text"].update(length=99)),
    "digests": lambda path: edit(path, lambda about: about["digests"].reverse()),
    "fingerprint": lambda path: edit(path, lambda about: about.update(fingerprint="0" * 64)),
    "no fingerprint": lambda path: edit(path, lambda about: about.update(fingerprint=None)),
    "state": reopen_and_seal,
}
READS: dict[str, Callable[[Store], Any]] = {
    "read": lambda store: store.read(store.sites[0], [0]),
    "stats": lambda store: store.stats(store.sites[-1]),
    "info": lambda store: store.info(),
    "tokens": lambda store: store.shard_tokens(0),
    "fingerprint": lambda store: store.fingerprint,
    "row table": lambda store: store.row_table(),
    "loader": lambda store: next(iter(Loader(store, ["*"], batch_rows=4))),
    "dask": lambda store: store.as_dask(store.sites[0]).compute(),
    "export": lambda store: export(store, Path(store.path).parent / "export.zarr"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_a_sealed_store_s_root_says_is_not_believed_when_it_was_edited(sealed, plan, name):
    blocks, asked, bits = plan
    EDITS[name](sealed)
    before = files_of(sealed.parent)
    for what, read in READS.items():
        with pytest.raises(CorruptShardError, match=r"(fingerprint|sealed with|damaged|another length)"):
            assert read(open_store(sealed)) is what  # which none returns
    again = replace(read_root(writable(sealed)).spec, sites=(*asked.sites, NEW)) if name != "state" else asked
    seals: list[Callable[[], Any]] = [
        lambda: write_shards(sealed, asked, blocks, bits),
        lambda: write_shards(sealed, again, blocks, bits, grow=True),
        lambda: delete_sites(sealed, [read_root(writable(sealed)).spec.sites[0].name]),
        lambda: repair(sealed, []),
    ]
    for seal in seals:
        with pytest.raises(CorruptShardError):
            seal()
    assert {fault.column for fault in verify(sealed)} & {"attributes", "ledger"}
    assert {key: data for key, data in files_of(sealed.parent).items() if "writer" not in key} == before


def test_the_error_says_what_disagrees(sealed):
    EDITS["dtype"](sealed)
    said = rf"has 'float16' for the dtype of {ONE}, the array was begun with 'bfloat16'; put back the zarr.json"
    with pytest.raises(CorruptShardError, match=said):
        open_store(sealed).read(ONE, [0])


@pytest.mark.parametrize("name", ["dtype", "exponents", "name", "shape", "skip_first"])
def test_an_open_store_s_root_is_held_against_its_arrays(sealed, plan, name):
    blocks, asked, bits = plan
    unseal(sealed)
    layout_of = files_of(sealed)
    (sealed / commit_key(ONE, 2)).unlink()
    EDITS[name](sealed)
    edited = read_root(writable(sealed)).spec
    with pytest.raises(CorruptShardError, match="not the one that the store was begun with"):
        open_store(sealed).read(edited.sites[0].name, [0])
    for wanted in (asked, edited):
        with pytest.raises(CorruptShardError, match="not the one that the store was begun with"):
            write_shards(sealed, wanted, blocks, bits)
    assert "attributes" in {fault.column for fault in verify(sealed)}
    assert layout_of.keys() >= files_of(sealed).keys() or name == "name"


@pytest.mark.parametrize("change", [{"seed": 7}, {"model": {"weights": "another"}}])
def test_settings_that_only_the_records_know_are_noticed_before_an_open_store_is_sealed(sealed, plan, change):
    """Whoever edits them, and asks for the same, gets the store made again and no mixture."""
    blocks, asked, _bits = plan
    unseal(sealed)
    (sealed / commit_key(ONE, 2)).unlink()
    spec(**change)(sealed)
    assert {fault.shard for fault in verify(sealed)} == {0, 1, 3}
    with StoreWriter(sealed, replace(asked, **change), blocks) as writer:
        assert writer.pending() == [0, 1, 2, 3]


def test_a_ledger_that_is_made_again_has_to_be_the_one_that_was_sealed(sealed):
    EDITS["seed"](sealed)
    (sealed / LEDGER_KEY).unlink()
    before = files_of(sealed)
    faults = verify(sealed)
    assert "ledger" in {fault.column for fault in faults}
    with pytest.raises(CorruptShardError):
        repair(sealed, [fault for fault in faults if fault.shard < 0])
    assert files_of(sealed).keys() >= before.keys() - {"zarr.json"}
    assert not (sealed / LEDGER_KEY).exists()


# --- torn copies and shards of other stores ---------------------------------------------------------------------------


def lengths_halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [Path.unlink, lengths_halved], ids=["missing", "cut short"])
@pytest.mark.parametrize("seed", range(12))
def test_a_copy_that_lacks_any_objects_ends_in_the_right_bytes(sealed, plan, whole, harm, seed):
    blocks, asked, bits = plan
    unseal(sealed)
    rng = np.random.default_rng(seed)
    files = sorted(file for file in sealed.rglob("c.*") if "tokens" not in file.parts and "ledger" not in file.parts)
    for file in rng.choice(np.array(files, object), rng.integers(1, 20), replace=False):
        harm(file)
    store = write_shards(sealed, asked, blocks, bits)
    assert store.fingerprint == whole.fingerprint
    assert files_of(sealed) == files_of(Path(whole.path))


@everywhere
def test_a_record_without_its_data_is_noticed_in_every_kind_of_place(place, plan):
    blocks, asked, bits = plan
    objects = writable(place)
    write_shards(objects, asked, blocks, bits, shards=[0, 1, 3])
    objects.delete(sharded_key(TWO, "scale", 1, 0))
    objects.delete(stats_key(ONE, 3))
    with StoreWriter(objects, asked, blocks) as writer:
        assert writer.pending() == [1, 2, 3]
    store = write_shards(objects, asked, blocks, bits)
    assert store.sealed
    assert verify(objects) == []


def test_those_who_share_a_store_do_not_seal_what_is_torn_and_the_same_call_makes_it_again(sealed, plan, whole):
    blocks, asked, bits = plan
    unseal(sealed)
    (sealed / sharded_key(ONE, "acts", 2)).unlink()
    with (
        StoreWriter(sealed, asked, blocks, shared=True) as writer,
        pytest.raises(CorruptShardError, match=rf"shard 2 of {ONE}: .*acts/c.2.0 is missing\ngive the same command"),
    ):
        writer.finish()
    assert open_store(sealed).committed == [0, 1, 3]
    assert write_shards(sealed, asked, blocks, bits).fingerprint == whole.fingerprint


def test_a_shard_under_way_is_not_taken_for_torn(tmp_path, plan):
    """A neighbour's shard has data and some records, and not all."""
    blocks, asked, bits = plan
    write_shards(tmp_path, asked, blocks, bits, shards=[0])
    with StoreWriter(tmp_path, asked, blocks, shared=True) as first, StoreWriter(tmp_path, asked, blocks, shared=True):
        assert first.claim(1)
        writable(tmp_path).put(commit_key(ONE, 1), b"half a shard")
        with StoreWriter(tmp_path, asked, blocks, shared=True) as third:
            assert not third.claim(1)
            assert not third.finish().sealed
        assert (tmp_path / commit_key(ONE, 1)).exists()


@pytest.mark.parametrize("where", ["kept", "added"])
def test_a_sealed_store_that_lacks_an_object_gets_no_site_more(sealed, plan, where):
    blocks, asked, bits = plan
    more = replace(asked, sites=(*asked.sites, NEW))
    fingerprint = open_store(sealed).fingerprint
    if where == "kept":
        (sealed / sharded_key(ONE, "acts", 1)).unlink()
        with pytest.raises(CorruptShardError, match=rf"shard 1 of {ONE}: .* is missing"):
            write_shards(sealed, more, blocks, bits, grow=True)
        assert open_store(sealed).fingerprint == fingerprint
        with pytest.raises(CorruptShardError, match=rf"shard 1 of {ONE}"):
            delete_sites(sealed, [TWO])
        assert open_store(sealed).fingerprint == fingerprint
    else:
        write_shards(sealed, more, blocks, bits, grow=True, shards=[0, 1, 2])
        (sealed / stats_key(NEW.name, 1)).unlink()
        grown = write_shards(sealed, more, blocks, bits, grow=True)
        assert grown.sealed
        assert verify(sealed) == []


def take_over(path: Path, other: Path, site: str, shard: int) -> None:
    """A site's shard of another store, data and record together."""
    keys = [stats_key(site, shard), commit_key(site, shard), sharded_key(site, "acts", shard)]
    keys += [sharded_key(site, "scale", shard, 0)] if site == TWO else []
    for key in keys:
        shutil.copy(other / key, path / key)


OTHERS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "tokens": lambda blocks, asked: (
        other := random_blocks(13, 9, seed=5),
        replace(asked, text={"tokens": other.digest()}),
    ),
    "model": lambda blocks, asked: (blocks, replace(asked, model={"weights": "another"})),
    "seed": lambda blocks, asked: (blocks, replace(asked, seed=3)),
}


@pytest.mark.parametrize("site", [ONE, TWO])
@pytest.mark.parametrize("other", OTHERS)
def test_a_site_s_shard_of_another_store_is_noticed(sealed, plan, whole, tmp_path, other, site):
    blocks, asked, bits = plan
    other_blocks, other_spec = OTHERS[other](blocks, asked)
    write_shards(tmp_path / "other.zarr", other_spec, other_blocks, random_bits(other_spec, seed=8))
    unseal(sealed)
    take_over(sealed, tmp_path / "other.zarr", site, 0)
    assert [(fault.column, fault.shard) for fault in verify(sealed)] == [(site, 0)]
    with (
        StoreWriter(sealed, asked, blocks, shared=True) as writer,
        pytest.raises(CorruptShardError, match=rf"shard 0 of {site}: .*is of another store"),
    ):
        writer.finish()
    take_over(sealed, tmp_path / "other.zarr", site, 0)
    assert write_shards(sealed, asked, blocks, bits).fingerprint == whole.fingerprint
    assert files_of(sealed) == files_of(Path(whole.path))


def test_a_name_of_the_model_binds_nothing(sealed, plan, whole):
    assert open_store(sealed).record(ONE, 0).binding
    unseal(sealed)
    spec(model={"name": "another folder"})(sealed)
    assert verify(sealed) == []


def test_records_of_earlier_versions_are_not_bound_and_no_fault(tmp_path, plan):
    faults = verify(GOLDEN)
    assert faults == []
    assert faults.not_bound == {name: [0, 1] for name in open_store(GOLDEN).sites}
    blocks, asked, bits = plan
    write_shards(tmp_path, asked, blocks, bits)
    assert verify(tmp_path).not_bound == {}
    loosen(tmp_path, ONE, 2)
    faults = verify(tmp_path)
    assert faults == []
    assert faults.not_bound == {ONE: [2]}


def loosen(path: Path, site: str, shard: int) -> None:
    """Write a record as earlier versions did."""
    spec = open_store(path).spec
    record = replace(read_record(writable(path), spec, site, shard), binding=b"")
    writable(path).put(*record_object(spec, site, shard, record))


def test_where_no_record_is_bound_the_row_table_still_has_to_be_of_the_tokens(sealed, plan, tmp_path):
    blocks, asked, bits = plan
    other_blocks, other_spec = OTHERS["tokens"](blocks, asked)
    write_shards(tmp_path / "other.zarr", other_spec, other_blocks, bits)
    unseal(sealed)
    for key in (commit_key(ROWS, 1), *(row_key(name, 1) for name in ROW_ARRAYS)):
        shutil.copy(tmp_path / "other.zarr" / key, sealed / key)
    for site in (ONE, TWO):
        loosen(sealed, site, 1)
    assert [(fault.column, fault.shard) for fault in verify(sealed)] == [("rows", 1)]
    with StoreWriter(sealed, asked, blocks) as writer:
        assert writer.pending() == [1]


# --- stores that have changed since they were opened ------------------------------------------------------------------


def test_a_reader_of_a_store_that_has_grown_goes_on_or_says_so(plan, tmp_path):
    blocks, asked, bits = plan
    part = blocks.take(range(10))
    small = replace(asked, n_sequences=10, text={"tokens": part.digest()})
    write_shards(tmp_path, small, part, bits)
    used, untouched = open_store(tmp_path), open_store(tmp_path)
    sound = used.read(ONE, slice(None))
    write_shards(tmp_path, asked, blocks, bits, grow=True)
    kept = slice(0, 2 * asked.rows_per_shard)
    assert torch.equal(used.read(ONE, kept), sound[kept])
    fresh = {
        "one that has read nothing": lambda: untouched.read(ONE, [0]),
        "its tokens": untouched.tokens,
        "its statistics": lambda: untouched.stats(ONE),
        "its fingerprint": lambda: untouched.fingerprint,
        "the shard that was not full": lambda: used.read(TWO, [2 * asked.rows_per_shard]),
    }
    for read in fresh.values():
        with pytest.raises(StoreError, match="has grown since it was opened; open it again"):
            read()


def test_a_reader_of_a_store_whose_site_was_deleted_goes_on_with_the_others(plan, tmp_path):
    blocks, asked, bits = plan
    write_shards(tmp_path, asked, blocks, bits)
    used, untouched = open_store(tmp_path), open_store(tmp_path)
    sound = used.read(ONE, slice(None))
    delete_sites(tmp_path, [TWO])
    assert torch.equal(used.read(ONE, slice(None)), sound)
    for read in (lambda: used.read(TWO, [0]), lambda: untouched.read(ONE, [0])):
        with pytest.raises(StoreError, match="has changed since it was opened"):
            read()


def test_damage_is_still_damage(sealed):
    used = open_store(sealed)
    used.check()
    (sealed / sharded_key(ONE, "acts", 0)).unlink()
    with pytest.raises(CorruptShardError, match="missing"):
        used.read(ONE, [0])
    EDITS["seed"](sealed)  # an edit is no change that a reader has to follow
    with pytest.raises(CorruptShardError, match="missing"):
        used.read(ONE, [0])


def test_a_shard_that_is_made_again_with_the_same_bytes_goes_unnoticed(sealed, plan):
    blocks, asked, bits = plan
    used = open_store(sealed)
    sound = used.read(ONE, [0])
    (sealed / sharded_key(ONE, "acts", 1)).unlink()
    repair(sealed, verify(sealed))
    with pytest.raises(StoreError, match="has changed since it was opened"):
        used.read(ONE, [asked.rows_per_shard])
    write_shards(sealed, asked, blocks, bits)
    assert len(used.read(ONE, [asked.rows_per_shard])) == 1
    assert torch.equal(used.read(ONE, [0]), sound)


# --- stores in stores, and paths --------------------------------------------------------------------------------------


def test_nothing_is_made_inside_a_store(sealed, plan, tmp_path):
    blocks, asked, bits = plan
    before = files_of(sealed)
    store, link = open_store(sealed), tmp_path / "link"
    link.symlink_to(sealed / "sites")
    mlp = SparseMLP(d_in=4, d_out=4, n_latents=8)
    making: list[Callable[[Path], Any]] = [
        lambda place: write_shards(place, asked, blocks, bits),
        lambda place: StoreWriter(place, asked, blocks, shared=True),
        lambda place: export(store, place),
        lambda place: export_saelens(store, place),
        lambda place: write_metrics(place, {}),
        mlp.save,
        lambda place: refuse_inside_store(place),
        lambda place: write_shards(f"file://{place}", asked, blocks, bits),
    ]
    for place in (sealed / "inner.zarr", sealed / "sites" / "deep" / "x", link / "x"):
        for make in making:
            with pytest.raises(ConfigError, match=r"lies in the activation store .*s\.zarr, which holds nothing but"):
                make(place)
    for make in making[3:6]:
        with pytest.raises(ConfigError, match="lies in the activation store"):
            make(sealed)
    assert files_of(sealed) == before
    assert write_shards(tmp_path / "beside.zarr", asked, blocks, bits).sealed


def test_nothing_is_made_inside_a_store_in_a_bucket(bucket, plan):
    blocks, asked, bits = plan
    write_shards(bucket, asked, blocks, bits)
    with pytest.raises(ConfigError, match="lies in the activation store"):
        write_shards(f"{bucket}/sites/inner.zarr", asked, blocks, bits)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(plan, tmp_path, monkeypatch, kind):
    blocks, asked, bits = plan
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    store = write_shards(kind("~/s.zarr"), asked, blocks, bits)
    assert (tmp_path / "home" / "s.zarr" / "zarr.json").exists()
    assert not (tmp_path / "~").exists()
    assert store.path == str(tmp_path / "home" / "s.zarr")
    assert open_store(kind("~/s.zarr")).fingerprint == store.fingerprint
    assert verify(kind("~/s.zarr")) == []
    export(store, kind("~/copy.zarr"))
    assert (tmp_path / "home" / "copy.zarr").exists()
    with pytest.raises(ConfigError, match="give the whole path"):
        open_store(kind("~nobody-by-that-name/s.zarr"))
