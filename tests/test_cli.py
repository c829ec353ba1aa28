"""The command line: results on stdout, everything else on stderr, one clean line for errors, honest exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import actcache
from actcache.cli import build_app, main
from actcache.store import Store

ROOT = Path(actcache.__file__).parent.parent
SITE_IN, SITE_OUT = "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"
STORE_VERBS = ("extract", "info", "verify", "repair", "extend", "add-sites", "delete-sites", "export", "import")
VERBS = ("demo", "sites", "plan", *STORE_VERBS, "serve", "train", "evaluate", "report")


def run(*arguments: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "actcache", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, **more)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "acts.zarr"
    wanted = ["--sites", SITE_IN, SITE_OUT, "--out", str(path), "--length", "64", "--count", "32", "--codec", "raw"]
    assert main(["extract", *wanted]) == 0
    return path


@pytest.fixture
def trained(store: Path, tmp_path: Path) -> Path:
    sizes = ["--n-steps", "10", "--batch-rows", "128", "--expansion", "2", "--warmup-steps", "2"]
    sites = ["--site-in", SITE_IN, "--site-out", SITE_OUT]
    assert main(["train", str(store), *sites, "--out", str(tmp_path / "run"), *sizes]) == 0
    return tmp_path / "run"


def test_help_names_every_verb_and_says_what_each_does(tmp_path: Path) -> None:
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(f" {verb} " in shown.stdout for verb in VERBS)
    assert "Exit codes" in shown.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_is_explained(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = build_app()
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--json" in shown
    arguments = app[verb].assemble_argument_collection(parse_docstring=True)
    assert [argument.name for argument in arguments if argument.show and not argument.parameter.help] == []


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("actcache")


def test_a_user_error_is_one_clean_line_and_code_1(tmp_path: Path) -> None:
    done = run("info", "nowhere.zarr", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith("error: no activation store at nowhere.zarr")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "error: there is no verb 'bogus'; see 'actcache --help'\n"),
        (["inof"], "error: there is no verb 'inof' (did you mean info?); see 'actcache --help'\n"),
        (["--verison"], "error: actcache has no option --verison; see 'actcache --help'\n"),
        (["info", "--bogus"], "error: actcache info has no option --bogus; see 'actcache info --help'\n"),
        (["info", "a", "--josn"], "has no option --josn (did you mean --json?)"),
        (["info", "a", "b"], "actcache info does not take 'b'; see"),
        (["extract", "--sites", "a", "--out"], "error: --out needs a value; see"),
        (["extract", "--sites", "a"], "error: actcache extract needs --out; see"),
        (["extract", "--sites", "a", "--out", "b", "--out", "c"], "error: --out is given twice; see"),
        (["export", "a", "--out", "b", "--format", "tar"], "--format takes zarr or saelens, not 'tar'; see"),
        (["extend", "a", "--batch-sequences", "few"], "--batch-sequences takes a whole number or auto, not 'few'; see"),
        (["info"], "error: actcache info needs STORE; see"),
        (["demo", "--length", "0"], "length must be a positive integer"),
        (["extract", "--length", "1.5"], "error: --length takes a whole number, not '1.5'; see"),
        (["extend", "a", "--batch-sequences=2.5"], "error: --batch-sequences takes a whole number, not '2.5'; see"),
        (["train", "a", "--n-steps", "-.5"], "error: --n-steps takes a whole number, not '-.5'; see"),
        (["demo", "--length", "many"], "error: --length takes a whole number, not 'many'; see"),
        (["report", "nowhere"], "no run at nowhere"),
        (["evaluate", "nowhere"], "no run at nowhere"),
        (["extract", "--sites", "blocks.0.hook_in", "--out", "x.zarr", "--text", "missing.txt"], "missing.txt"),
        (["sites", "./no/model"], "./no/model"),
        (["sites", "blocks.*"], "the model comes first"),
        (["--install-completion", "--shell", "tcsh"], "not 'tcsh'; see 'actcache --install-completion --help'"),
    ],
)
def test_wrong_input_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hook_name_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--sites", "blocks.0.hook_mlp_uot", "--out", str(tmp_path / "x.zarr"), "--length", "64", "--count", "4"]
    assert main(["extract", *wanted]) == 1
    said = capsys.readouterr().err
    assert "blocks.0.hook_mlp_out" in said
    assert "Tokenize" not in said
    assert not (tmp_path / "x.zarr").exists()


def test_a_missing_run_is_said_before_the_text_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / "nowhere"), "--length", "64", "--count", "4"]) == 1
    assert capsys.readouterr().err.splitlines()[0].startswith("error: no run at")


def test_where_nobody_looks_on_a_stage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--sites", SITE_IN, "--out", str(tmp_path / "x.zarr"), "--length", "64", "--count", "8"]
    assert main(["extract", *wanted]) == 0
    tokenized, extracted = capsys.readouterr().err.splitlines()
    assert tokenized.rpartition(",")[0] == "Tokenize text: 8 of 8 sequences"
    assert extracted.startswith("Extract activations: 8 of 8 sequences, ")
    assert "tokens/s" in extracted


def test_extract_found_again_prints_json(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--sites", SITE_IN, SITE_OUT, "--out", str(store), "--length", "64", "--count", "32", "--codec", "raw"]
    assert main(["extract", *wanted, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "sealed"
    assert found["n_rows"] == 32 * 63
    assert list(found["sites"]) == [SITE_IN, SITE_OUT]


def test_info_shows_sites_and_statistics(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("sealed", "2,016 of 2,016 rows", SITE_IN, SITE_OUT, "NaN", "stories-4l"))
    assert main(["info", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sites"][SITE_IN]["mean_norm"] > 0


def test_verify_says_sound_or_names_the_fault_with_code_2(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "acts.zarr"
    shutil.copytree(small_store.path, path)
    assert main(["verify", str(path), "--json"]) == 0
    said = {"path": str(path), "sound": True, "sample": 1.0, "faults": [], "not_bound": {}}
    assert json.loads(capsys.readouterr().out) == said
    shard = path / "sites" / "blocks.0.hook_mlp_out" / "acts" / "c.2.0"
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    assert main(["verify", str(path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [(fault["column"], fault["shard"]) for fault in found["faults"]] == [("blocks.0.hook_mlp_out", 2)]
    assert main(["repair", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == [2]


def test_a_damaged_ledger_is_mended_and_said_so(
    small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "acts.zarr"
    shutil.copytree(small_store.path, path)
    ledger = path / "ledger" / "c.0.0.0"
    ledger.write_bytes(ledger.read_bytes()[:-1])
    assert main(["verify", str(path)]) == 2
    assert capsys.readouterr().out.startswith("ledger: ")
    assert main(["repair", str(path)]) == 0
    assert "ledger was damaged, and was written again" in capsys.readouterr().out
    assert main(["repair", str(path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("is sound")


def test_sites_lists_names_and_says_what_patterns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "--json"]) == 0
    names = [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]]
    assert {SITE_IN, SITE_OUT, "blocks.0.hook_resid_pre"} <= set(names)
    assert main(["sites", "stories-4l", "blocks.*.hook_mlp_out"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"blocks.{i}.hook_mlp_out  128  256 B/token" for i in range(4)]


def test_train_evaluate_report_fill_one_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [row["site_out"] for row in metrics["layers"]] == [SITE_OUT]
    text = ["--length", "64", "--count", "4", "--skip-documents", "200"]
    capsys.readouterr()
    assert main(["evaluate", str(trained), *text, "--json"]) == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out)["layers"][0]
    assert row["history"]["step"][-1] == 10
    assert row["zero_ablated"] > 0
    assert "not held out" not in shown.err
    assert main(["report", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(trained / "report.html")}
    assert "blocks.3" in (trained / "report.html").read_text()


def test_evaluating_on_the_training_text_is_pointed_out(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--length", "64", "--count", "4"]) == 0
    assert "not held out" in capsys.readouterr().err


def test_mean_ablation_takes_the_mean_of_the_training_store_while_it_is_there(
    trained: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given the same mean by hand, spliced_loss measures the same."""
    lm = actcache.load_lm("stories-4l")
    text = ["--length", "64", "--count", "4", "--skip-documents", "200"]
    texts = islice(actcache.read_texts("stories-corpus"), 200, None)
    blocks = actcache.token_blocks(texts, lm.tokenizer, length=64, count=4)
    mlp = actcache.SparseMLP.load(next((trained / "sparse").iterdir()))
    own = actcache.open_store(store)

    def mean_ablated_by(source: Store) -> float | None:
        mean = source.stats(SITE_OUT).mean
        return actcache.spliced_loss(
            lm, mlp, blocks, site_in=SITE_IN, site_out=SITE_OUT, mean=mean, skip_first=1
        ).mean_ablated

    def evaluated() -> float:
        assert main(["evaluate", str(trained), *text]) == 0
        return float(json.loads((trained / "metrics.json").read_text())["layers"][0]["mean_ablated"])

    assert evaluated() == pytest.approx(mean_ablated_by(own), rel=1e-9)
    held_out = actcache.open_store(next(trained.glob("held_out-*.zarr")))
    metrics = json.loads((trained / "metrics.json").read_text())
    metrics["store"]["path"] = str(tmp_path / "gone.zarr")
    (trained / "metrics.json").write_text(json.dumps(metrics))
    assert evaluated() == pytest.approx(mean_ablated_by(held_out), rel=1e-9)
    assert mean_ablated_by(held_out) != pytest.approx(mean_ablated_by(own), rel=1e-6)


def test_a_run_keeps_its_store(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.zarr"
    wanted = ["--sites", SITE_IN, SITE_OUT, "--out", str(other), "--length", "32", "--count", "8"]
    assert main(["extract", *wanted]) == 0
    sites = ["--site-in", SITE_IN, "--site-out", SITE_OUT]
    assert main(["train", str(other), *sites, "--out", str(trained), "--batch-rows", "64"]) == 1
    assert "the run of another store" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path) -> None:
    wanted = ["--sites", "blocks.*.mlp.hook_*", "--out", "acts.zarr", "--length", "256", "--count", "128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "actcache", "extract", *wanted]
    # Python keeps ignoring the signal where it was begun in the background of a shell, which ignores it for its jobs.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as child:
        deadline = time.monotonic() + 600
        while not (tmp_path / "acts.zarr" / "zarr.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=600)[1]
    assert child.returncode == 130, said
    assert said.splitlines()[-1].startswith("error: interrupted; ")
    assert said.splitlines()[-1].endswith("; the same command goes on where this one stopped")
    assert "Traceback" not in said
