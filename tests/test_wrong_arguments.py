"""Plausible wrong arguments of every public function of these rooms: each works, or is one sentence of our errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

import actcache as ac
from actcache.cli import main
from actcache.errors import ActcacheError, ConfigError
from actcache.sparse.evaluation import spliced_loss
from actcache.spec import TokenBlocks
from actcache.store import Store, open_store

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
NO_NUMBER = [None, "5", b"5", 1.5, True, [], {}, object(), -1, 10**30, float("nan"), np.float64(2), torch.ones(2)]
NO_TEXT = [5, 1.5, True, b"x", {}, object(), float("nan"), torch.ones(2)]
NO_PATH = [None, 5, 1.5, True, b"x", [], {}, object(), "", "a\0b", "~nobody-here/x"]
NO_FUNCTION = [5, "print", [], {}, object()]
NO_OBJECT = [None, 5, "path.zarr", Path("path.zarr"), [], {}, object()]


@pytest.fixture(scope="module")
def unsealed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    blocks, path = random_blocks(29, 13), tmp_path_factory.mktemp("unsealed") / "u.zarr"
    write_shards(path, spec_of(blocks), blocks, random_bits(spec_of(blocks)), [0])
    return open_store(path)


def loader(store: Store, /, **changes: Any) -> ac.Loader:
    settings = {"sites": ["*"], "batch_rows": 20, "memory": 4000, "threads": 1, "read_ahead": 0}
    return ac.Loader(**{"store": store, **settings, **changes})


def mlp() -> ac.SparseMLP:
    return ac.SparseMLP(d_in=12, d_out=10, n_latents=4)


def config(**changes: Any) -> ac.TrainConfig:
    return ac.TrainConfig(**{"n_steps": 2, "warmup_steps": 0, **changes})


def trainer(store: Store, /, **changes: Any) -> Any:
    arguments = {"mlp": mlp(), "loader": loader(store, epochs=None), "config": config(), **changes}
    return ac.Trainer(**arguments)


def reconstruction(store: Store, /, **changes: Any) -> Any:
    return ac.reconstruction(**{"mlp": mlp(), "loader": loader(store), **changes})


def mixture(store: Store, parts: Any = (), **changes: Any) -> Any:
    return ac.MixedLoader([(loader(store, epochs=None), 1.0)] if parts == () else parts, **changes)


def shared(store: Store, /, **changes: Any) -> Any:
    return ac.share_batches(**{"loader": loader(store), "n_consumers": 1, **changes})


def serving(store: Store, /, **changes: Any) -> Any:
    return ac.serve_batches(**{"loader": loader(store), "path": "/dev/null/s", "n_consumers": 1, **changes})


def served(_: Store, **changes: Any) -> Any:
    return ac.ServedBatches(**{"path": "/nowhere/s", "wait_s": 0, **changes})


def split(store: Store, /, **changes: Any) -> Any:
    return ac.split_sequences(**{"store": store, **changes})


def imported(store: Store, /, **changes: Any) -> Any:
    folder = Path(store.path).parent
    np.save(folder / "a.npy", np.ones((4, 3, 5), np.float32))
    return ac.import_npy(**{"arrays": {"h": folder / "a.npy"}, "path": folder / "made.zarr", **changes})


def exported(store: Store, /, **changes: Any) -> Any:
    return ac.export_saelens(**{"store": store, "folder": Path(store.path).parent / "exported", **changes})


def mlp_of(_: Store, **changes: Any) -> Any:
    return ac.SparseMLP(**{"d_in": 3, "d_out": 3, "n_latents": 3, **changes})


def config_of(_: Store, **changes: Any) -> Any:
    return config(**changes)


Case = tuple[Callable[..., Any], str, list[Any], str]
CASES: list[Case] = [
    (loader, "store", NO_OBJECT, "store must be an open store"),
    (loader, "sites", [None, 5, 1.5, True], "sites must be names"),
    (loader, "sites", [[5], [None], b"x"], "sites must be names"),
    (loader, "sites", [[], (), {}], "name at least one site"),
    (loader, "sites", ["nothing", ["*", "nothing"], iter(["nothing"])], "no site matches 'nothing'"),
    (loader, "batch_rows", [*NO_NUMBER, 0], "batches of|batch_rows must be a positive integer"),
    (loader, "seed", [None, "5", 1.5, True, [], float("nan"), torch.ones(2)], "seed must be an integer"),
    (loader, "epochs", ["5", 1.5, True, -1, 0, [], float("nan")], "epochs must be a positive integer"),
    (loader, "dtype", [*NO_TEXT, "int8", "floaty", torch.int64, np.float32], "dtype must be one of"),
    (loader, "device", [1.5, [], "abacus", object()], "cannot be used here"),
    (loader, "memory", [None, 1.5, True, -1, 0, "", "many", "-1GB", "9" * 400, []], "memory must be a number of bytes"),
    (loader, "read_ahead", [*NO_NUMBER], "read_ahead must be an integer"),
    (loader, "threads", [n for n in NO_NUMBER if n is not None] + [0], "threads must be"),
    (loader, "drop_last", [None, "no", 2, 1.0, [], torch.ones(2)], "drop_last must be True or False"),
    (loader, "normalize", [5, True, "yes", [], {}], "normalize must be one of"),
    (loader, "order", [None, 5, "random", [], {}], "order must be one of"),
    (loader, "lanes", [n for n in NO_NUMBER if n is not None] + [0], "lanes must be"),
    (loader, "rank", [*NO_NUMBER, 1], "rank must be between 0 and world_size - 1 = 0"),
    (loader, "world_size", [*NO_NUMBER, 0], "world_size must be"),
    (loader, "rows", [slice(0, 0), np.zeros(348, bool)], "rows selects none"),
    (mlp_of, "d_in", [*NO_NUMBER[:-4], 0, 10**12], "d_in"),
    (mlp_of, "n_latents", [None, "5", 1.5, -1, 10**12, 10**30], "n_latents"),
    (mlp_of, "activation", [None, 5, "gelu", []], "activation must be 'relu'"),
    (config_of, "l1", [None, "5", True, [], -1, float("nan"), float("inf"), torch.ones(2)], "l1 must be between"),
    (config_of, "lr", [None, "fast", True, -1], "lr must be between"),
    (config_of, "n_steps", [*NO_NUMBER[:-5], 0], "n_steps must be a positive integer"),
    (config_of, "warmup_steps", [None, "5", -1, 3, []], "warmup_steps must be between 0 and 2"),
    (config_of, "decay_fraction", [None, "5", -1, 1.5, []], "decay_fraction must be between 0 and 1"),
    (config_of, "betas", [None, 0.9, "ab", [0.9], (0.9, 1.0), (True, 0.9), ("a", "b")], "betas must be two numbers"),
    (config_of, "clip", ["5", -1, float("inf"), []], "clip must be between"),
    (config_of, "seed", [None, "5", 1.5, float("nan"), []], "seed must be an integer"),
    (config_of, "start", [None, 5, "random", []], "start must be one of"),
    (trainer, "mlp", NO_OBJECT, "mlp must be a SparseMLP"),
    (trainer, "loader", NO_OBJECT, "loader must be a Loader"),
    (trainer, "config", [5, "x", [], {}], "config must be a TrainConfig"),
    (trainer, "site_in", [5, "nothing", [], ""], "site_in .* is not among"),
    (trainer, "checkpoint", [value for value in NO_PATH if value is not None], "checkpoint"),
    (trainer, "progress", NO_FUNCTION, "progress must be a function"),
    (reconstruction, "mlp", NO_OBJECT, "mlp must be a SparseMLP"),
    (reconstruction, "loader", NO_OBJECT, "loader must be a Loader"),
    (reconstruction, "n_batches", ["5", 1.5, True, -1, 0, []], "n_batches must be a positive integer"),
    (mixture, "parts", [None, 5, "ab", [], {}, [None], [5], [("a", 1)], [(mlp, 1)]], "at least one pair"),
    (mixture, "n_batches", ["5", 1.5, True, -1, 0, []], "n_batches must be a positive integer"),
    (mixture, "seed", [None, "5", 1.5, []], "seed must be an integer"),
    (shared, "loader", NO_OBJECT, "loader must be a Loader"),
    (shared, "n_consumers", [None, "5", 1.5, True, -1, 0], "n_consumers must be a positive integer"),
    (shared, "sites", [5, "*", iter([])], "sites must be a list"),
    (shared, "states", [5, "x", {}], "states must be a list"),
    (shared, "dtype", ["int8", 5, torch.int8], "dtype must be one of"),
    (shared, "copy", [None, 5, "no"], "copy must be True or False"),
    (serving, "loader", NO_OBJECT, "loader must be a Loader"),
    (serving, "path", NO_PATH, "path must be|names the home folder"),
    (serving, "path", ["x" * 300, "/dev/null/s", "/nowhere/s"], "no socket can be made"),
    (serving, "n_consumers", [None, "5", 1.5, True, -1, 0, 10**30], "n_consumers must be"),
    (serving, "progress", NO_FUNCTION, "progress must be a function"),
    (served, "path", NO_PATH, "path must be|names the home folder"),
    (served, "path", ["x" * 300, "/dev/null", "/nowhere/s", Path("/tmp")], "no server at"),
    (served, "wait_s", [None, "5", -1, True, float("nan")], "wait_s must be a number of seconds"),
    (split, "store", NO_OBJECT, "store must be an open store"),
    (split, "validation", [None, "5", True, -1, 0, 1, 1.5, float("nan"), []], "validation must be"),
    (split, "seed", [None, "5", 1.5, []], "seed must be an integer"),
    (imported, "arrays", [None, 5, "a.npy", [], {}, {5: "a.npy"}], "name at least one hook"),
    (imported, "arrays", [{"h": None}, {"h": 5}, {"h": ""}], "file must be"),
    (imported, "arrays", [{"h": "nowhere.npy"}, {"h": Path("/dev/null")}], "there is no file|is not a .npy file"),
    (imported, "path", [None, "", "a\0b", "~nobody-here/x"], "path"),
    (imported, "tokens", [5, "nowhere.npy", [1, 2], {}, np.ones((4, 3)), object(), "", np.full((4, 3), -1)], "t"),
    (imported, "codec", [None, 5, True, [], {5: "raw"}, {"h": 5}], "codec must be"),
    (imported, "codec", ["zip", "[1", "{}"], "codec|zip"),
    (imported, "dtype", [5, "int8", "float64", torch.float32, []], "dtype must be one of"),
    (imported, "skip_first", [None, "5", 1.5, True, -1], "skip_first must be an integer from 0 up"),
    (imported, "skip_first", [3, 10**30], "skip_first must be between 0 and sequence_length - 1 = 2"),
    (imported, "seed", [None, "5", 1.5, []], "seed must be an integer"),
    (imported, "threads", [None, "5", 1.5, True, -1, 0, []], "threads must be a positive integer"),
    (imported, "sequences_per_shard", ["5", 1.5, True, -1, 0, []], "sequences_per_shard must be a positive integer"),
    (imported, "rows_per_chunk", ["5", 1.5, True, -1, 0, []], "rows_per_chunk must be a positive integer"),
    (imported, "progress", NO_FUNCTION, "progress must be a function"),
    (exported, "store", NO_OBJECT, "store must be an open store"),
    (exported, "folder", NO_PATH, "folder"),
    (exported, "sites", [None, 5, [5]], "sites must be names"),
    (exported, "sites", [[], ()], "name at least one site"),
    (exported, "dtype", [5, "bfloat16", torch.float32, np.float64(2)], "has float16 and float32, not"),
    (exported, "progress", NO_FUNCTION, "progress must be a function"),
]


@pytest.mark.parametrize(
    ("call", "name", "values", "message"), CASES, ids=[f"{call.__name__} {name}" for call, name, *_ in CASES]
)
def test_a_wrong_argument_is_one_sentence(small_store, call, name, values, message):
    for value in values:
        with pytest.raises(ActcacheError, match=message) as caught:
            call(small_store, **{name: value})
        assert "\n" not in str(caught.value), value
        assert len(str(caught.value)) < 700, value


def test_what_is_plausible_works(small_store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for changes in (
        {"sites": "*"},
        {"sites": (name for name in small_store.sites)},
        {"seed": np.int64(3)},
        {"dtype": "bfloat16"},
        {"drop_last": 0},
        {"rows": range(30)},
        {"rows": torch.arange(30)},
        {"rows": np.arange(348) < 40},
        {"device": torch.device("cpu")},
    ):
        with loader(small_store, **changes) as working:
            assert len(next(iter(working)).rows) == 20
    made = mlp()
    made.save("~/mlp")
    assert torch.equal(ac.SparseMLP.load("~/mlp").encoder.weight, made.encoder.weight)
    trainer(small_store, checkpoint="~/run").fit()
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    np.save(tmp_path / "a.npy", np.ones((4, 3, 5), np.float32))
    store = ac.import_npy({"h": "~/a.npy"}, "~/made.zarr", tokens=[[1, 2, 3]] * 4)
    assert store.sealed
    assert store.tokens().tolist() == [[1, 2, 3]] * 4
    assert ac.export_saelens(store, "~/out") == tmp_path / "out"
    assert ac.import_saelens("~/out", "~/back.zarr").sealed


def test_an_unfinished_store_is_said_to_be_that(unsealed):
    for call in (loader, exported):
        with pytest.raises(ac.ActcacheError, match=r"finish|shards"):
            call(unsealed)


def test_spliced_loss_takes_what_it_says():
    blocks = random_blocks(4, 6)
    sites = {"site_in": "a", "site_out": "b"}
    for wrong, message in [
        ({"mlp": None}, "mlp must be a SparseMLP"),
        ({"blocks": "text"}, "expected token blocks"),
        ({"batch_sequences": 0}, "batch_sequences must be a positive integer"),
        ({"skip_first": "1"}, "skip_first must be an integer"),
        ({"skip_first": 6}, "skip_first must be between 0 and 5"),
        ({"progress": 5}, "progress must be a function"),
    ]:
        with pytest.raises(ConfigError, match=message):
            spliced_loss(**{"lm": None, "mlp": mlp(), "blocks": blocks, **sites, **wrong})
    assert isinstance(blocks, TokenBlocks)


VERBS = {
    "info": ["STORE"],
    "verify": ["STORE"],
    "repair": ["STORE"],
    "report": ["STORE"],
    "evaluate": ["STORE"],
    "export": ["STORE", "--out", "made.zarr"],
    "serve": ["STORE", "--sites", "*", "--batch-rows", "4", "--consumers", "1", "--socket", "s"],
    "train": ["STORE", "--site-in", "x", "--site-out", "x", "--out", "run"],
    "import": ["STORE", "--format", "saelens", "--out", "made.zarr"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_given_something_else_is_one_sentence(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    for given in ("missing", "file", "empty", "other", "file/below", "~nobody-here/x", "x" * 300):
        assert main([verb, *(given if word == "STORE" else word for word in VERBS[verb])]) == 1, given
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: "), (given, shown.err)
        assert "Traceback" not in shown.err
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before
