"""Plans: what is said before a run is what the run takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache.cli import main
from actcache.errors import ConfigError, SiteError
from actcache.estimate import plan
from actcache.estimate.preset import Terms, _break_even
from actcache.source import read_texts, token_blocks
from actcache.spec import TokenBlocks
from actcache.store import ShardBuffers, StoreWriter
from actcache.store.format.records import HEAD_BYTES
from actcache.store_options import StoreOptions

pytestmark = pytest.mark.exhaustive

SITES = ["blocks.*.hook_mlp_out", "blocks.2.mlp.hook_post"]
PRESETS = ("raw", "lossless", "sparse", "int8", "auto")


@pytest.fixture(scope="module")
def lm():
    return ac.load_lm("stories-4l")


@pytest.fixture(scope="module")
def blocks(lm):
    return token_blocks(read_texts("stories-corpus"), lm.tokenizer, length=128, count=450)


@pytest.fixture(scope="module")
def planned(lm, blocks):
    """Shards of 192 sequences, the last of them partial, and chunks that it does not fill."""
    return plan(lm, blocks, SITES, options=StoreOptions(sequences_per_shard=192), sample_sequences=192)


def extracted(lm, blocks, path, codec, **sizes):
    return ac.extract(lm, blocks, SITES, path, codec=codec, **sizes)


def on_disk(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("codec", PRESETS)
def test_bytes_and_files_are_those_of_the_extraction(tmp_path, lm, blocks, planned, codec):
    store = extracted(lm, blocks, tmp_path / "s.zarr", codec, sequences_per_shard=192)
    said, info = planned.presets[codec], store.info()
    assert said.bytes == pytest.approx(info["bytes"], rel=0.02)
    for name, n_bytes in said.sites.items():
        assert n_bytes == pytest.approx(info["sites"][name]["bytes"], rel=0.03)
        assert said.codecs[name] == info["sites"][name]["codec"]
    files = on_disk(tmp_path / "s.zarr")
    assert said.n_objects == len(files)
    assert said.bytes + said.other_bytes == pytest.approx(sum(f.stat().st_size for f in files), rel=0.02)
    assert said.ratio == pytest.approx(info["compression_ratio"], rel=0.02)


def test_amounts_are_those_of_the_extraction(tmp_path, lm, blocks, planned):
    store = extracted(lm, blocks, tmp_path / "s.zarr", "raw", sequences_per_shard=192)
    amounts = planned.amounts
    assert amounts.n_tokens == blocks.ids.size
    assert amounts.n_rows == store.n_rows
    assert (amounts.n_shards, amounts.sequences_per_shard) == (store.spec.n_shards, 192)
    assert amounts.rows_per_chunk == store.spec.rows_per_chunk
    rows = [math.ceil(n / store.spec.rows_per_chunk) for n in store.shard_n_rows]
    assert amounts.n_chunks == sum(rows)
    assert dict(planned.asked.sites) == {site.name: site.width for site in store.spec.sites}


def test_a_text_of_a_few_sequences_is_planned_nearly_exactly(tmp_path, lm, blocks):
    few = blocks.take(range(5))
    said = plan(lm, few, SITES, sample_sequences=5).presets
    for codec in ("raw", "int8", "lossless"):
        store = extracted(lm, few, tmp_path / f"{codec}.zarr", codec)
        assert said[codec].bytes == pytest.approx(store.info()["bytes"], rel=0.002)


@pytest.mark.filterwarnings("ignore:.*documents are longer than")
@pytest.mark.exhaustive
def test_sequences_of_unequal_length_give_rows_for_their_tokens_only(tmp_path, lm):
    documents = token_blocks(read_texts("stories-corpus"), lm.tokenizer, length=256, count=200, packing="documents")
    lengths = documents.lengths(range(200))
    said = plan(lm, documents, SITES, options=StoreOptions(sequences_per_shard=64), sample_sequences=64)
    store = extracted(lm, documents, tmp_path / "s.zarr", "lossless", sequences_per_shard=64)
    assert len(set(lengths.tolist())) > 20
    assert said.amounts.n_rows == store.n_rows
    assert said.amounts.n_tokens == lengths.sum() < documents.ids.size
    assert said.presets["lossless"].bytes == pytest.approx(store.info()["bytes"], rel=0.02)


def test_time_adds_up(planned):
    """Never less than the model alone, nor than the encoding on all threads; more for what takes longer to encode."""
    measured, asked = planned.measured, planned.asked
    parallel = min(asked.threads, os.cpu_count() or 1)
    for preset in planned.presets.values():
        assert preset.seconds >= planned.forward_s
        assert preset.seconds_range[0] <= preset.seconds <= preset.seconds_range[1]
        assert preset.tokens_per_s == pytest.approx(planned.amounts.n_tokens / preset.seconds)
        assert preset.read_s > 0
    assert planned.forward_s == pytest.approx(planned.amounts.n_tokens * measured.forward_s_per_token)
    encode_s = sum(s.encode_s_per_row for s in measured.presets["lossless"].sites.values()) * planned.amounts.n_rows
    assert planned.presets["lossless"].seconds >= encode_s / parallel * 0.6  # the last shard has fewer rows


def test_text_whose_batches_differ_makes_the_plan_less_sure(lm, blocks, planned):
    """Every other batch consists of one token only: its rows compress to much less than those of stories."""
    dull = blocks.ids.copy()
    dull[np.arange(len(dull)) // 8 % 2 == 1] = 5
    mixed = TokenBlocks(ids=dull, document=blocks.document, description=blocks.description)
    measured = {"options": StoreOptions(sequences_per_shard=128), "batch_sequences": 8, "sample_sequences": 64}
    even, uneven = (plan(lm, text, SITES, **measured).presets for text in (blocks, mixed))
    for codec in PRESETS:
        (low, high), said = uneven[codec].bytes_range, uneven[codec].bytes
        assert low <= said <= high
        if codec == "raw":  # of one size whatever the values are
            assert high == low
        if codec in ("lossless", "sparse"):
            width = high - low
            assert low < 0.95 * said < 1.05 * said < high
            assert width > 3 * (even[codec].bytes_range[1] - even[codec].bytes_range[0]) > 0


def test_the_range_of_the_time_is_that_of_model_and_encoding(planned):
    """All at the pace of the fastest of the batches, and of the slowest."""
    assert planned.forward_s_range == tuple(planned.amounts.n_tokens * s for s in planned.measured.forward_s_range)
    for preset in planned.presets.values():
        assert preset.seconds_range[0] >= planned.forward_s_range[0]
        assert preset.seconds_range[1] >= planned.forward_s_range[1]
        assert preset.read_s_range[0] == preset.read_s < preset.read_s_range[1]
    low, high = planned.memory.total_range
    assert low <= planned.memory.total <= 0.76 * high


def test_a_scaled_plan_is_the_plan_of_so_much(planned):
    n = planned.amounts.n_tokens
    same, more, large = planned.scaled(n), planned.scaled(40 * n), planned.scaled(4000 * n)
    assert same == planned == planned.scaled()
    for codec in PRESETS:
        one, many = more.presets[codec], large.presets[codec]
        assert many.bytes == pytest.approx(100 * one.bytes, rel=0.01)
        assert many.n_objects == pytest.approx(100 * one.n_objects, rel=0.05)
        assert many.seconds == pytest.approx(100 * one.seconds, rel=0.05)
        assert many.cost_per_month == pytest.approx(100 * one.cost_per_month, rel=0.01)
        assert many.ratio == pytest.approx(one.ratio, rel=0.01)
    assert large.memory == more.memory  # independent of the number of tokens
    assert large.amounts.n_tokens == pytest.approx(4000 * n, rel=1e-3)


def test_workers_share_the_time_and_nothing_else(planned):
    large = planned.scaled(10**10)
    ten = large.scaled(workers=10)
    for codec in PRESETS:
        assert ten.presets[codec].seconds == pytest.approx(large.presets[codec].seconds / 10, rel=0.01)
        assert ten.presets[codec].bytes == large.presets[codec].bytes
    assert ten.memory == large.memory
    idle = planned.scaled(workers=1000)  # three shards keep three workers busy
    assert idle.presets["raw"].seconds == pytest.approx(planned.scaled(workers=3).presets["raw"].seconds)


def test_what_one_ledger_cannot_list_is_several_stores(planned):
    huge = planned.scaled(10**13)
    per_store = math.ceil(huge.amounts.n_shards / huge.amounts.n_stores)
    heads = HEAD_BYTES * (len(huge.asked.sites) + 1)
    assert huge.amounts.n_stores > 1
    assert per_store * heads <= 1 << 28
    assert planned.amounts.n_stores == 1


def test_planning_for_more_tokens_than_there_are_is_the_scaled_plan(lm, blocks, planned):
    n_tokens = 100 * blocks.ids.size
    said = plan(
        lm, blocks, SITES, options=StoreOptions(sequences_per_shard=192), n_tokens=n_tokens, sample_sequences=192
    )
    assert said.amounts == planned.scaled(n_tokens).amounts
    assert said.measured.n_rows == planned.measured.n_rows == 192 * 127
    assert said.measured.batch_sequences == 32
    for codec, preset in planned.scaled(n_tokens).presets.items():  # measured by amount: the same on any machine
        assert (said.presets[codec].bytes, said.presets[codec].bytes_range) == (preset.bytes, preset.bytes_range)


def test_the_batch_is_what_was_asked_for_or_found(lm, blocks):
    assert plan(lm, blocks, SITES, batch_sequences=5, sample_sequences=8).batch_sequences == 5
    found = plan(lm, blocks.take(range(8)), SITES, batch_sequences="auto", sample_sequences=8).batch_sequences
    assert 1 <= found <= 8


def test_buffers_are_what_the_writer_holds(tmp_path, lm, blocks, planned):
    store = extracted(lm, blocks, tmp_path / "s.zarr", "raw", sequences_per_shard=192)
    shard = sum(rows.nbytes for rows in ShardBuffers(store.spec, store.spec.sites).rows.values())
    with StoreWriter(tmp_path / "again.zarr", store.spec, store.token_blocks()) as writer:
        assert planned.memory.buffers == writer.n_buffers * shard
    one = planned.scaled(192 * 128)
    assert (one.amounts.n_shards, one.memory.buffers) == (1, shard)
    assert planned.memory.weights == sum(p.nbytes for p in lm.module.parameters())


_EXTRACT = """
import sys
from pathlib import Path
import actcache as ac
from actcache.estimate import plan
from actcache.source import read_texts, token_blocks

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

