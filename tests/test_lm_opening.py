"""Opening a model runs none of its code, and says of its files what is wrong with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import LLAMA_LIKE, SMALL, random_model, small_module
from safetensors.torch import load_file, save_file

import actcache as ac
from actcache.cli import main
from actcache.errors import ConfigError, ModelNotFoundError
from actcache.lm import load_lm

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1040128\n"
PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of 40 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    random_model("llama", **LLAMA_LIKE).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(40)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Files that are not what they should be


def as_shards(folder: Path) -> dict[str, Any]:
    """The weights in two files with an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    shards = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return index


def without_a_shard(folder: Path) -> None:
    as_shards(folder)
    (folder / "two.safetensors").unlink()


def shard_of_lfs(folder: Path) -> None:
    as_shards(folder)
    (folder / "one.safetensors").write_bytes(POINTER)


def index_without_map(folder: Path) -> None:
    as_shards(folder)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")


def folder_in_its_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def broken_link(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "blob")


def half_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    (folder / WEIGHTS).unlink()


def bytes_in(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, share: float) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return do


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **changes)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (bytes_in(WEIGHTS, POINTER), r"is a git-lfs pointer, not the weights: run 'git lfs pull'"),
    "half": (cut(WEIGHTS, 0.5), r"model.safetensors is cut short: [\d,]+ of [\d,]+ bytes are there"),
    "header": (cut(WEIGHTS, 0.01), r"model.safetensors is cut short: its header alone"),
    "longer": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x") and None, r"has 1 bytes behind"),
    "empty": (bytes_in(WEIGHTS, b""), r"model.safetensors is empty"),
    "page": (bytes_in(WEIGHTS, PAGE), r"model.safetensors is a web page, not the weights"),
    "noise": (bytes_in(WEIGHTS, bytes(range(255)) * 9), r"model.safetensors is not a safetensors file"),
    "shard": (without_a_shard, r"two.safetensors is missing"),
    "shard pointer": (shard_of_lfs, r"one.safetensors is a git-lfs pointer"),
    "index": (index_without_map, r"index.json is an index of weights without a weight_map"),
    "directory": (folder_in_its_place, r"model.safetensors is a folder"),
    "link": (broken_link, r"model.safetensors is a link to a file that is missing"),
    "pickle": (half_a_pickle, r"pytorch_model.bin is cut short or damaged"),
    "config pointer": (bytes_in("config.json", POINTER), r"config.json is a git-lfs pointer, not the file itself"),
    "config cut": (cut("config.json", 0.5), r"config.json is not JSON, or is cut short"),
    "config list": (bytes_in("config.json", b"[]"), r"config.json is JSON, but a list"),
    "config empty": (bytes_in("config.json", b""), r"config.json is empty"),
    "config utf-8": (bytes_in("config.json", b'{"a": "\xff"}'), r"config.json is not JSON"),
    "vocabulary": (config(vocab_size=37), r"config.json says \(37, 24\) for .*weight, the weights have \(40, 24\)"),
    "negative": (config(hidden_size=-24), r"config.json says hidden_size: -24"),
    "text": (config(num_hidden_layers="2"), r"config.json says num_hidden_layers: '2'"),
    "zero": (config(num_attention_heads=0), r"config.json says num_attention_heads: 0"),
    "type": (config(model_type="nobody-knows"), r"config.json says a model_type that transformers .* does not know"),
    "activation": (config(hidden_act="nobody-knows"), r"model cannot be opened from .*nobody-knows"),
    "packed": (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"model cannot be opened from .*GPTQ"),
    "code": (config(auto_map=3), r"config.json says auto_map: 3"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_told_by_the_file(folder: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(ConfigError, match=message) as raised:
        load_lm(folder)
    found_here = fault == "vocabulary" or fault.startswith("config")
    assert found_here or raised.value.__cause__ is not None  # what the library raised is there to be read


def test_shards_that_are_all_there_are_the_model(folder: Path) -> None:
    whole = load_lm(folder).identity
    as_shards(folder)
    assert load_lm(folder).identity == whole


def test_layers_that_the_config_leaves_out_are_said(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"leaves out \d+ of the weights that are there \(model.layers.1"):
        assert load_lm(folder).kind == "huggingface"


def test_an_adapter_beside_a_model_is_not_left_out(folder: Path) -> None:
    pytest.importorskip("transformers")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ConfigError, match=r"has an adapter .* merge it"):
        load_lm(folder)


def test_a_pickle_runs_nothing(folder: Path, tmp_path: Path) -> None:
    """Weights as pickles are read without running what a pickle may call."""

    class Call:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "RAN",))

    torch.save({**load_file(folder / WEIGHTS), "x": Call()}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_lm(folder)
    assert not (tmp_path / "RAN").exists()


def test_damaged_gguf_files_are_told_by_the_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for data, message in ((POINTER, "a.gguf is a git-lfs pointer"), (b"", "is empty"), (b"x" * 99, "is no GGUF file")):
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(ModelNotFoundError, match=message):
            load_lm(tmp_path / "a.gguf")


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(SMALL)))
    save_file(small_module().state_dict(), folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bytes_in(WEIGHTS, POINTER), r"model.safetensors is a git-lfs pointer, not the weights"),
        (cut(WEIGHTS, 0.5), r"model.safetensors is cut short"),
        (config(d_model="16"), r"StoriesConfig.d_model must be a positive integer, got '16'"),
        (config(n_layers=4), r"weights lack 12 that the config describes \(blocks.3"),
        (config(n_layers=2), r"the weights have blocks.2.* besides"),
        (config(d_vocab=41), r"config.json says \(41, 16\) for embed.weight, the weights have \(40, 16\)"),
        (cut("config.json", 0.5), r"config.json is not JSON, or is cut short"),
        (bytes_in("config.json", b"[3]"), r"config.json is JSON, but a list"),
    ],
)
def test_a_damaged_folder_of_the_embedded_architecture(
    stories: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(stories)
    with pytest.raises(ConfigError, match=message):
        load_lm(stories)


def test_a_folder_of_the_embedded_architecture_without_weights(stories: Path) -> None:
    (stories / WEIGHTS).unlink()
    with pytest.raises(ModelNotFoundError, match=r"model.safetensors is missing"):
        load_lm(stories)


def test_what_is_no_model_at_all(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.safetensors' is a file: name the folder"):
        load_lm(folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"model must be a name, a folder or a module, got dict"):
        load_lm({"model": "gpt2"})  # type: ignore[arg-type]


def test_home_and_paths_are_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    wanted = load_lm(str(folder))
    for named in ("~/model", Path("~/model"), folder):
        lm = load_lm(named, tokenizer=named)
        assert lm.identity == wanted.identity
        assert lm.recipe == {"model": str(folder), "tokenizer": str(folder)}


# Code


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).parent.joinpath("RAN")
open({ran!r}, "w").close()
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 1
        return output
"""
OWN = {"AutoConfig": "code.OddConfig", "AutoModelForCausalLM": "code.OddForCausalLM"}


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code of its own, which leaves a file `RAN` when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "RAN")))
    change(folder / "config.json", model_type="odd", architectures=["OddForCausalLM"], auto_map=OWN)
    return folder


def test_code_of_a_folder_runs_only_where_it_is_trusted(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"code of its own \(code.py\).*not run.*--trust-remote-code"):
        load_lm(with_code)
    assert not (tmp_path / "RAN").exists()
    lm = load_lm(with_code, trust_remote_code=True)
    assert (tmp_path / "RAN").exists()
    assert type(lm.module).__name__ == "OddForCausalLM"
    assert lm.recipe == {"model": str(with_code), "trust_remote_code": True}
    assert lm.identity["trust_remote_code"] is True
    before = lm.identity["code"]
    (with_code / "code.py").write_text((with_code / "code.py").read_text().replace("+ 1", "+ 2"))
    assert load_lm(with_code, trust_remote_code=True).identity["code"] != before


def test_code_that_patches_a_known_type_is_not_left_out_without_a_word(with_code: Path, tmp_path: Path) -> None:
    change(with_code / "config.json", model_type="llama")
    with pytest.raises(ConfigError, match=r"code of its own \(code.py\)"):
        load_lm(with_code)  # transformers opens a plain Llama
    change(with_code / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.warns(UserWarning, match=r"code.py.*not run: opened with transformers' own LlamaForCausalLM"):
        assert "trust_remote_code" not in load_lm(with_code).identity
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_of_the_hub_are_code_too(folder: Path, entry: str) -> None:
    change(folder / "config.json", **{entry: "somebody/kernel@main"})
    with pytest.raises(ConfigError, match=r"code from the hub \(somebody/kernel@main\)"):
        load_lm(folder)


def test_code_of_a_tokenizer_is_said_when_it_is_needed(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "words.py").write_text(CODE.format(ran=str(tmp_path / "RAN")))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["words.Odd", None]}, tokenizer_class="Odd")
    lm = load_lm(folder)
    with pytest.raises(ConfigError, match=r"code of its own \(words.py\).*--trust-remote-code"):
        _ = lm.tokenizer
    assert lm.logits([[1, 2]]).shape == (1, 2, 40)
    assert not (tmp_path / "RAN").exists()


def test_nothing_is_asked_and_no_process_starts(with_code: Path, tmp_path: Path) -> None:
    """In a process of its own: stdin that says yes to everything, and a look at every process that is started."""
    script = (
        "import sys; sys.addaudithook(lambda event, _: event in ('subprocess.Popen', 'os.posix_spawn', 'os.system', "
        "'os.exec', 'pty.spawn', 'builtins.input') and print('STARTED', event, flush=True))\n"
        "from actcache.cli import main\n"
        f"sys.exit(main(['sites', {str(with_code)!r}, '--json']))"
    )
    run = subprocess.run([sys.executable, "-c", script], input="y\ny\n", capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert "--trust-remote-code" in json.loads(run.stderr.splitlines()[-1])["message"]
    assert not (tmp_path / "RAN").exists()


# Tokenizers


def without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        file.unlink()


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("bert", "AutoModelForMaskedLM"), ("gpt2", "AutoModelForCausalLM"), ("ctrl", "AutoModelForCausalLM"),
     ("llama", "AutoModelForCausalLM"), ("roberta", "AutoModelForMaskedLM")],
)  # fmt: skip
def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path, model_type: str, auto: str) -> None:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 97, "dff": 20}
    module = random_model(
        model_type, auto, **(sizes if model_type in ("gpt2", "ctrl") else {**LLAMA_LIKE, "vocab_size": 97})
    )
    module.save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    assert lm.tokenizer is None
    blocks = ac.token_blocks(np.full((4, 8), 50), lm.tokenizer, length=8)
    assert lm.logits(np.asarray(blocks.ids)).shape == (4, 8, 97)


def test_config_of_a_tokenizer_without_a_vocabulary(folder: Path) -> None:
    without_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    lm = load_lm(folder)
    with pytest.raises(ConfigError, match="tokenizer"):
        _ = lm.tokenizer


def test_a_tokenizer_that_needs_no_vocabulary_is_one(folder: Path) -> None:
    without_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_lm(folder).tokenizer("ab", add_special_tokens=False)["input_ids"] == [100, 101]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", POINTER, r"tokenizer.json is a git-lfs pointer, not the file itself"),
        ("tokenizer.json", b'{"version"', r"tokenizer.json is not JSON"),
        ("tokenizer.json", b"{}", r"the tokenizer in .*model cannot be read"),
        ("tokenizer_config.json", PAGE, r"tokenizer_config.json is a web page"),
        ("tokenizer.model", POINTER, r"tokenizer.model is a git-lfs pointer"),
        ("vocab.txt", POINTER, r"vocab.txt is a git-lfs pointer"),
    ],
)
def test_a_damaged_tokenizer_is_said_when_it_is_needed(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    lm = load_lm(folder)
    with pytest.raises(ConfigError, match=message):
        _ = lm.tokenizer
    assert lm.identity["tokenizer"] is None
    assert lm.bos == 1
    ids = ac.token_blocks(np.arange(32).reshape(4, 8), None, length=8)
    store = ac.extract(lm, ids, ["blocks.1.hook_mlp_out"], folder / "acts.zarr")
    assert store.sealed
    assert lm.open_instrumented() is not None
    with pytest.raises(ConfigError, match=message):
        load_lm(folder, tokenizer=folder)


def test_verbs_say_it_only_for_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)
    np.save(folder / "ids.npy", np.arange(64).reshape(4, 16) % 40)
    (folder / "text.txt").write_text("w5 w6 w7 " * 40)
    common = ["extract", "--model", str(folder), "--sites", "blocks.1.hook_mlp_out", "--length", "8", "--out"]
    assert main([*common, str(folder / "text.zarr"), "--text", str(folder / "text.txt")]) == 1
    assert "git-lfs pointer" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "text.zarr").exists()
    assert main([*common, str(folder / "ids.zarr"), "--text", str(folder / "ids.npy")]) == 0


def test_damaged_tokenizer_of_the_embedded_architecture(stories: Path) -> None:
    (stories / "tokenizer.json").write_bytes(POINTER)
    lm = load_lm(stories)
    assert lm.logits([[1, 2]]).shape == (1, 2, 40)
    with pytest.raises(ConfigError, match=r"tokenizer.json is a git-lfs pointer"):
        _ = lm.tokenizer


def test_tokenizer_by_name(saved: Path, stories: Path) -> None:
    lm = load_lm(stories, tokenizer=str(saved))
    assert lm.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert load_lm(**(lm.recipe or {})).identity == lm.identity
    assert load_lm(small_module(), tokenizer=saved).tokenizer("w5")["input_ids"] == [5]
    with pytest.raises(ConfigError, match=r"no tokenizer 'nobody/nothing'"):
        load_lm(stories, tokenizer="nobody/nothing")
    with pytest.raises(ConfigError, match=r"no tokenizer '.*stories'"):
        load_lm(stories, tokenizer=stories)
