"""Batches that are made on a device: the same bits as on the CPU, however late the device is with its work.

Without a GPU, the CPU takes its part: at once, or as a device whose streams are threads that fall behind.
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from resume import run_test_resume_at_every_batch

from actcache.errors import ConfigError, CorruptShardError
from actcache.load import Loader
from actcache.load.batches import maker as make
from actcache.load.device.link import DeviceLink
from actcache.load.device.streams import CudaStream, PlainStream, Stream, pinned_bytes
from actcache.spec import Site
from actcache.store import RowFilter, Store, export, open_store
from actcache.store.format.keys import sharded_key

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_loader

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SITES = (
    Site(name="a", shape=(12,)),
    Site(name="b", shape=(12,), codec="int8"),
    Site(name="c", shape=(6,), codec="raw"),
    Site(name="d", shape=(6,), codec="int8", feature_exponents=(0, 5, 0, 0, 0, 1)),
)
MODES = {
    "plain": {},
    "epochs": {"epochs": 3, "batch_rows": 100},
    "lanes": {"lanes": 3},
    "a rank of two": {"lanes": 2, "rank": 1, "world_size": 2, "epochs": 2},
    "chosen rows": {"rows": RowFilter(exclude_tokens=range(0, 900)), "batch_rows": 7},
    "reading order": {"order": "sequence", "batch_rows": 40, "memory": 20_000},
    "normalised": {"normalize": "center-rms", "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Rows with a mean far from 0, two of them not finite; one store with rows left out."""
    folder, blocks, found = tmp_path_factory.mktemp("device"), random_blocks(45, 13), {}
    for dtype in ("bfloat16", "float16", "float32"):
        spec = replace(spec_of(blocks, dtype=dtype), sites=SITES)
        stored = {}
        for site, value in random_bits(replace(spec, dtype="float32")).items():
            value = (3 * value + 5).astype(np.float32)
            value[3, 4, 1], value[30, 2, 0] = np.nan, np.inf
            value[7, 7] = 0
            stored[site] = (
                (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else value.astype(dtype)
            )
        found[dtype] = write_shards(folder / f"{dtype}.zarr", spec, blocks, stored)
    kept = np.random.default_rng(5).random(spec.n_rows) < 0.6
    return {**found, "holes": export(found["bfloat16"], folder / "holes.zarr", rows=kept)}


def loader_of(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 20, "memory": 6000, "seed": 3, "threads": 2, "drop_last": False}
    return Loader(store, ["*"], **{**settings, **changes})


def batches_of(loader: Loader) -> list[dict[str, torch.Tensor]]:
    """All batches, kept until the last one is there: windows have long been written over."""
    with loader:
        batches = list(loader)
    return [{"rows": batch.rows, **{site: bits(batch[site].cpu()) for site in batch}} for batch in batches]


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of values, all NaN alike."""
    whole = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])
    return torch.where(values.isnan(), -1, whole)


def assert_same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    assert len(left) == len(right) > 1
    for one, other in zip(left, right, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert torch.equal(one[name], other[name]), name


class LateStream:
    """A stream of the CPU: a thread does what is asked of it, in order, but later. Fresh memory has garbage in it."""

    copies_s, gathers_s = 0.0, 0.0
    made: list[LateStream]

    def __init__(self, device: torch.device) -> None:
        self._most_s = self.gathers_s if len(self.made) % 2 else self.copies_s  # a link makes that of its copies first
        self.made.append(self)
        self.failure: BaseException | None = None
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                work()
            except BaseException as failure:
                self.failure = failure

    def end(self) -> None:
        self._asked.put(None)
        self._thread.join()
        assert self.failure is None

    @classmethod
    def current(cls, device: torch.device) -> Consumer:
        return Consumer(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def host_bytes(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def run(self, work: Callable[[], object]) -> None:
        self._asked.put(lambda: (time.sleep(random.random() * self._most_s), work()))

    def record(self) -> LateEvent:
        event = LateEvent()
        self._asked.put(event.reached.set)
        return event

    def wait(self, event: LateEvent) -> None:
        self._asked.put(event.reached.wait)

    def uses(self, memory: torch.Tensor) -> None:
        pass


class LateEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()

    def synchronize(self) -> None:
        self.reached.wait()


class Consumer(PlainStream):
    """The consumer of late streams, who has no stream but his thread."""

    def wait(self, event: LateEvent) -> None:
        event.synchronize()


def work_with(monkeypatch: pytest.MonkeyPatch, streams: type[Stream], device: str = "cpu") -> None:
    """Loaders that are made from now on take this road to the device."""
    monkeypatch.setattr(make, "link_to", lambda _: DeviceLink(torch.device(device), streams))


@pytest.fixture(params=[(0.003, 0.0), (0.0, 0.01), (0.002, 0.002)], ids=["late copies", "late gathers", "both late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Work with late streams; after the test they must have gone without a failure."""
    for name, value in zip(("copies_s", "gathers_s", "made"), (*request.param, []), strict=True):
        monkeypatch.setattr(LateStream, name, value, raising=False)

    def begin() -> None:
        work_with(monkeypatch, LateStream)

    yield begin
    assert LateStream.made
    for stream in LateStream.made:
        stream.end()


@pytest.mark.parametrize("normalize", [None, "rms", "center", "center-rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "holes"])
def test_batches_of_a_device_have_the_bits_of_the_cpu(stores, monkeypatch, name, dtype, normalize):
    settings = {"dtype": dtype, "normalize": normalize}
    expected = batches_of(loader_of(stores[name], **settings))
    work_with(monkeypatch, PlainStream)
    loader = loader_of(stores[name], **settings)
    assert loader.plan.n_windows > 2
    assert_same(batches_of(loader), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_device_that_is_late_gives_the_same_bits(stores, late, mode):
    settings = {"batch_rows": 50, **MODES[mode]}
    expected = batches_of(loader_of(stores["bfloat16"], **settings))
    late()
    assert_same(batches_of(loader_of(stores["bfloat16"], **settings)), expected)


def test_an_iteration_broken_off_leaves_nothing_behind_that_the_next_one_meets(stores, late):
    expected = batches_of(loader_of(stores["bfloat16"]))
    late()
    loader = loader_of(stores["bfloat16"])
    start = loader.state_dict()
    for n_taken in (1, 4, 11):
        for _, _ in zip(range(n_taken), loader, strict=False):
            pass
        loader.load_state_dict(start)
    assert_same(batches_of(loader), expected)


def test_a_batch_of_a_device_is_the_consumers_own(stores, late):
    expected = batches_of(loader_of(stores["bfloat16"]))
    late()
    got = []
    with loader_of(stores["bfloat16"]) as loader:
        for batch in loader:
            got.append({"rows": batch.rows, **{site: bits(batch[site].clone()) for site in batch}})
            for site in batch:
                batch[site].fill_(1e9)
    assert_same(got, expected)


def test_resume_at_every_batch_of_a_device(stores, monkeypatch):
    work_with(monkeypatch, PlainStream)
    finite = RowFilter(sequences=range(4, 24))
    assert run_test_resume_at_every_batch(lambda **to: loader_of(stores["bfloat16"], rows=finite, lanes=2, **to)) == 12


def test_windows_are_on_the_device_and_the_cpu_holds_two_chunks_a_thread(stores, monkeypatch):
    asked = []

    class Counting(PlainStream):
        def host_bytes(self, n_bytes: int) -> torch.Tensor:
            asked.append(n_bytes)
            return super().host_bytes(n_bytes)

    work_with(monkeypatch, Counting)
    store = stores["float32"]
    loader = loader_of(store)
    batches_of(loader)
    (windows,) = loader._production.windows.values()
    for window in windows:
        assert not window.stored
        assert not window._rows
        assert window.there.rows["a", "acts"].shape == (loader.plan.most_window_rows, 12)
    largest = store.spec.rows_per_chunk * 12 * 4
    assert max(asked) <= largest
    # Each of the two threads has memory twice, and takes more where its first chunks were of narrower sites.
    assert len(asked) <= 2 * 2 * 4


def test_damage_is_found_on_the_way_to_a_device(stores, late, tmp_path):
    damaged = export(stores["bfloat16"], tmp_path / "damaged.zarr", rows=RowFilter(sequences=range(0, 40)))
    path = Path(damaged.path) / sharded_key("c", "acts", 1)
    stored = bytearray(path.read_bytes())
    stored[50] ^= 1
    path.write_bytes(stored)
    late()
    with pytest.raises(CorruptShardError, match="does not match its checksum"):
        list(loader_of(open_store(damaged.path)))


def test_the_time_of_a_device_is_counted(stores, monkeypatch):
    work_with(monkeypatch, PlainStream)
    loader = loader_of(stores["bfloat16"])
    list(loader)
    stats = loader.stats()
    assert (stats.n_batches, stats.n_rows) == (27, 540)
    assert 0 < stats.gather_seconds < stats.seconds
    assert stats.decode_seconds > 0


def test_a_device_that_is_not_there_is_refused(stores):
    with pytest.raises(ConfigError, match=r"device 'cuda:99' cannot be used here \(.*\); try 'cpu'"):
        loader_of(stores["bfloat16"], device="cuda:99")


def test_memory_is_pinned_where_that_is_possible_and_usable_where_not():
    memory = pinned_bytes(1000)
    assert memory.is_pinned() == torch.cuda.is_available()
    assert memory.fill_(3).sum() == 3000


@pytest.mark.exhaustive
def test_the_benchmark_gives_a_row_for_each_codec(monkeypatch, tmp_path):
    work_with(monkeypatch, PlainStream)
    found = list(gpu_loader.figures(torch.device("cpu"), replace(gpu_loader.SMALL, n_sequences=12), tmp_path))
    assert [figure.goal for _, figure in found] == [None] * 6 + [0.97] * 3
    assert all(figure.row().count("|") == 7 for _, figure in found)
    assert not list(tmp_path.iterdir())


class SlowCopies(CudaStream):
    """Each copy begins some 0.1 ms late, so that whoever does not wait for it is too early."""

    late = "copies"
    made = 0

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        super().__init__(device, stream)
        self._is_late = stream is None and (type(self).made % 2 == 0) == (self.late == "copies")
        type(self).made += stream is None

    def run(self, work: Callable[[], object]) -> None:
        super().run(lambda: (torch.cuda._sleep(200_000) if self._is_late else None, work()))


class SlowGathers(SlowCopies):
    """Each gather, likewise."""

    late = "gathers"
    made = 0


@needs_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streams", [CudaStream, SlowCopies, SlowGathers])
@pytest.mark.parametrize("own_stream", [False, True])
def test_batches_of_a_gpu_have_the_bits_of_the_cpu(stores, monkeypatch, mode, streams, own_stream):
    expected = batches_of(loader_of(stores["bfloat16"], **MODES[mode]))
    work_with(monkeypatch, streams, "cuda:0")
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.default_stream()):
        got = []
        for batch in loader_of(stores["bfloat16"], **MODES[mode]):
            got.append({"rows": batch.rows, **{site: bits(batch[site].cpu()) for site in batch}})
            for site in batch:
                batch[site].fill_(1e9)
    assert_same(got, expected)


@needs_gpu
@pytest.mark.parametrize("normalize", [None, "rms", "center", "center-rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "holes"])
def test_a_gpu_rounds_as_the_cpu_does(stores, name, dtype, normalize):
    settings = {"dtype": dtype, "normalize": normalize}
    expected = batches_of(loader_of(stores[name], **settings))
    assert_same(batches_of(loader_of(stores[name], device="cuda", **settings)), expected)
