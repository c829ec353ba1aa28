"""Folders: which of their files are read, in which order, and which split each is of."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from actcache.errors import ConfigError, TextError
from actcache.source import read_documents, read_texts, read_tokens
from actcache.source.dataset_folders import split_of


def write(folder, *names):
    """Files whose only text is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pa.parquet.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) if path.suffix in (".jsonl", ".json") else name)


def texts(source, **options):
    """What is read, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return list(read_texts(source, **options))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("en/c4-validation.00003-of-00008.json.gz", "validation"),
        ("test.jsonl", "test"),
        ("data/train/part.0.jsonl", "train"),
        ("my_corpus_dev.csv", "validation"),
        ("eval-1.txt", "test"),
        ("Training 2.txt", "train"),
        ("valid/x/a.parquet", "validation"),
        ("part-00000.jsonl", None),
        ("training_and_test.txt", None),
        ("contest.txt", None),
        ("trainspotting.txt", None),
        ("latest/a.txt", None),
    ],
)
def test_a_split_is_told_by_the_name(path, split):
    assert split_of(Path(path)) == split


LAYOUTS = [
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"),
    ("train_1.txt", "train_2.txt", "testing.txt"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_the_split_of_a_local_copy_is_that_of_its_file_names(tmp_path, names):
    write(tmp_path, *names)
    assert texts(tmp_path, split="train") == list(names[:2])
    assert texts(tmp_path, split="test") == [names[2]]
    assert texts(tmp_path, split="all") == sorted(names)
    with pytest.warns(UserWarning, match="has the splits test, train; train is read. Choose with split"):
        assert list(read_texts(tmp_path)) == list(names[:2])
    with pytest.raises(ConfigError, match="has the splits test, train, not 'valid'; choose one with --split"):
        read_texts(tmp_path, split="valid")


def test_where_there_are_no_splits_to_choose_one_is_an_error(tmp_path):
    write(tmp_path, "a.txt", "b.txt")
    assert texts(tmp_path) == ["a.txt", "b.txt"]
    for source in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt", "stories-corpus"):
        with pytest.raises(ConfigError, match=r"leave split \(--split\) out"):
            read_texts(source, split="train")
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ConfigError, match="is a single file and has no split 'train'"):
        read_tokens(tmp_path / "a.npy", split="train")


def test_a_file_may_be_asked_for_as_the_split_that_it_is(tmp_path):
    write(tmp_path, "test.jsonl")
    assert texts(tmp_path / "test.jsonl", split="test") == ["test.jsonl"] == texts(tmp_path)
    with pytest.raises(ConfigError, match="has no split 'train'"):
        read_texts(tmp_path / "test.jsonl", split="train")


def test_names_that_only_some_files_have_divide_nothing_by_themselves(tmp_path):
    write(tmp_path, "chapter.txt", "test.txt")
    assert texts(tmp_path) == ["chapter.txt", "test.txt"]
    assert texts(tmp_path, split="test") == ["test.txt"]


def test_without_train_a_split_must_be_named(tmp_path):
    write(tmp_path, "test.jsonl", "dev.jsonl")
    with pytest.raises(ConfigError, match="has the splits validation, test: choose one with split"):
        read_texts(tmp_path)
    assert texts(tmp_path, split="dev") == ["dev.jsonl"] == texts(tmp_path, split="validation")


README = """---
language: en
configs:
- config_name: small
  data_files:
  - split: train
    path: "parts/s-*.jsonl"
  - split: holdout
    path: [parts/h.jsonl]
