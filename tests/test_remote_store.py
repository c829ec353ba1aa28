"""Whole stores on a real S3 protocol server and in memory: the same as on a disk, whatever happens on the way there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import random_bits, random_blocks, spec_of, write_shards
from places import QUICK, S3, elsewhere, writable

import actcache as ac
from actcache.errors import CorruptShardError, NotAStoreError, StoreBusyError, StoreNotFoundError
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.load import Loader
from actcache.spec import Site
from actcache.store import Store, StoreWriter, delete_sites, export, open_store, repair, verify
from actcache.store.backends import urls
from actcache.store.backends.objects import Objects
from actcache.store.locks.lock_keys import LEASE


@pytest.fixture(scope="module")
def plan() -> Any:
    """Three shards of two sites, the last one partial."""
    blocks = random_blocks(11, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    return spec, blocks, random_bits(spec)


@pytest.fixture(scope="module")
def local(plan, tmp_path_factory) -> Store:
    return write_shards(tmp_path_factory.mktemp("local") / "acts.zarr", *plan)


def bits_of(store: Store, site: str) -> torch.Tensor:
    return store.read(site, slice(None)).view(torch.int16)


def contents(place: Any) -> dict[str, bytes]:
    objects = Objects(place, read_only=True)
    return {key: bytes(objects.get(key)) for key in objects.list("")}


class TestTheSameAsOnADisk:
    @elsewhere
    def test_every_object_and_every_value(self, place, plan, local):
        write_shards(place, *plan)
        assert contents(place) == contents(local.path)
        store = open_store(place)
        assert store.fingerprint == local.fingerprint
        for site in store.sites:
            assert (
                store.read(site, slice(None)).view(torch.int16).equal(local.read(site, slice(None)).view(torch.int16))
            )
        assert verify(place) == []

    @elsewhere
    def test_extraction_with_a_model(self, place, tmp_path):
        torch.manual_seed(0)
        lm = ac.load_lm(StoriesLM(StoriesConfig(d_model=16, d_mlp=32, n_layers=1, n_heads=2, n_ctx=32, d_vocab=2048)))
        settings: Any = {"sequences_per_shard": 4, "rows_per_chunk": 8, "batch_sequences": 2}
        blocks = random_blocks(9, 9)
        stores = [ac.extract(lm, blocks, ["*hook_mlp_out"], to, **settings) for to in (place, tmp_path / "acts.zarr")]
        assert stores[0].fingerprint == stores[1].fingerprint
        again = ac.extract(lm, blocks, ["*hook_mlp_out"], place, **settings)
        assert again.fingerprint == stores[0].fingerprint

    def test_an_array_opens_with_zarr_alone(self, bucket, plan, local):
        site = plan[0].sites[0].name
        values = write_shards(bucket, *plan)
        array = zarr.open_group(Objects(bucket, read_only=True).store, mode="r")[f"sites/{site}/acts"]
        assert (array[:] == zarr.open_group(local.path, mode="r")[f"sites/{site}/acts"][:]).all()
        assert array.shape == (values.n_rows, plan[0].sites[0].width)

    @elsewhere
    def test_the_loader_gives_the_same_batches(self, place, plan, local):
        store = write_shards(place, *plan)
        settings: Any = {"sites": local.sites, "batch_rows": 10, "epochs": 2, "seed": 3}
        with Loader(store, **settings) as there, Loader(local, **settings) as here:
            for got, expected in zip(there, here, strict=True):
                assert all(got[site].equal(expected[site]) for site in store.sites)

    def test_a_sealed_store_is_read_from_a_web_server(self, local, monkeypatch):
        monkeypatch.setattr(urls, "RETRIES", QUICK)
        with web_server(Path(local.path)) as url:
            store = open_store(url)
            assert all(bits_of(store, site).equal(bits_of(local, site)) for site in store.sites)
            assert verify(url) == []
            with pytest.raises(OSError, match=f"could not write a of {url}"):
                writable(url).put("a", b"1")

    @elsewhere
    def test_a_store_lives_on(self, place, plan, tmp_path):
        """Extended, less a site, exported there and back."""
        spec, blocks, bits = plan
        part = blocks.take(range(6))
        small = spec_of(part, sequences_per_shard=4, rows_per_chunk=8)
        write_shards(place, small, part, bits)
        with StoreWriter(place, spec, blocks, grow=True) as writer:
            fill(writer, bits)
            grown = writer.finish()
        assert grown.n_rows == spec.n_rows
        gone, left = (site.name for site in spec.sites)
        delete_sites(place, [gone])
        assert open_store(place).sites == [left]
        assert not [key for key in contents(place) if gone in key]
        here = export(open_store(place), tmp_path / "here.zarr")
        assert here.read(left, slice(None)).equal(grown.read(left, slice(None)))
        assert verify(place) == []

    def test_what_is_there_is_said(self, bucket):
        with pytest.raises(StoreNotFoundError, match="s3://bucket"):
            open_store(bucket)
        writable(bucket).put("somebody/else", b"1")
        with pytest.raises(NotAStoreError, match="something other than an activation store"):
            open_store(bucket)


class Ranges(SimpleHTTPRequestHandler):
    """Files, or the range of bytes that is asked for, as web servers give them."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not wanted or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = (int(text) if text else None for text in wanted.removeprefix("bytes=").split("-"))
        start = len(data) - last if first is None else first
        part = data[start:] if first is None or last is None else data[start : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fill(writer: StoreWriter, bits: dict[str, Any]) -> None:
    """Submit every pending shard."""
    for shard in writer.pending():
        buffers, sequences = writer.acquire(shard), writer.spec.shard_sequences(shard)
        for site in writer.sites:
            rows = bits[site.name][sequences.start : sequences.stop].reshape(-1, site.width)
            buffers.rows[site.name][: len(rows)] = rows
        writer.submit(buffers, random_blocks(11, 9).ids[sequences.start : sequences.stop])


class TestCrashes:
    def test_refused_at_a_put_and_all_later_ones_it_ends_in_the_same_bytes(self, s3: S3, bucket, plan, local):
        spec, blocks, bits = plan
        for k in (0, 1, 2, *range(3, 1000, 16)):  # test_damage.py has them all, on a quicker store
            place = f"{bucket}/{k}"
            s3.moods(refuse_after=k)
            if write_or_refused(place, plan):
                break
            s3.calm()
            assert half_done(place) is None or verify(place) == [], f"put {k}"  # what is committed is complete
            assert write_shards(place, spec, blocks, bits).fingerprint == local.fingerprint, f"put {k}"
            assert contents(place) == contents(local.path), f"put {k}"
        assert k > 3 * (2 * 2 + 3 + 3)

    def test_a_writer_killed_at_any_moment_is_continued(self, s3: S3, bucket, plan, local):
        spec, blocks, bits = plan
        expected, states = contents(local.path), set()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["actcache.store", "torch"])
        for seed, n_puts in enumerate((1, 25, 45)):
            place = f"{bucket}/{seed}"
            s3.moods(hang_after=n_puts)
            child = context.Process(target=write_elsewhere, args=(s3.environment, sys.path, place))
            child.start()
            s3.wait_until_it_hangs()
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            s3.calm()
            states.add(half_done(place))
            assert writable(place).get(LEASE) is not None
            assert write_shards(place, spec, blocks, bits).fingerprint == local.fingerprint
            assert contents(place) == expected
        assert len(states) > 2  # before it was a store, and with more and fewer shards

    @elsewhere
    def test_a_second_writer_is_refused_and_the_first_one_finishes(self, place, plan, local):
        spec, blocks, bits = plan
        with StoreWriter(place, spec, blocks) as writer:
            with pytest.raises(StoreBusyError):
                StoreWriter(place, spec, blocks)
            fill(writer, bits)
            assert writer.finish().fingerprint == local.fingerprint
        assert open_store(place).fingerprint == local.fingerprint


