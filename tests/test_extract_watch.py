"""What an extraction says while it runs, what it warns of, and how it chooses and halves its batches."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import random_blocks
from test_extract import SITES, SIZES, tiny_lm

import actcache as ac
from actcache.errors import ConfigError
from actcache.status import Status


@pytest.fixture(scope="module")
def blocks():
    return random_blocks(29, 21)


def test_status_counts_to_the_end(tmp_path, blocks):
    seen: list[Status] = []
    store = ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", watch=seen.append, **SIZES)
    assert [s.n_sequences_done for s in seen] == sorted(s.n_sequences_done for s in seen)
    last = seen[-1]
    assert (last.n_sequences_done, last.n_sequences, last.n_sequences_here) == (29, 29, 29)
    assert last.n_tokens == 29 * 21
    assert last.tokens_per_s > 0
    assert last.eta_s == 0
    assert all(0 <= s.queue <= s.queue_size for s in seen)
    assert [s.n_bytes for s in seen] == sorted(s.n_bytes for s in seen)
    assert last.n_bytes == store.info()["bytes"]
    assert last.queue == 0
    shown = last.sites["blocks.0.mlp.hook_in"]
    assert shown.mean_norm > 0
    assert shown.n_nan == 0
    assert not shown.dead


def test_a_continued_run_counts_what_was_there(tmp_path, blocks):
    class _StopError(Exception):
        pass

    def stop(status: Status) -> None:
        if status.n_sequences_done > 20:
            raise _StopError

    with pytest.raises(_StopError):
        ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", watch=stop, **SIZES)
    n_there = len(ac.open_store(tmp_path / "s.zarr").committed) * 8
    seen: list[Status] = []
    ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", watch=seen.append, **SIZES)
    assert 8 <= n_there <= 24
    assert seen[0].n_sequences_done - seen[0].n_sequences_here == n_there
    assert seen[-1].n_sequences_share == 29 - n_there
    assert seen[-1].n_sequences_done == 29


def damage_position(lm) -> None:
    lm.module.pos_embed.weight[5, 0] = float("nan")


def kill_last_mlp(lm) -> None:
    lm.module.blocks[1].mlp.out.weight.zero_()
    lm.module.blocks[1].mlp.out.bias.fill_(0.5)


@pytest.mark.parametrize(
    ("harm", "expected", "n_sites"),
    [
        (damage_position, r"are NaN and 0 infinite; the model overflows", 4),
        (kill_last_mlp, r"^blocks\.1\.hook_mlp_out: every row is the same, so there is nothing to learn", 1),
    ],
)
def test_nan_and_dead_sites_are_warned_of_once(tmp_path, blocks, harm, expected, n_sites):
    lm = tiny_lm()
    with torch.no_grad():
        harm(lm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", **SIZES)
    said = [str(w.message) for w in caught if str(w.message).startswith("blocks.")]
    assert len(said) == n_sites
    assert all(re.search(expected, text) for text in said)


def test_other_circumstances_are_noted_when_a_store_is_continued(tmp_path, blocks):
    lm = tiny_lm()
    ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", part=(1, 2), **SIZES)
    with pytest.warns(UserWarning, match=r"begun in other circumstances \(batch_sequences: 3, now 5\)"):
        store = ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", **{**SIZES, "batch_sequences": 5})
    assert store.sealed
    found = store.info()["provenance"]
    assert found["batch_sequences"] == 3
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"].startswith("cpu")


def test_a_batch_that_is_found_is_kept_by_who_continues(tmp_path, blocks):
    lm = tiny_lm()
    sizes = {**SIZES, "batch_sequences": "auto"}
    begun = ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", part=(1, 2), **sizes)
    found = begun.root.provenance["batch_sequences"]
    assert 1 <= found <= 29
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wish in (None, "auto"):
            ac.extract(lm, blocks, SITES, tmp_path / "s.zarr", **{**sizes, "batch_sequences": wish})
    for wrong in (0, -1, True):
        with pytest.raises(ConfigError, match="batch_sequences must be a positive integer"):
            ac.extract(lm, blocks, SITES, tmp_path / "t.zarr", **{**sizes, "batch_sequences": wrong})


_HUNGRY = """
import resource, sys, warnings
sys.path.insert(0, sys.argv[2])
import torch
from conftest import random_blocks
import actcache as ac

class Hungry(torch.nn.Module):
    # Needs 64 MiB a sequence, for a moment.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(2048, 8)
    def forward(self, ids):
        room = torch.empty(len(ids), 1 << 24)
        return self.embed(ids) + 0 * room.numel()

lm, blocks = ac.load_lm(Hungry()), random_blocks(24, 9)
lm.resolve(["embed:out"])
# Threads and libraries are there before memory is limited.
ac.extract(lm, random_blocks(2, 9), ["embed:out"], sys.argv[1] + ".first", batch_sequences=1, dtype="float32")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (900 << 20), resource.RLIM_INFINITY))
warnings.simplefilter("always")
store = ac.extract(lm, blocks, ["embed:out"], sys.argv[1], batch_sequences=16, sequences_per_shard=24, dtype="float32")
assert store.n_rows == 24 * 8, store
ids = torch.from_numpy(blocks.ids.astype("int64"))
table = store.row_table()
assert torch.equal(store.read("embed:out", slice(None)), lm.module.embed(ids)[table["sequence"], table["position"]])
"""


def test_batches_are_halved_when_memory_does_not_suffice(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _HUNGRY, str(tmp_path / "s.zarr"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in re.findall(r"going on with (\d+) sequences at a time", done.stderr)]
    assert sizes
    assert sizes[0] == 8
    assert sizes == [8 >> i for i in range(len(sizes))]


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 0), (1.0, 2)])
def test_parts_that_are_none(tmp_path, blocks, part):
    with pytest.raises(ConfigError, match=r"part i of n with i from 1 to n"):
        ac.extract(tiny_lm(), blocks, SITES, tmp_path / "s.zarr", part=part, **SIZES)
