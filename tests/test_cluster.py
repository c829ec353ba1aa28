"""Extraction by workers of dask: real processes, killed for real."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import actcache as ac
from actcache.cluster import connect, driver, extract_on_cluster
from actcache.cluster.connect import connected
from actcache.cluster.driver import _next_group
from actcache.errors import ClusterError, ConfigError, ModelNotFoundError, StoreBusyError, StoreMismatchError
from actcache.extraction import begin
from actcache.lm import LanguageModel, load_lm
from actcache.lm.stories import StoriesConfig, StoriesLM
from actcache.spec import TokenBlocks
from actcache.status import Status
from actcache.store import Store, StoreWriter, open_store
from actcache.store_options import StoreOptions

pytestmark = pytest.mark.exhaustive

SMALL = StoriesConfig(d_model=16, d_mlp=24, n_layers=3, n_heads=2, n_ctx=12, d_vocab=40)
SITES = ["blocks.*.hook_mlp_out", "blocks.1.mlp.hook_in"]
SETTINGS: dict[str, Any] = {"sequences_per_shard": 4, "batch_sequences": 2}
N_SHARDS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: how many threads share a matrix product may show in its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_PAUSE_S", 0.1)


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(SMALL)))
    save_file(StoriesLM(SMALL).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return load_lm(str(folder))


def blocks_of(n_shards: int) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(0, 40, (4 * n_shards - 1, 12)).astype(np.uint32)
    return TokenBlocks(ids=ids, document=np.zeros_like(ids), description={"length": 12})


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return blocks_of(N_SHARDS)


@pytest.fixture(scope="module")
def by_one_process(lm: LanguageModel, blocks: TokenBlocks, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return ac.extract(lm, blocks, SITES, tmp_path_factory.mktemp("stores") / "one.zarr", **SETTINGS)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected("local:2", lambda sentence: None) as client:
        yield client


def assert_same(store: Store, wanted: Store) -> None:
    assert store.sealed
    assert store.root.fingerprint == wanted.root.fingerprint
    assert ac.verify(store.path) == []


def worker_pids(client: Any) -> list[int]:
    return list(client.run(os.getpid).values())


def wait_until(holds: Callable[[], bool], seconds: float = 600) -> None:
    give_up_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.005)


@contextmanager
def held(lm: LanguageModel, blocks: TokenBlocks, path: Path, shards: range) -> Iterator[None]:
    """Begin the store, and keep these shards from being made: however quick the workers are, work is left."""
    begin(lm, blocks, SITES, path, StoreOptions(sequences_per_shard=4), batch_sequences=2)
    with StoreWriter(path, open_store(path).spec, None, shared=True) as writer:
        assert all(writer.claim(shard) for shard in shards)
        yield


def n_committed(path: Path) -> int:
    folders = list(path.glob("sites/*/commit"))
    return min((len(list(folder.glob("c.*"))) for folder in folders), default=0)


# The same store, whoever makes it


def test_workers_write_the_store_that_one_process_writes(
    client: Any, lm: LanguageModel, blocks: TokenBlocks, by_one_process: Store, tmp_path: Path
) -> None:
    seen, said = list[Status](), list[str]()
    address = client.cluster.scheduler_address
    made = extract_on_cluster(
        lm, blocks, SITES, tmp_path / "a.zarr", cluster=address, watch=seen.append, say=said.append, **SETTINGS
    )
    assert said == [f"2 workers; dashboard: {client.dashboard_link}"]
    assert_same(made, by_one_process)
    last = seen[-1]
    assert (last.n_sequences_done, last.n_sequences) == (blocks.n_sequences, blocks.n_sequences)
    assert (last.n_sequences_here, last.n_sequences_share) == (blocks.n_sequences, blocks.n_sequences)
    assert last.n_tokens == blocks.ids.size
    assert last.n_bytes == by_one_process.info()["bytes"]
    assert last.sites.keys() == set(made.sites)
    for name, site in last.sites.items():
        wanted = made.stats(name)
        assert site.mean_norm == pytest.approx(wanted.mean_norm, rel=1e-3)
        assert (site.abs_max, site.n_nan, site.n_inf, site.dead) == (wanted.abs_max, 0, 0, False)
    assert all(a.n_sequences_done <= b.n_sequences_done for a, b in itertools.pairwise(seen))


def test_finished_store_is_returned_as_it_is(
    client: Any, lm: LanguageModel, blocks: TokenBlocks, by_one_process: Store, tmp_path: Path
) -> None:
    path = tmp_path / "a.zarr"
    shutil.copytree(by_one_process.path, path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert_same(extract_on_cluster(lm, blocks, SITES, path, cluster=client, **SETTINGS), by_one_process)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_what_is_there_is_not_made_again(
    client: Any, lm: LanguageModel, blocks: TokenBlocks, by_one_process: Store, tmp_path: Path
) -> None:
    path, seen = tmp_path / "a.zarr", list[Status]()
    ac.extract(lm, blocks, SITES, path, part=(1, 2), **SETTINGS)
    made = extract_on_cluster(lm, blocks, SITES, path, cluster=client, watch=seen.append, **SETTINGS)
    assert_same(made, by_one_process)
    assert seen[-1].n_sequences_share == seen[-1].n_sequences_here == 4 * N_SHARDS // 2 - 1
    assert seen[-1].n_tokens == 12 * seen[-1].n_sequences_here


# Workers, tasks and drivers that die


@pytest.mark.exhaustive
def test_worker_that_is_killed_costs_nothing_but_time(client: Any, lm: LanguageModel, tmp_path: Path) -> None:
    many = blocks_of(120)
    wanted = ac.extract(lm, many, SITES, tmp_path / "one.zarr", **SETTINGS)
    path, pids = tmp_path / "a.zarr", worker_pids(client)
    with ThreadPoolExecutor(1) as pool:
        with held(lm, many, path, range(100, 120)):
            making = pool.submit(extract_on_cluster, lm, many, SITES, path, cluster=client, **SETTINGS)
            wait_until(lambda: n_committed(path) > 10)
            os.kill(pids[0], signal.SIGKILL)
        made = making.result(timeout=600)
    assert_same(made, wanted)
    assert pids[0] not in worker_pids(client)


@pytest.mark.exhaustive
def test_work_that_kills_every_worker_is_an_error_that_says_so(client: Any, lm: LanguageModel, tmp_path: Path) -> None:
    path, pids = tmp_path / "a.zarr", worker_pids(client)
    scheduler = client.cluster.scheduler
    allowed, scheduler.allowed_failures = scheduler.allowed_failures, 0
    try:
        many = blocks_of(120)
        with ThreadPoolExecutor(1) as pool:
            with held(lm, many, path, range(100, 120)):
                making = pool.submit(extract_on_cluster, lm, many, SITES, path, cluster=client, **SETTINGS)
                wait_until(lambda: n_committed(path) > 10)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            with pytest.raises(ClusterError, match=r"shards? \d+.*workers that tried have died.*same command again"):
                making.result(timeout=600)
    finally:
        scheduler.allowed_failures = allowed


def test_task_that_runs_twice_at_once_is_made_once(
    client: Any, lm: LanguageModel, blocks: TokenBlocks, by_one_process: Store, tmp_path: Path
) -> None:
    path = tmp_path / "a.zarr"
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(extract_on_cluster, lm, blocks, SITES, path, cluster=client, **SETTINGS) for _ in range(2)]
        for making in both:
            assert_same(making.result(timeout=600), by_one_process)


def test_driver_waits_for_who_holds_a_shard(
    client: Any,
    lm: LanguageModel,
    blocks: TokenBlocks,
    by_one_process: Store,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.zarr"
    begin(lm, blocks, SITES, path, StoreOptions(sequences_per_shard=4), batch_sequences=2)
    with ThreadPoolExecutor(1) as pool:
        with StoreWriter(path, open_store(path).spec, None, shared=True) as writer:
            assert writer.claim(7)
            making = pool.submit(extract_on_cluster, lm, blocks, SITES, path, cluster=client, **SETTINGS)
            wait_until(lambda: n_committed(path) == N_SHARDS - 1)
            time.sleep(0.5)
            assert not making.done()
            assert open_store(path).committed == [shard for shard in range(N_SHARDS) if shard != 7]
        assert_same(making.result(timeout=600), by_one_process)


def test_driver_does_not_wait_for_ever(
    client: Any, lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_PATIENCE_S", 0.5)
    path = tmp_path / "a.zarr"
    begin(lm, blocks, SITES, path, StoreOptions(sequences_per_shard=4), batch_sequences=2)
    with StoreWriter(path, open_store(path).spec, None, shared=True) as writer:
        assert writer.claim(7)
        with pytest.raises(StoreBusyError, match=r"shards 7 of .*a.zarr are being made by others"):
            extract_on_cluster(lm, blocks, SITES, path, cluster=client, **SETTINGS)


def test_interrupted_call_takes_its_tasks_back_and_says_how_far_it_was(
    client: Any, lm: LanguageModel, tmp_path: Path
) -> None:
    path, many = tmp_path / "a.zarr", blocks_of(100)

    def stop(status: Status) -> None:
        if n_committed(path) > 10:
            raise KeyboardInterrupt

    with held(lm, many, path, range(80, 100)), pytest.raises(KeyboardInterrupt) as caught:
        extract_on_cluster(lm, many, SITES, path, cluster=client, watch=stop, **SETTINGS)
    assert "of 100 shards of" in caught.value.__notes__[0]
    wait_until(lambda: not any(client.run(lambda dask_worker: dask_worker.state.executing_count).values()))
    there = n_committed(path)
    time.sleep(0.5)
    assert 10 < there == n_committed(path) < 100
    assert extract_on_cluster(lm, many, SITES, path, cluster=client, **SETTINGS).sealed


@pytest.mark.exhaustive
def test_call_goes_on_after_its_scheduler_was_killed(lm: LanguageModel, tmp_path: Path) -> None:
    path, many, log = tmp_path / "a.zarr", blocks_of(120), (tmp_path / "log").open("w")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"

    def started(program: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *arguments, "--no-dashboard"]
        return subprocess.Popen(command, stderr=log, text=True)

    processes = []
    try:
        for by_the_end in (False, True):
            processes = [started("scheduler", "--host", "127.0.0.1", "--port", port)]
            processes += [started("worker", address, "--nthreads", "1")]
            with ThreadPoolExecutor(1) as pool:
                if by_the_end:
                    extract_on_cluster(lm, many, SITES, path, cluster=address, **SETTINGS)
                    break
                with held(lm, many, path, range(100, 120)):
                    making = pool.submit(extract_on_cluster, lm, many, SITES, path, cluster=address, **SETTINGS)
                    wait_until(lambda: n_committed(path) > 10)
                    processes[0].kill()
                with pytest.raises(ClusterError, match=r"scheduler is gone.*same command again"):
                    making.result(timeout=600)
            for process in processes:
                process.kill()
                process.wait()
            assert 10 < n_committed(path) < 120
    finally:
        for process in processes:
            process.terminate()
            process.wait(600)
        log.close()
    assert_same(open_store(path), ac.extract(lm, many, SITES, tmp_path / "one.zarr", **SETTINGS))


@pytest.mark.exhaustive
def test_command_that_is_stopped_leaves_no_worker_and_goes_on_when_called_again(
    lm: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    path, ids = tmp_path / "a.zarr", tmp_path / "ids.npy"
    np.save(ids, blocks_of(400).ids)
    blocks = ac.token_blocks(ac.read_documents(str(ids)), lm.tokenizer, length=12, seed=0)
    command = [
        *(sys.executable, "-m", "actcache", "extract", "--model", str(folder), "--text", str(ids), "--length", "12"),
        *("--sites", *SITES, "--out", str(path), "--sequences-per-shard", "4", "--batch-sequences", "2"),
        *("--dask", "local:2"),
    ]
    for by in (signal.SIGKILL, signal.SIGINT):
        # Shards of the round before are no sign that this one is at work.
        enough = n_committed(path) + 5
        # A process that a shell runs in its background ignores SIGINT, and so do its children unless told.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with held(lm, blocks, path, range(350, 400)):
            driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
            wait_until(lambda enough=enough: n_committed(path) > enough)
            workers = psutil.Process(driver.pid).children(recursive=True)
            driver.send_signal(by)
        said = driver.communicate(timeout=600)[1]
        assert psutil.wait_procs(workers, timeout=600)[1] == []
        assert enough < n_committed(path) < 400
    assert driver.returncode == 130
    assert "of 400 shards of" in said
    assert "Traceback" not in said
    last = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr
    assert "2 workers; dashboard: http://127.0.0.1:" in last.stderr
    assert_same(open_store(path), ac.extract(lm, blocks, SITES, tmp_path / "one.zarr", **SETTINGS))


# What cannot work is said


def test_other_weights_on_a_worker_are_refused(client: Any, blocks: TokenBlocks, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "other")
    lm = load_lm(str(folder))
    assert lm.identity["weights"]
    weights = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    path = tmp_path / "a.zarr"
    with pytest.raises(StoreMismatchError, match=r"(?s)shards? \d+.* on worker tcp://.*model.weights: the store has"):
        extract_on_cluster(lm, blocks, SITES, path, cluster=client, **SETTINGS)
    assert open_store(path).committed == []


def test_model_that_a_worker_cannot_open_is_said_with_the_shard(
    client: Any, blocks: TokenBlocks, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "gone")
    lm = load_lm(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFoundError, match=r"shards? \d+.* on worker tcp://.*gone"):
        extract_on_cluster(lm, blocks, SITES, tmp_path / "a.zarr", cluster=client, **SETTINGS)


def test_warnings_of_workers_are_heard_once(client: Any, blocks: TokenBlocks, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    last = next(name for name in sorted(weights, reverse=True) if name.startswith("blocks.2.") and "mlp" in name)
    weights[last] = torch.full_like(weights[last], torch.inf)
    save_file(weights, folder / "model.safetensors")
    lm = load_lm(str(folder))
    with pytest.warns(UserWarning, match="values are NaN") as caught:
        extract_on_cluster(lm, blocks, ["blocks.2.hook_mlp_out"], tmp_path / "a.zarr", cluster=client, **SETTINGS)
    assert len([w for w in caught if "values are NaN" in str(w.message)]) == 1


def test_model_given_as_an_object_cannot_be_sent(blocks: TokenBlocks, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given as an object"):
        extract_on_cluster(load_lm(StoriesLM(SMALL)), blocks, SITES, tmp_path / "a.zarr", cluster="local:2")


@pytest.mark.parametrize("cluster", ["local:0", "local:two", "localhost:8786", ""])
def test_what_names_no_cluster_is_refused(cluster: str, lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local:"):
        extract_on_cluster(lm, blocks, SITES, tmp_path / "a.zarr", cluster=cluster)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("cluster", ["tcp://127.0.0.1:1", "carrier-pigeon://coop:1"])
def test_scheduler_that_does_not_answer_is_said(
    cluster: str, lm: LanguageModel, blocks: TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_CONNECT_S", 0.5)
    with pytest.raises(ClusterError, match=f"no dask scheduler answers at {cluster} .*start one with"):
        extract_on_cluster(lm, blocks, SITES, tmp_path / "a.zarr", cluster=cluster)


def test_scheduler_without_workers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(connect, "_FIRST_WORKER_S", 0.3)
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        with pytest.raises(ClusterError, match="has had no worker"), connected(address, lambda sentence: None):
            pass


# Shares and sums


@pytest.mark.parametrize(("n_shards", "n_workers"), [(1, 1), (5, 2), (40, 2), (1000, 7), (3, 64)])
def test_groups_are_neighbours_and_cover_every_shard_once(n_shards: int, n_workers: int) -> None:
    from collections import deque

    left = deque(shard for shard in range(2 * n_shards) if shard % 5 != 3)
    wanted, groups = list(left), []
    while left:
        groups.append(_next_group(left, n_workers))
    assert [shard for group in groups for shard in group] == wanted
    assert all(group == tuple(range(group[0], group[0] + len(group))) for group in groups)
    assert all(len(group) == 1 for group in groups[-n_workers:])