lm = ac.load_lm("stories-4l")
blocks = token_blocks(read_texts("stories-corpus"), lm.tokenizer, length=256, count=1040)
sites = ["blocks.*.mlp.hook_in", "blocks.*.hook_mlp_out"]
if sys.argv[1] == "plan":
    print(plan(lm, blocks, sites, sample_sequences=192).memory.total)
else:
    ac.extract(lm, blocks, sites, sys.argv[1])
    print(peak())
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak of a process from /proc")
def test_memory_is_about_that_of_the_extraction(tmp_path):
    said, found = (
        int(subprocess.run([sys.executable, "-c", _EXTRACT, what], check=True, capture_output=True).stdout)
        for what in ("plan", str(tmp_path / "s.zarr"))
    )
    assert 0.7 * found < said < 1.3 * found


def test_break_even_is_the_first_epoch_that_pays():
    terms = Terms(compute_price_per_hour=3.6, epochs=4)
    found = _break_even(terms, extract_s=100.0, read_s=10.0, forward_s=60.0, storage_cost=0.1)
    totals = [(100 + 10 * n, 60 * n) for n in range(1, 20)]
    first = next(n for n, (kept, anew) in enumerate(totals, 1) if kept < anew)
    assert found.epochs_in_time == first == 3
    in_money = next(n for n, (kept, anew) in enumerate(totals, 1) if kept * 0.001 + 0.1 < anew * 0.001)
    assert found.epochs_in_money == in_money == 5
    assert (found.store_s, found.recompute_s) == (140.0, 240.0)
    assert found.store_cost == pytest.approx(0.24)
    assert found.recompute_cost == pytest.approx(0.24)
    slow = _break_even(terms, extract_s=100.0, read_s=61.0, forward_s=60.0, storage_cost=0.0)
    assert slow.epochs_in_time is slow.epochs_in_money is None
    free = _break_even(Terms(), extract_s=100.0, read_s=10.0, forward_s=60.0, storage_cost=0.1)
    assert free.epochs_in_time == 3
    assert free.epochs_in_money is free.store_cost is None


