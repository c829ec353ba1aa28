"""load_lm opens what is there, says clearly what is not, and knows what it opened."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_models import LLAMA_LIKE, MLP_IN, MLP_OUT, SMALL, minilm_folder, random_model, small_module
from safetensors.torch import save_file
from torch import Tensor, nn

from actcache.errors import ConfigError, ModelNotFoundError
from actcache.lm import LanguageModel, load_lm
from actcache.source import token_blocks


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LanguageModel:
    return load_lm(str(llama_folder))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stories_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(SMALL)))
    save_file({k: v.bfloat16() for k, v in small_module().state_dict().items()}, folder / "model.safetensors")
    return folder


def test_folder_of_the_embedded_architecture(stories_folder: Path, ids: Tensor) -> None:
    lm = load_lm(str(stories_folder))
    assert (lm.name, lm.kind, lm.n_ctx, lm.d_vocab, lm.dtype) == ("tiny", "stories", 12, 40, torch.float32)
    torch.testing.assert_close(lm.logits(ids), small_module().bfloat16().float()(ids))
    assert not lm.module.training


def test_embedded_model_with_its_tokenizer() -> None:
    lm = load_lm("stories-4l")
    assert (lm.n_ctx, lm.module.config.n_layers) == (256, 4)
    assert lm.d_vocab == len(lm.tokenizer)
    assert lm.bos == lm.tokenizer.bos_token_id == lm.tokenizer.convert_tokens_to_ids("<|bos|>")
    text = "Once upon a time, there was a little girl named Lily. She loved to play in the park with her dog."
    tokens = torch.tensor([[lm.bos, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    loss = nn.functional.cross_entropy(lm.logits(tokens)[0, :-1], tokens[0, 1:])
    assert loss < math.log(lm.d_vocab) / 2
    bridge = lm.open_instrumented()
    assert bridge.to_tokens(text).tolist() == tokens.tolist()
    torch.testing.assert_close(bridge(tokens), lm.logits(tokens), atol=1e-4, rtol=1e-5)


def test_hugging_face_folder_with_its_tokenizer(llama: LanguageModel, llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = (llama.name, llama.kind, llama.n_ctx, llama.d_vocab, llama.bos)
    assert found == ("tiny-llama", "huggingface", 512, 512, 0)
    tokens = llama.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        assert torch.equal(llama.logits(tokens), theirs(tokens).logits)
    assert llama.tokenizer.decode(tokens[0]) == "<|bos|>Once upon a time"


def test_hugging_face_folder_without_tokenizer(tmp_path: Path, llama_folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_folder / name, tmp_path)
    lm = load_lm(str(tmp_path))
    assert lm.tokenizer is None
    assert lm.bos == 0
    assert lm.identity["tokenizer"] is None
    assert len(lm.resolve(["blocks.*.hook_mlp_out"])) == 5


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model at .*nowhere.*no such folder"):
        load_lm(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"no model in folder .*config.json"):
        load_lm(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"'nobody/nothing'.*'stories-4l'.*folder.*Hugging Face"):
        load_lm("nobody/nothing")


def test_checkpoints_that_are_incomplete_or_of_another_kind(tmp_path: Path, llama_folder: Path) -> None:
    from safetensors.torch import load_file

    source = llama_folder
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no model in folder .*model.safetensors"):
        load_lm(str(tmp_path))
    weights = load_file(source / "model.safetensors")
    some = {k: v for k, v in weights.items() if "layers.3.mlp" not in k}
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 3 of the weights.*layers.3.mlp"):
        load_lm(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="not a causal language model"):
        load_lm(str(tmp_path))


@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16])
def test_dtype_by_name(stories_folder: Path, ids: Tensor, wanted: Any) -> None:
    lm = load_lm(str(stories_folder), dtype=wanted)
    assert lm.dtype == torch.bfloat16
    assert lm.capture(ids, lm.resolve([MLP_OUT]))[MLP_OUT].dtype == torch.bfloat16
    with lm.splice(MLP_IN, MLP_OUT, lambda x: torch.zeros_like(x, dtype=torch.float32)):
        assert lm.logits(ids).dtype == torch.bfloat16


def test_half_precision_finds_the_same_plain_modules(llama_folder: Path, llama: LanguageModel) -> None:
    half = load_lm(str(llama_folder), dtype="bfloat16")
    assert half.site_names == llama.site_names
    plain = [[s.site.name for s in lm.resolve(["*"], length=4) if not s.instrumented] for lm in (half, llama)]
    assert plain[0] == plain[1]


def test_options_outside_their_range() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of bfloat16.*'int8'"):
        load_lm(small_module(), dtype="int8")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' cannot be used"):
        load_lm(small_module(), device="cuda:99")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_run_on_a_gpu(ids: Tensor) -> None:
    lm = load_lm(small_module(), device="cuda")
    value = lm.capture(ids, lm.resolve([MLP_OUT]))[MLP_OUT]
    assert value.device.type == "cuda"
    cpu = load_lm(small_module())
    torch.testing.assert_close(value.cpu(), cpu.capture(ids, cpu.resolve([MLP_OUT]))[MLP_OUT], atol=1e-4, rtol=1e-3)


def test_identity_is_what_decides_the_activations(llama: LanguageModel) -> None:
    one, same = load_lm(small_module()).identity, load_lm(small_module()).identity
    assert one == same == json.loads(json.dumps(one))
    changed = small_module()
    with torch.no_grad():
        changed.blocks[2].mlp["in"].bias[3] += 1e-3
    assert load_lm(changed).identity["weights"] != one["weights"]
    assert load_lm(small_module(), dtype="bfloat16").identity["weights"] != one["weights"]
    assert {k: v for k, v in one.items() if k != "weights"} == {
        "name": "stories-4l",
        "class": "StoriesLM",
        "dtype": "float32",
        "tokenizer": None,
    }
    blocks = token_blocks(["Once upon a time there was a cat."], llama.tokenizer, length=4)
    assert llama.identity["tokenizer"] == blocks.description["tokenizer"]


# Encoders


def test_encoder_is_opened_as_what_it_is() -> None:
    lm = load_lm(str(minilm_folder()))
    assert (lm.kind, type(lm.module).__name__, lm.n_ctx, lm.d_vocab) == ("huggingface", "BertModel", 512, 30522)
    assert lm.bos is None
    assert lm.tokenizer.tokenize("Sentences") == ["sentences"]
    with pytest.raises(ConfigError, match=r"has no logits.*last_hidden_state"):
        lm.logits([[101, 7592, 102]])


def saved(module: Any, folder: Path, architecture: str | None = None) -> str:
    module.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture] if architecture else None
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("auto", "architecture", "opened"),
    [
        ("AutoModelForMaskedLM", "BertForMaskedLM", "BertForMaskedLM"),
        ("AutoModelForMaskedLM", None, "BertLMHeadModel"),
        ("AutoModel", "BertModel", "BertModel"),
        ("AutoModel", None, "BertModel"),
        ("AutoModelForTokenClassification", "BertForTokenClassification", "BertModel"),  # without a pooler
        ("AutoModelForSequenceClassification", "BertForSequenceClassification", "BertModel"),
    ],
)
def test_checkpoints_of_an_encoder_with_any_head(
    tmp_path: Path, ids: Tensor, auto: str, architecture: str | None, opened: str
) -> None:
    module = random_model("bert", auto, **LLAMA_LIKE)
    lm = load_lm(saved(module, tmp_path, architecture))
    assert type(lm.module).__name__ == opened
    weights = {key.removeprefix("bert."): value for key, value in module.state_dict().items()}
    for key, value in lm.module.state_dict().items():
        assert torch.equal(value, weights[key.removeprefix("bert.")]), key


def test_base_of_a_causal_model(tmp_path: Path, ids: Tensor) -> None:
    whole = random_model("llama", **LLAMA_LIKE)
    lm = load_lm(saved(whole.model, tmp_path, "LlamaModel"))
    assert type(lm.module).__name__ == "LlamaModel"
    name = "blocks.1.hook_resid_post"
    wanted = load_lm(whole).capture(ids, load_lm(whole).resolve([name]))[name]
    assert torch.equal(lm.capture(ids, lm.resolve([name]))[name], wanted)


def test_encoder_that_lacks_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = saved(random_model("bert", "AutoModel", **LLAMA_LIKE), tmp_path, "BertModel")
    weights = load_file(tmp_path / "model.safetensors")
    some = {k: v for k, v in weights.items() if "layer.1.output" not in k}
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 4 of the weights of BertModel.*layer.1.output"):
        load_lm(folder)


# GGUF files


def test_gguf_files_that_cannot_be_opened(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ModelNotFoundError, match=r"no model at .*nothing.gguf.*no such file"):
        load_lm(str(tmp_path / "nothing.gguf"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ConfigError, match=r"2 GGUF files: name one, such as .*a.gguf"):
        load_lm(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"a.gguf.*that transformers can open"):
        load_lm(str(tmp_path / "a.gguf"))


# The way back to the same model


def test_recipe_opens_the_same_model_from_anywhere(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ids: Tensor
) -> None:
    monkeypatch.chdir(llama_folder.parent)
    lm = load_lm(llama_folder.name, dtype="bfloat16", device="cpu", autocast="bfloat16")
    folder = str(Path.cwd() / llama_folder.name)
    assert lm.recipe == {"model": folder, "dtype": "bfloat16", "device": "cpu", "autocast": "bfloat16"}
    monkeypatch.chdir(tmp_path)
    again = load_lm(**json.loads(json.dumps(lm.recipe)))
    assert (again.identity, again.recipe) == (lm.identity, lm.recipe)
    assert load_lm("stories-4l").recipe == {"model": "stories-4l"}
    assert load_lm(small_module()).recipe is None
    assert load_lm("stories-4l", tokenizer=lm.tokenizer).recipe is None


@pytest.mark.exhaustive
def test_revision_is_the_commit_of_the_hub(tmp_path: Path, llama_folder: Path) -> None:
    """A cache as huggingface_hub lays it out, with a branch that points to a commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--stories"
    shutil.copytree(llama_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    said = "import json; from actcache.lm import load_lm; lm = load_lm('somebody/stories'); "
    said += "print(json.dumps([lm.identity, lm.recipe]))"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True)
    identity, recipe = json.loads(run.stdout)
    assert (identity["name"], identity["revision"]) == ("somebody/stories", commit)
    assert recipe == {"model": "somebody/stories", "revision": commit}
    assert "revision" not in load_lm(str(llama_folder)).identity
    for file in (repository / "snapshots" / commit).glob("tokenizer*"):
        file.unlink()
    said = "from actcache.lm import load_lm; print(load_lm('somebody/stories').tokenizer)"
    run = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"