def write_or_refused(place: str, plan: Any) -> bool:
    """Whether the server took every put."""
    with warnings.catch_warnings(), suppress(PermissionError):
        warnings.simplefilter("ignore", UserWarning)  # the lock could not be given back either
        write_shards(place, *plan)
        return True
    return False


def half_done(place: str) -> int | None:
    """Shards of an unfinished store, None when it is none yet."""
    try:
        return len(open_store(place).committed)
    except (StoreNotFoundError, NotAStoreError):
        return None


def write_elsewhere(environment: dict[str, str], path: list[str], place: str) -> None:
    """In a child process: write the plan's store."""
    os.environ.update(environment)
    sys.path[:] = path
    blocks = random_blocks(11, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    write_shards(place, spec, blocks, random_bits(spec))


class TestDamage:
    @elsewhere
    def test_it_is_found_never_read_and_mended(self, place, plan, local):
        spec, blocks, bits = plan
        site = spec.sites[1].name
        write_shards(place, *plan)
        objects = writable(place)
        keys = [f"sites/{site}/acts/c.{shard}.0" for shard in (0, 2)] + ["rows/token/c.1"]
        whole = {key: bytes(objects.get(key)) for key in keys}
        for key in keys:
            data = whole[key]
            for damage in (bytes([*data[:3], data[3] ^ 16, *data[4:]]), data[:-5], None):
                objects.delete(key) if damage is None else objects.put(key, damage)
                (fault,) = verify(place)
                assert fault.shard == int(key.split("/c.")[1].split(".")[0]), (key, damage)
                assert fault.column in key.split("/"), (key, damage)
            objects.put(key, data)
        objects.put(keys[0], whole[keys[0]][:40])
        with pytest.raises(CorruptShardError, match=site):
            open_store(place).read(site, slice(None))
        assert repair(place, verify(place)) == [0]
        assert write_shards(place, spec, blocks, bits).fingerprint == local.fingerprint
        assert contents(place) == contents(local.path)


class TestCommandLine:
    def test_info_verify_repair_and_unlock(self, bucket, plan, capsys):
        from actcache.cli import main

        write_shards(bucket, *plan)

        def run(*words: str) -> tuple[int, str]:
            code = main(list(words))
            shown = capsys.readouterr()
            return code, shown.out + shown.err

        assert run("info", bucket)[0] == 0
        assert run("verify", bucket)[0] == 0
        objects = writable(bucket)
        objects.delete(next(key for key in objects.list("sites") if "/acts/c.1" in key))
        assert run("verify", bucket)[0] == 2
        lease = '{"host": "elsewhere", "pid": 7, "since": "yesterday", "token": "' + "0" * 32 + '"}'
        objects.put(LEASE, lease.encode())
        code, said = run("repair", bucket)
        assert (code, "process 7 on elsewhere" in said) == (1, True), said
        assert run("repair", bucket, "--unlock")[0] == 0
        assert objects.get(LEASE) is None


def test_sites_of_any_name_have_keys_of_their_own(bucket):
    names = ("a/b", "a%2Fb", "ü [x]*?", "..", "a b")
    blocks = random_blocks(4, 5)
    spec = spec_of(blocks, sites=tuple(Site(name=name, shape=(3,)) for name in names))
    bits = random_bits(spec)
    store = write_shards(bucket, spec, blocks, bits)
    assert verify(bucket) == []
    table = store.row_table()
    for name in names:
        expected = bits[name][table["sequence"].astype(int), table["position"].astype(int) - spec.skip_first]
        assert (bits_of(store, name).numpy().view(np.uint16) == expected).all()