def test_what_disk_and_prices_change(tmp_path, lm, blocks, planned):
    slow = plan(
        lm, blocks, SITES, out=tmp_path, terms=Terms(price_per_tb_month=40, read_bytes_per_s=1e3), sample_sequences=8
    )
    raw = slow.presets["raw"]
    assert raw.read_s == pytest.approx(sum(raw.sites.values()) / 1e3)
    assert raw.cost_per_month == pytest.approx((raw.bytes + raw.other_bytes) / 1e12 * 40)
    assert raw.fits is True
    assert slow.scaled(10**14).presets["raw"].fits is False
    assert planned.presets["raw"].fits is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"workers": 0}, "workers must be a positive integer"),
        ({"n_tokens": -5}, "n_tokens must be a positive integer"),
        ({"batch_sequences": 0}, "batch_sequences must be a positive integer"),
        ({"sample_sequences": 0}, "sample_sequences must be a positive integer"),
        ({"time_budget_s": 0}, "time_budget_s must be a number above 0"),
        ({"options": StoreOptions(skip_first=128)}, "skip_first must be between 0 and"),
        ({"options": StoreOptions(rows_per_chunk=7919)}, "must divide rows_per_shard"),
        ({"options": StoreOptions(dtype=None)}, "dtype must be one of"),
    ],
)
def test_what_cannot_be_planned_is_said(lm, blocks, wrong, said):
    with pytest.raises(ConfigError, match=said):
        plan(lm, blocks, SITES, **wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"price_per_tb_month": -1.0}, "price_per_tb_month must be a number from 0 up, got -1.0"),
        ({"compute_price_per_hour": math.nan}, "compute_price_per_hour"),
        ({"read_bytes_per_s": 0}, "read_bytes_per_s must be a number above 0"),
        ({"epochs": 0}, "epochs must be a positive integer"),
    ],
)
def test_prices_that_cannot_be_are_said(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Terms(**wrong)


def test_unknown_sites_and_sequences_beyond_the_context_are_refused(lm, blocks):
    with pytest.raises(SiteError, match=r"blocks\.2\.hook_mlp_out"):
        plan(lm, blocks, ["blocks.2.hook_mlp_ou"])
    long = TokenBlocks(
        ids=np.zeros((2, 257), np.uint32), document=np.zeros((2, 257), np.uint32), description={"length": 257}
    )
    with pytest.raises(ConfigError, match="257 tokens, but stories-4l has a context of 256"):
        plan(lm, long, SITES)


@pytest.mark.exhaustive
def test_the_benchmark_gives_rows(lm, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import plan as benchmark

    found = benchmark.figures(n_sequences=24, pairs=1, time_budget_s=0.5)
    assert len(found) == 4
    assert all(figure.row().count("|") == 7 and figure.ours > 0 for figure in found)


# The command line


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


QUICK = ("--length", "64", "--sample-sequences", "16")


def test_the_verb_says_everything_on_one_screen(capsys, tmp_path):
    code, out, _ = run(
        capsys, "stories-4l", "stories-corpus", "blocks.1.hook_mlp_out", *QUICK, "--count", "64",
        "--out", str(tmp_path / "s.zarr"), "--price-per-hour", "2",
    )  # fmt: skip
    assert code == 0
    for preset in PRESETS:
        assert f"\n {preset} " in out
    for said in (
        "4,096 tokens",
        "64 sequences",
        "free",
        "memory",
        "break-even",
        "USD",
        "epoch",
        "lossless for 1 site",
        "±",
    ):
        assert said in out
    assert not (tmp_path / "s.zarr").exists()


def in_ranges(found):
    for preset in found["presets"].values():
        yield from ((preset[f"{name}_range"], preset[name]) for name in ("bytes", "seconds", "read_s"))
    yield found["forward_s_range"], found["forward_s"]


def test_json_is_one_object(capsys):
    code, out, _ = run(
        capsys, "stories-4l", "stories-corpus", "blocks.*.hook_mlp_out", *QUICK, "--tokens", "1000000000",
        "--workers", "8", "--sequences-per-shard", "256", "--batch-sequences", "16", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert set(found["presets"]) == set(PRESETS)
    assert found["amounts"]["n_tokens"] == pytest.approx(10**9, rel=1e-6)
    assert (found["workers"], found["amounts"]["sequences_per_shard"], found["batch_sequences"]) == (8, 256, 16)
    assert found["presets"]["raw"]["sites"]["blocks.0.hook_mlp_out"] > 10**9 * 128 * 2 * 0.98
    assert found["memory"]["total"] > found["memory"]["buffers"] > 0
    for ranges, value in ((found["memory"]["total_range"], found["memory"]["total"]), *in_ranges(found)):
        assert ranges[0] <= value <= ranges[1]


def test_a_long_local_text_is_measured_in_part_and_counted_whole(capsys, tmp_path, monkeypatch):
    from actcache.cli import plan as verb

    text = tmp_path / "long.jsonl"
    stories = [story for story, _ in zip(read_texts("stories-corpus"), range(2000), strict=False)]
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    arguments = ("stories-4l", str(text), "blocks.1.hook_mlp_out", *QUICK, "--json")
    whole = json.loads(run(capsys, *arguments)[1])
    monkeypatch.setattr(verb, "_WHOLE_TOKENS", 1 << 16)
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "estimated" in err
    assert "asked for" not in err
    assert json.loads(out)["amounts"]["n_tokens"] == pytest.approx(whole["amounts"]["n_tokens"], rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stories-4l", "stories-corpus", "blocks.9.hook_mlp_out"), "no site matches"),
        (
            ("stories-4l", "stories-corpus", "blocks.1.hook_mlp_out", "--length", "300", "--count", "8"),
            "context of 256",
        ),
        (("stories-4l", "stories-corpus", "blocks.1.hook_mlp_out", "--price-per-tb", "-3", "--count", "8"), "price"),
        (("stories-4l", "owner/dataset", "blocks.1.hook_mlp_out"), "--count, or how many tokens with --tokens"),
        (("stories-4l", "/no/such/file.txt", "blocks.1.hook_mlp_out"), "no text at /no/such/file.txt"),
        (("stories-4l", "no-such-file.jsonl", "blocks.1.hook_mlp_out"), "no text at no-such-file.jsonl"),
        (("stories-4l", "stories-corpus"), "SITES"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_1(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert not out
    assert said in err