- config_name: large
  {default}data_files: large/*.jsonl
---
# A dataset
"""
PARTS = ("parts/s-1.jsonl", "parts/s-2.jsonl", "parts/h.jsonl", "large/a.jsonl", "notes.txt")


def test_a_readme_that_lists_files_is_followed(tmp_path):
    write(tmp_path, *PARTS)
    (tmp_path / "README.md").write_text(README.format(default=""))
    with pytest.raises(ConfigError, match=r"has the configurations small, large: choose one, as in .*:small"):
        read_texts(tmp_path)
    small = f"{tmp_path}:small"
    assert texts(small, split="train") == list(PARTS[:2])
    assert texts(small, split="holdout") == ["parts/h.jsonl"]
    assert texts(f"{tmp_path}:large") == ["large/a.jsonl"]
    with pytest.raises(ConfigError, match="has the splits train, holdout, not 'test'"):
        read_texts(small, split="test")
    with pytest.raises(ConfigError, match="has the configurations small, large, not 'medium'"):
        read_texts(f"{tmp_path}:medium")
    (tmp_path / "README.md").write_text(README.format(default="default: true\n  "))
    assert texts(tmp_path) == ["large/a.jsonl"] == texts(tmp_path, split="train")


@pytest.mark.parametrize("path", ["../outside.jsonl", "/etc/*.txt", "gone-*.jsonl", ".hidden/*.jsonl"])
def test_a_readme_leads_to_nothing_outside_and_nothing_hidden(tmp_path, path):
    write(tmp_path, "outside.jsonl", "set/a.jsonl", "set/.hidden/b.jsonl")
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- data_files: {path!r}\n---\n")
    with pytest.raises(TextError, match=r"README.md lists .* for the split 'train', but no file .* matches"):
        read_texts(tmp_path / "set")


def test_a_readme_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(TextError, match=r"the head of .*README.md is not valid YAML"):
        read_texts(tmp_path)
    (tmp_path / "README.md").write_text("# No head at all\n---\n")
    assert texts(tmp_path) == ["a.txt"]


def test_hidden_files_and_those_of_other_systems_are_passed_over(tmp_path):
    write(tmp_path, "b/a.txt", "a.txt", ".git/b.txt", "b/.c.txt", "b/._a.txt", "__MACOSX/a.txt", "dataset_infos.json")
    assert texts(tmp_path) == ["a.txt", "b/a.txt"]
    hidden = tmp_path / ".git"
    assert texts(hidden) == [".git/b.txt"]  # asked for by its name


def test_a_folder_may_hold_every_kind_of_file_side_by_side(tmp_path):
    names = ["A.TXT", "b.jsonl", "c.json", "d.parquet"]
    write(tmp_path, *names)
    (tmp_path / "e.csv").write_text("text\ne.csv\n")
    (tmp_path / "f.py").write_text("print()")
    assert texts(tmp_path) == [*names, "e.csv"] == list(read_documents(tmp_path))


def test_a_folder_of_nothing_says_what_is_there(tmp_path):
    folder = tmp_path / "squad"
    write(folder, "squad.py", "README.rst")
    with pytest.raises(TextError, match=r"holds no text: .* found 1 .rst, 1 .py; squad.py is a script .* is never run"):
        read_texts(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="found no file"):
        read_texts(tmp_path / "empty")


def test_a_link_to_nothing_is_missing_data(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(TextError, match=r"b.txt is a link to nothing"):
        read_texts(tmp_path)


def test_patterns_choose_files(tmp_path):
    write(tmp_path, "a.jsonl", "b.txt", "c/d.jsonl")
    assert texts(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "c/d.jsonl"]
    with pytest.raises(TextError, match="no file matches"):
        read_texts(tmp_path / "*.csv")


def test_saved_datasets_have_their_own_splits(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict(test=dataset).save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["one"]
    dataset.save_to_disk(str(tmp_path / "single"))
    assert texts(tmp_path / "single") == ["one"]
    with pytest.raises(ConfigError, match="is a single dataset and has no split 'test'"):
        read_texts(tmp_path / "single", split="test")


def test_no_code_of_a_dataset_runs(tmp_path):
    """In a process of its own, whose current folder has the script: `datasets` itself is asked for it by name."""
    script = tmp_path / "owner" / "scripted" / "scripted.py"
    script.parent.mkdir(parents=True)
    script.write_text("open('it_ran', 'w').close()\n")
    ask = "import actcache, sys\ntry: next(actcache.read_texts(sys.argv[1]))\nexcept ValueError as e: print(e)"
    for name in ("owner/scripted", "owner/missing"):
        done = subprocess.run(
            [sys.executable, "-c", ask, name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
            check=True,
        )
        assert "no text" in done.stdout
        assert not (tmp_path / "it_ran").exists()


def test_whatever_datasets_raises_is_an_error_of_ours(monkeypatch):
    class OddError(Exception):
        pass

    def raising(*_, **options):
        assert "trust_remote_code" not in options
        raise OddError("the hub is on fire")

    monkeypatch.setattr(datasets, "load_dataset", raising)
    with pytest.raises(TextError, match=r"no text at 'owner/name': .* the hub is on fire") as caught:
        read_texts("owner/name")
    assert isinstance(caught.value.__cause__, OddError)
