"""What `--help` promises: options that mean the same in every verb, examples that work, completion."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from actcache.cli import build_app, main

VERBS = tuple(name for name in build_app() if not name.startswith("-"))
MEANS_ITS_OWN = {
    "--out": "a store of most verbs, a run of train and demo, only looked at by plan",
    "--seed": "of rows in shards, of rows in batches, of sequences, of weights",
    "--device": "of the model, and of train",
    "--model": "needed by audit only for models that are not embedded",
    "--text": "plan does not read streams to the end",
    "--count": "of audit and demo with a default of their own",
    "--length": "of sites with a default of its own",
    "--epochs": "planned, and served",
    "--sites": "delete-sites takes names only",
    "--batch-sequences": "plan continues no store",
    "--format": "of what is imported, of what is exported",
    "--tokens": "a file of token ids to import, a number to plan for",
}
"""Options whose sentence differs between verbs, with the reason."""
OF_THE_LIBRARY = ("demo", "train")
"""Verbs whose options are mostly fields of a config of the library, in its order and with its sentences."""


@cache
def options_of(verb: str) -> dict[str, str]:
    """Documented options (no arguments), in the order of the help, and their sentences without the defaults."""
    found = {}
    for argument in build_app()[verb].assemble_argument_collection(parse_docstring=True):
        name = next((name for name in argument.names if name.startswith("--")), None)
        if argument.show and name and argument.index is None:
            found[name] = re.split(r"[;,] by default", argument.parameter.help or "")[0]
    return found


def test_an_option_says_the_same_in_every_verb() -> None:
    sentences: dict[str, set[str]] = {}
    for verb in VERBS:
        for name, sentence in options_of(verb).items():
            if verb not in OF_THE_LIBRARY or name == "--json":
                sentences.setdefault(name, set()).add(sentence.rstrip("."))
    differing = {name for name, said in sentences.items() if len(said) > 1}
    assert differing <= MEANS_ITS_OWN.keys()
    assert len(sentences["--json"]) == 1


def test_options_stand_in_one_order_in_all_verbs() -> None:
    for one, other in itertools.combinations([verb for verb in VERBS if verb not in OF_THE_LIBRARY], 2):
        ours, theirs = options_of(one), options_of(other)
        assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours], (one, other)
    assert {list(options_of(verb))[-1] for verb in VERBS} == {"--json"}


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("import a.npy --format npy --out b --dtype float32", "options.dtype", "float32"),
        ("import a.npy --format npy --out b --store-dtype float32", "options.dtype", "float32"),
        ("audit a --sequences 3", "count", 3),
        ("audit a --count 3", "count", 3),
        ("demo --n-sequences 7", "config.n_sequences", 7),
        ("demo --count 7", "config.n_sequences", 7),
    ],
)
def test_both_names_of_an_option_work(typed: str, name: str, value: object) -> None:
    _, bound, _ = build_app().parse_args(shlex.split(typed))
    argument, _, field = name.partition(".")
    found = bound.arguments[argument]
    assert (getattr(found, field) if field else found) == value


def test_plan_takes_what_extract_takes() -> None:
    typed = "--model stories-4l --text stories-corpus --sites a b --length 64 --count 8 --skip-first 2 --out acts.zarr"
    for verb in ("extract", "plan"):
        _, bound, _ = build_app().parse_args([verb, *shlex.split(typed)])
        assert bound.arguments["sites"] == ("a", "b")
        assert bound.arguments["options"].skip_first == 2
    _, bound, _ = build_app().parse_args(shlex.split("plan stories-4l stories-corpus a b --count 8"))
    assert bound.arguments["sites"] == ("a", "b")


def test_the_groups_of_the_help_hold_every_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    panels = re.split(r"╭─ ", capsys.readouterr().out)[1:]
    found = {panel.split(" ─")[0]: re.findall(r"^│ (\S+) ", panel, re.MULTILINE) for panel in panels}
    assert found.pop("Other") == ["--help", "--install-completion", "--version"]
    assert [name.split()[0] for name in found] == ["Make", "Look", "Take", "Learn"]
    assert sorted(itertools.chain(*found.values())) == sorted(VERBS)


def examples(verb: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The command lines at the end of a verb's help."""
    assert main([verb, "--help"]) == 0
    _, heading, shown = capsys.readouterr().out.rpartition("Example:")
    assert heading, verb
    lines = re.sub(r"\\\s*\n", " ", shown).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


def test_the_verb_that_is_loaded_late_is_described_as_it_describes_itself() -> None:
    from actcache.cli.train import train

    assert build_app()["train"].help == (train.__doc__ or "").splitlines()[0]


@pytest.mark.parametrize("verb", [*VERBS, "--install-completion"])
def test_the_help_of_every_verb_ends_with_an_example_of_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = examples(verb, capsys)
    assert [arguments[0] for arguments in found] == [verb] * len(found)
    assert found
    for arguments in found:
        _, bound, _ = build_app().parse_args(arguments)
        assert bound.arguments


ORDER = ["extract", "info", "sites", "verify", "repair", "export", "import"]
LONGER_ORDER = [*ORDER, "plan", "audit", "train", "evaluate", "report", "extend", "add-sites", "delete-sites"]


@pytest.mark.parametrize("order", [ORDER, pytest.param(LONGER_ORDER, marks=pytest.mark.exhaustive)])
def test_the_examples_work_one_after_the_other(
    order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but `demo`, whose own tests run it, and `serve`, which waits for trainers."""
    monkeypatch.chdir(tmp_path)
    np.save("acts.npy", np.random.default_rng(0).standard_normal((4, 16, 8), np.float32))
    assert sorted([*LONGER_ORDER, "demo", "serve"]) == sorted(VERBS)
    for verb in order:
        for arguments in examples(verb, capsys):
            assert main(arguments) == 0, (arguments, capsys.readouterr().err)
    assert all(Path(made).exists() for made in ("acts.zarr", "part.zarr", "imported.zarr"))
    assert Path("run/report.html").exists() == ("report" in order)


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Completion for bash, installed in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash"]) == 0
    script = tmp_path / ".local" / "share" / "bash-completion" / "completions" / "actcache"
    assert str(script) in capsys.readouterr().out
    assert str(script) in (tmp_path / ".bashrc").read_text()
    return script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ex"], {"extract", "extend", "export"}),
        (["extract", "--store-d"], {"--store-dtype"}),
        (["extract", "--store-dtype", "b"], {"bfloat16"}),
        (["train", "acts.zarr", "--n-"], {"--n-steps"}),
        (["plan", "--price-per-"], {"--price-per-tb", "--price-per-hour"}),
    ],
)
def test_bash_completes_verbs_options_and_choices(script: Path, typed: list[str], offered: set[str]) -> None:
    words = " ".join(map(shlex.quote, ["actcache", *typed]))
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _actcache; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(script))}; {ask}"], capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_names_every_verb(shell: str) -> None:
    script = build_app().generate_completion(shell=shell)
    assert [verb for verb in VERBS if not re.search(rf"(?<![\w-]){verb}(?![\w-])", script)] == []
