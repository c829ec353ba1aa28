"""What is in a batch: where its rows come from, normalised values; and how a loader lives and dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache import kernels
from actcache.errors import ConfigError
from actcache.kernels import loops
from actcache.load import Loader
from actcache.load.batches import gather, origin
from actcache.load.batches.gather import Gather
from actcache.load.plan.window_sizes import memory_bytes
from actcache.spec import Site
from actcache.store import RowFilter, Store, export
from actcache.store.codecs import int8

SITES = (
    Site(name="a", shape=(12,)),
    Site(name="b", shape=(12,), codec="int8"),
    Site(name="c", shape=(6,), codec="raw"),
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Rows with a mean far from 0; one store with rows left out."""
    folder, blocks, found = tmp_path_factory.mktemp("batches"), random_blocks(45, 13), {}
    for dtype in ("bfloat16", "float16", "float32"):
        spec = replace(spec_of(blocks, dtype=dtype), sites=SITES)
        bits = random_bits(replace(spec, dtype="float32"))
        values = {site: (3 * value + 5).astype(np.float32) for site, value in bits.items()}
        stored = {
            site: (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else value.astype(dtype)
            for site, value in values.items()
        }
        found[dtype] = write_shards(folder / f"{dtype}.zarr", spec, blocks, stored)
    kept = np.random.default_rng(5).random(spec.n_rows) < 0.6
    return {**found, "holes": export(found["bfloat16"], folder / "holes.zarr", rows=kept)}


def loader_of(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 20, "memory": 4000, "seed": 3, "threads": 2, "drop_last": False}
    return Loader(store, ["*"], **{**settings, **changes})


pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", ["bfloat16", "holes"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_batches_know_where_their_rows_come_from(stores, monkeypatch, name, lanes, kept_bytes):
    monkeypatch.setattr(origin, "_KEPT_BYTES", kept_bytes)
    store = stores[name]
    ids, table, documents = store.row_ids(), store.row_table(), store.tokens("document")
    place = np.zeros(store.spec.n_rows, np.int64)
    place[ids] = np.arange(len(ids))
    n_rows = 0
    for batch in list(loader_of(store, lanes=lanes)):  # all kept: windows have long been written over
        at = place[batch.rows.numpy()]
        n_rows += len(at)
        assert batch.positions.dtype == batch.documents.dtype == torch.int64
        assert batch.tokens.tolist() == table["token"][at].tolist()
        assert batch.sequences.tolist() == table["sequence"][at].tolist()
        assert batch.positions.tolist() == table["position"][at].tolist()
        assert batch.documents.tolist() == documents[table["sequence"][at], table["position"][at]].tolist()
        assert batch.tokens is batch.tokens
    assert n_rows == len(ids)


def test_each_row_table_is_read_once_and_only_when_it_is_asked_for(stores, monkeypatch):
    store, read = stores["bfloat16"], []
    monkeypatch.setattr(store, "shard_row_table", lambda s: (read.append(s), Store.shard_row_table(store, s))[1])
    batches = list(loader_of(store))
    assert not read
    for batch in batches:
        assert len(batch.tokens) == len(batch.sequences) == len(batch.rows)
    assert sorted(read) == list(range(store.spec.n_shards))


def without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("take_widened", "round_to_bfloat16"):
        monkeypatch.setattr(gather, name, lambda **_: None)
    monkeypatch.setattr(int8, "take_int8", lambda **_: None)


def normalised(values: np.ndarray, kind: str) -> np.ndarray:
    mean = values.mean(0) if "center" in kind else 0
    centred = values - mean
    return centred / np.sqrt((centred**2).mean()) if "rms" in kind else centred


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["rms", "center", "center-rms"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_rows_have_what_they_are_named_for_and_can_be_folded_back(
    stores, monkeypatch, compiled, kind, name, dtype
):
    if not compiled:
        without_compiled_loops(monkeypatch)
    store = stores[name]
    with loader_of(store, normalize=kind, dtype=dtype) as loader, loader_of(store) as plain:
        for batch, raw in zip(loader, plain, strict=True):
            for site in batch:
                assert batch[site].dtype == dtype
                done = loader.normalization[site]
                back = batch[site].double().numpy() / done.scale + (0 if done.mean is None else done.mean)
                step = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
                np.testing.assert_allclose(back, raw[site].double(), rtol=step, atol=8 * step)
    for site in ("a", "c"):
        got = torch.cat([batch[site] for batch in loader_of(store, normalize=kind)]).double().numpy()
        rows = torch.cat([batch.rows for batch in loader_of(store)]).numpy()
        expected = normalised(store.read(site, slice(None)).double().numpy(), kind)[rows]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_first_batch_does_not_wait_for_compiled_loops_to_be_loaded(stores, monkeypatch):
    did: list[str] = []
    load_loops = Gather.load_loops
    monkeypatch.setattr(Gather, "load_loops", lambda self, window: did.append("load") or load_loops(self, window))
    with loader_of(stores["bfloat16"], read_ahead=0) as loader:
        for _ in range(2):
            for _ in loader:
                did.append("batch")
    assert did == ["batch", "load", *["batch"] * (2 * len(loader) - 1)]


@pytest.mark.parametrize("kind", [None, "center-rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_and_plain_loops_give_the_same_bits(stores, monkeypatch, kind, dtype):
    ways = [(normalised, rounded) for normalised in (False, True) for rounded in (False, True)]
    names = {kernels.take_int8(normalised=n, rounded=r).__name__ for n, r in ways}
    names |= {kernels.take_widened(normalised=n, rounded=r).__name__ for n, r in ways if (n, r) != (False, True)}
    assert names == {name for name in vars(loops) if name.startswith("take_")} - {"take_and_measure"}
    fast = [dict(batch) for batch in loader_of(stores["bfloat16"], normalize=kind, dtype=dtype)]
    without_compiled_loops(monkeypatch)
    slow = [dict(batch) for batch in loader_of(stores["bfloat16"], normalize=kind, dtype=dtype)]
    for left, right in zip(fast, slow, strict=True):
        assert all(torch.equal(left[site], right[site]) for site in left)


def test_statistics_for_normalising_are_those_of_the_chosen_rows(stores):
    late = RowFilter(positions=slice(8, None))
    with loader_of(stores["bfloat16"], rows=late, normalize="center-rms") as loader:
        got = torch.cat([batch["a"] for batch in loader]).double()
    assert got.mean(0).abs().max() < 1e-5
    assert got.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_settings_that_are_none_are_refused(stores):
    with pytest.raises(ConfigError, match=r"normalize must be one of rms, center, center-rms or None, got 'max'"):
        loader_of(stores["bfloat16"], normalize="max")
    for memory in ("1 apple", "", "-1GB", 0, True, "0GB", 1.5):
        with pytest.raises(ConfigError, match="memory must be a number of bytes or text such as"):
            loader_of(stores["bfloat16"], memory=memory)
    with pytest.raises(ConfigError, match="lanes"):
        loader_of(stores["bfloat16"], lanes=0)


def test_memory_is_bytes_or_words():
    expected = {"1GB": 10**9, "512MiB": 1 << 29, "1.5 gb": 1_500_000_000, "2g": 2 * 10**9, "300": 300, "1kib": 1024}
    assert {words: memory_bytes(words) for words in expected} == expected
    assert memory_bytes("10 B") == 10
    assert memory_bytes(77) == 77


def test_length_is_batches_of_an_epoch_and_epochs_go_on_for_ever(stores):
    loader = loader_of(stores["bfloat16"], epochs=None)
    assert len(loader) == 27
    got = [batch.rows for _, batch in zip(range(3 * len(loader)), loader, strict=False)]
    for epoch in range(3):
        rows = torch.cat(got[len(loader) * epoch : len(loader) * (epoch + 1)])
        assert len(set(rows.tolist())) == 540
    loader.close()


def test_speed_is_counted(stores):
    loader = loader_of(stores["bfloat16"])
    assert loader.stats().n_batches == 0
    assert loader.stats().rows_per_s == loader.stats().gb_per_s == loader.stats().stall_fraction == 0
    began = time.perf_counter()
    for batch in loader:
        assert len(batch.rows)
        time.sleep(0.005)
    stats, seconds = loader.stats(), time.perf_counter() - began
    assert (stats.n_batches, stats.n_rows, stats.n_bytes) == (27, 540, 540 * 30 * 2)
    assert 26 * 0.005 <= stats.seconds <= seconds
    assert 0 < stats.wait_seconds < stats.seconds
    assert stats.stall_fraction == stats.wait_seconds / stats.seconds
    assert stats.wait_seconds <= stats.seconds - 26 * 0.005  # what the loop itself takes is no waiting
    assert stats.decode_seconds > 0 < stats.gather_seconds
    assert stats.read_seconds >= 0
    assert f"{stats.n_rows} rows in" in str(stats)
    list(loader)
    assert loader.stats().n_batches == 54


OURS = ("actcache-read-ahead", "actcache-fetch")


def reading_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name in OURS or thread.name.startswith("actcache-decode")
    ]


@pytest.mark.parametrize("read_ahead", [1, 5])
def test_no_thread_outlives_the_iteration(stores, read_ahead):
    loader = loader_of(stores["bfloat16"], epochs=None, read_ahead=read_ahead)
    with loader:
        next(iter(loader))
    assert not reading_threads()
    for batch in loader:
        assert len(batch.rows)
        break
    assert not reading_threads()
    iterator = iter(loader)
    next(iterator)
    assert reading_threads()
    del iterator
    assert not reading_threads()


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_a_loader_stays_in_the_process_that_made_it(stores, read_ahead):
    loader = loader_of(stores["bfloat16"], read_ahead=read_ahead, epochs=None)
    with pytest.raises(ConfigError, match="belongs to the process that made it"):
        pickle.dumps(loader)
    with loader:
        running = iter(loader)
        first = next(running)
        for use in (lambda: next(iter(loader)), lambda: next(running)):
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    use()
                except ConfigError as error:
                    os.write(write_end, str(error).encode())
                loader.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert b"make the loader here, where it is used" in os.read(read_end, 4096)
        assert not torch.equal(next(running).rows, first.rows)  # and nothing happened to it here


def rows_in_a_child(store: Store) -> list[list[int]]:
    with loader_of(store) as loader:
        return [batch.rows.tolist() for batch in loader]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_another_process_and_the_loader_is_made_there(stores, method):
    store = stores["bfloat16"]
    expected = rows_in_a_child(store)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(rows_in_a_child, (store,)) == expected


SCRIPT = """
import sys, time
import torch
from actcache.load import Loader
from actcache.store import open_store
loader = Loader(open_store(sys.argv[1]), ["*"], batch_rows=20, epochs=None, read_ahead=int(sys.argv[2]))
iterator = iter(loader)
delivered = next(iterator).rows
print("begun", flush=True)
"""


def heed_interrupts() -> None:
    """A process that a shell runs in its background ignores the signal, and so do its children unless told."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(store: Store, rest: str, read_ahead: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-W", "ignore", "-c", SCRIPT + rest, store.path, str(read_ahead)]
    folder = Path(__file__).parent.parent
    return subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


@pytest.mark.parametrize("read_ahead", [0, 1000])
def test_a_process_ends_though_its_loader_was_left_open(stores, read_ahead):
    """With its thread in the middle of a batch, which it must not be killed in: it is within torch then."""
    process = run_script(stores["bfloat16"], "", read_ahead)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (0, "begun\n", "")


@pytest.mark.parametrize("after_s", [0.1, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("read_ahead", [0, 2])
def test_an_interrupt_ends_the_loop_and_its_threads(stores, read_ahead, after_s):
    """Wherever it comes: while compiled loops are loaded, while a batch is waited for, made, or used."""
    process = run_script(
        stores["bfloat16"],
        """
import threading
try:
    for batch in iterator:
        delivered = batch.rows
except KeyboardInterrupt:
    place = loader.state_dict()
    del iterator
    loader.close()
    print(sorted(t.name for t in threading.enumerate()))
    rows = [loader.plan.epoch(e).batch_row_ids(b) for e in range(place["epoch"] + 1) for b in range(len(loader))]
    n_delivered = place["epoch"] * len(loader) + place["batch"]
    # An interrupt may come when a batch was handed out and is not yet taken.
    assert delivered.tolist() in [rows[n_delivered - 1].tolist(), rows[n_delivered - 2].tolist()]
    assert next(iter(loader)).rows.tolist() == rows[n_delivered].tolist()
""",
        read_ahead,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (0, "['MainThread']\n", "")
