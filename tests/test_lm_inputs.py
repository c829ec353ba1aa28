"""What a model takes is tried: lengths, ids, and that the ids it embeds are those that it is given."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import LLAMA_LIKE, random_model, small_module
from torch import Tensor, nn

import actcache as ac
from actcache.cli import main
from actcache.errors import ConfigError
from actcache.lm import load_lm
from actcache.lm.context_length import Context, _BoundsChecked
from actcache.spec import NO_DOCUMENT, TokenBlocks


def blocks_of(ids: Any) -> TokenBlocks:
    return TokenBlocks(ids=np.asarray(ids, np.uint32), document=np.zeros_like(ids, np.uint32), description={})


# Lengths


@pytest.mark.parametrize(
    ("model_type", "auto", "config", "n_ctx"),
    [
        ("roberta", "AutoModelForMaskedLM", {"max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("camembert", "AutoModelForMaskedLM", {"max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("bert", "AutoModelForMaskedLM", {"max_position_embeddings": 16}, 16),
        ("xlnet", "AutoModelForCausalLM", {"d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 20}, None),
        ("mamba", "AutoModelForCausalLM", {}, None),
        ("bloom", "AutoModelForCausalLM", {"n_layer": 2, "n_head": 3}, None),
        ("opt", "AutoModelForCausalLM", {"ffn_dim": 20, "max_position_embeddings": 16, "word_embed_proj_dim": 24}, 16),
    ],
)
def test_context_is_what_works(model_type: str, auto: str, config: dict[str, Any], n_ctx: int | None) -> None:
    sizes = {key: value for key, value in LLAMA_LIKE.items() if key != "max_position_embeddings"}
    lm = load_lm(random_model(model_type, auto, **{**sizes, **config}))
    assert lm.n_ctx == n_ctx
    top = n_ctx or 40
    assert lm.logits(np.full((2, top), 20)).shape[:2] == (2, top)
    lm.check_length(top)
    if n_ctx is not None:
        for refused in (lambda: lm.check_length(n_ctx + 1), lambda: lm.logits(np.full((1, n_ctx + 1), 20))):
            with pytest.raises(ConfigError, match=rf"{n_ctx + 1} tokens, but .* {n_ctx} positions.*at most {n_ctx}"):
                refused()


def test_a_length_beyond_the_claim_that_works_is_allowed_with_a_warning() -> None:
    lm = load_lm(random_model("llama", **LLAMA_LIKE))
    assert lm.n_ctx == 16
    with pytest.warns(UserWarning, match=r"24 tokens run through .* claims 16 positions"):
        lm.check_length(24)
    assert lm.logits(np.full((1, 24), 20)).shape[1] == 24


class Positions(nn.Module):
    """A module with a table of positions, which nothing says the size of."""

    def __init__(self, n_positions: int = 13) -> None:
        super().__init__()
        self.where, self.what = nn.Embedding(n_positions, 6), nn.Embedding(30, 6)
        self.head = nn.Linear(6, 30)
        self.lengths: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.lengths.append(ids.shape[1])
        hidden: Tensor = self.what(ids) + self.where(torch.arange(ids.shape[1]))
        return self.head(hidden)  # type: ignore[no-any-return]


def test_limit_of_a_module_is_found_in_few_passes() -> None:
    module = Positions(1000)
    lm = load_lm(module)
    lm.check_length(900)
    ran = len(module.lengths)
    lm.check_length(512)  # a longer one has run
    assert len(module.lengths) == ran
    with pytest.raises(ConfigError, match=r"1400 tokens, but Positions has a context of 1000 positions"):
        lm.check_length(1400)
    assert len(module.lengths) - ran < 20
    with pytest.raises(ConfigError, match=r"at most 1000"):
        lm.logits(np.zeros((1, 1001), np.int64))


def test_a_length_that_fails_unasked_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"14 tokens, but Positions has a context of 13 positions") as raised:
        load_lm(Positions()).logits(np.zeros((1, 14), np.int64))
    assert isinstance(raised.value.__cause__, IndexError)


def test_other_errors_are_not_taken_for_a_length() -> None:
    class Broken(Positions):
        def forward(self, ids: Tensor) -> Tensor:
            if len(self.lengths) > 3:
                raise RuntimeError("something else")
            return super().forward(ids)

    lm = load_lm(Broken())
    lm.logits(np.zeros((1, 4), np.int64))
    lm.module.lengths += [0] * 9
    with pytest.raises(RuntimeError, match="something else"):
        lm.logits(np.zeros((1, 5), np.int64))


def test_lack_of_memory_is_no_limit() -> None:
    def run(ids: Tensor) -> None:
        if ids.shape[1] > 100:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    context = Context(None, run, lambda n: torch.zeros(1, n), lambda: 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        context.limit_below(200)
    assert context.limit_below(100) is None


def test_an_expensive_claim_is_not_tried_unasked() -> None:
    ran: list[int] = []
    context = Context(1 << 17, lambda ids: ran.append(ids.shape[1]), lambda n: torch.zeros(1, n), lambda: 1 << 30)
    assert context.longest == 1 << 17
    assert ran == []
    assert Context(-1, lambda ids: None, lambda n: torch.zeros(1, n), lambda: 1).longest is None


@pytest.mark.parametrize(
    "lookup",
    [
        lambda table, at: nn.functional.embedding(at, table),
        lambda table, at: table[at],
        lambda table, at: table.index_select(0, at),
        lambda table, at: table.gather(0, at[:, None].expand(-1, 3)),
    ],
)
def test_indices_are_looked_at_before_a_device_sees_them(lookup: Any) -> None:
    table = torch.randn(5, 3)
    with _BoundsChecked():
        assert torch.equal(lookup(table, torch.tensor([4, 0])), table[[4, 0]])
        with pytest.raises(IndexError, match="index 5 is out of bounds for 5 rows"):
            lookup(table, torch.tensor([1, 5]))


def test_verbs_refuse_a_length_before_the_text_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model("roberta", "AutoModelForMaskedLM", **{**LLAMA_LIKE, "max_position_embeddings": 34, "pad_token_id": 1}
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    model, site = str(tmp_path / "model"), "roberta.encoder.layer.1:out"
    nowhere = str(tmp_path / "no-text.npy")
    for verb in (
        ["extract", "--model", model, "--sites", site, "--text", nowhere, "--out", str(tmp_path / "a.zarr")],
        ["plan", model, nowhere, site],
    ):
        assert main([*verb, "--length", "33"]) == 1
        assert "a context of 32 positions" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=r"33 tokens, but .* 32 positions"):
        ac.extract(load_lm(model), blocks_of(np.full((4, 33), 20)), [site], tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr").exists()


# Ids


def test_an_id_beyond_the_model_is_refused_before_a_store_is_begun(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("actcache.lm.inputs._IDS_AT_A_TIME", 16)
    lm = load_lm(small_module())

    class Words:
        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<extra_{token}>"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    ids = np.zeros((9, 8), np.uint32)
    ids[7, 3] = 41
    np.save(tmp_path / "ids.npy", ids)
    blocks = blocks_of(np.load(tmp_path / "ids.npy", mmap_mode="r"))
    with pytest.raises(ConfigError, match=r"token id 41, but stories-4l knows 40 tokens"):
        ac.extract(lm, blocks, ["blocks.0.hook_mlp_out"], tmp_path / "a.zarr")
    lm.tokenizer = Words()
    with pytest.raises(ConfigError, match=r"token id 41 \('<extra_41>' in its tokenizer\)"):
        lm.check_ids(ids)
    assert not (tmp_path / "a.zarr").exists()
    store = ac.extract(load_lm(small_module()), blocks_of(ids[:4]), ["blocks.0.hook_mlp_out"], tmp_path / "a.zarr")
    with pytest.raises(ConfigError, match=r"token id 41"):
        ac.extend(load_lm(small_module()), store.path, blocks_of(ids))


# Decoders


SEQ2SEQ = {
    "vocab_size": 97, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 3}


@pytest.mark.parametrize(
    ("model_type", "auto", "config"),
    [
        ("bart", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("bart", "AutoModel", SEQ2SEQ),
        ("mbart", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("pegasus", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("blenderbot", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("marian", "AutoModelForSeq2SeqLM", {**SEQ2SEQ, "pad_token_id": 96, "decoder_start_token_id": 96}),
        ("plbart", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("m2m_100", "AutoModelForSeq2SeqLM", SEQ2SEQ),
        ("t5", "AutoModelForSeq2SeqLM", T5),
    ],
)
def test_models_with_an_encoder_and_a_decoder_are_refused(
    tmp_path: Path, model_type: str, auto: str, config: dict[str, Any]
) -> None:
    module = random_model(model_type, auto, **config)
    with pytest.raises(ConfigError, match=r"not a causal language model, nor an encoder.*get_encoder"):
        load_lm(module)
    module.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"not a causal language model, nor an encoder.*get_encoder"):
        load_lm(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its names are module paths
        lm = load_lm(module.get_encoder())
        assert "layers.0:out" in lm.site_names or "block.0:out" in lm.site_names


def test_a_decoder_alone_is_a_causal_model(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForCausalLM

    module = BartForCausalLM(BartConfig(**SEQ2SEQ)).eval()
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(load_lm(module).logits(ids), module(ids).logits)


class Moved(nn.Module):
    """A plain module that feeds the second of its parts with the ids moved by one."""

    def __init__(self, move: int = 1) -> None:
        super().__init__()
        self.move = move
        self.encoder, self.decoder = nn.Embedding(50, 6), nn.Embedding(50, 6)
        self.head = nn.Linear(6, 50)

    def forward(self, ids: Tensor) -> Tensor:
        own = torch.cat([torch.zeros_like(ids[:, : self.move]), ids[:, : ids.shape[1] - self.move]], dim=1)
        return self.head(self.decoder(own) + self.encoder(ids).mean(1, keepdim=True))  # type: ignore[no-any-return]


def test_plain_modules_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"makes one of the ids moved by one position"):
        load_lm(Moved()).resolve([":out"])
    with pytest.raises(ConfigError, match=r"makes one of the ids moved by one position"):
        load_lm(Moved()).logits([[1, 2, 3]])
    assert load_lm(Moved(0)).logits([[1, 2, 3]]).shape == (1, 3, 50)


# Classes


@pytest.mark.parametrize("name", ["T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel", "T5ForTokenClassification"])
def test_encoders_of_an_encoder_decoder_open_as_what_their_config_names(tmp_path: Path, name: str) -> None:
    import transformers as hf

    kind = getattr(hf, name)
    torch.manual_seed(0)
    module = kind(kind.config_class(**T5)).eval()
    module.save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    assert type(lm.module) is kind
    ids = torch.arange(20).view(2, 10)
    for key, value in module.state_dict().items():
        assert torch.equal(lm.module.state_dict()[key], value)
    wanted: list[Tensor] = []
    module.get_encoder().block[0].register_forward_hook(
        lambda m, a, out: wanted.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        module(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        site = next(path for path in lm.site_names if path.endswith("block.0:out"))
        torch.testing.assert_close(lm.capture(ids, lm.resolve([site]))[site], wanted[0])


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    import transformers as hf
    from safetensors.torch import load_file, save_file

    hf.T5EncoderModel(hf.T5Config(**T5)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"lacks \d+ of the weights of T5EncoderModel"):
        load_lm(tmp_path)


def test_a_part_of_a_model_of_several_opens_as_what_its_config_names(tmp_path: Path) -> None:
    import transformers as hf

    text = {**LLAMA_LIKE, "max_position_embeddings": 16, "hidden_size": 24, "projection_dim": 8}
    hf.CLIPTextModel(hf.CLIPTextConfig(**text)).save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    assert (type(lm.module).__name__, lm.n_ctx) == ("CLIPTextModel", 16)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPTextModel"]


def test_padding_behind_a_document_is_no_id_of_the_model(tmp_path: Path) -> None:
    lm = load_lm(small_module())
    blocks = blocks_of(np.zeros((4, 8), np.uint32))
    blocks.document[:, 5:] = NO_DOCUMENT
    assert ac.extract(lm, blocks, ["blocks.0.hook_mlp_out"], tmp_path / "a.zarr").sealed
