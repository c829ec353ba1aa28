"""Reports of wrong values from the field, each with its own guard switched off: the audit finds them all the same.

The guards refuse or mend these before anything is stored (their tests are elsewhere). The audit knows nothing of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from lm_models import DYNAMIC_ROPE, LONG_ROPE
from torch import Tensor, nn

import actcache as ac
from actcache.errors import AuditError
from actcache.lm import LanguageModel, names
from actcache.lm import survey as sites
from actcache.lm.inputs import Inputs
from actcache.lm.survey import Comparison, layout_of
from actcache.spec import Meaning

D_VOCAB = 97
OPTIONS: dict[str, Any] = {"dtype": "float32", "skip_first": 0, "batch_sequences": 4, "sequences_per_shard": 4}
SIZES = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def noisy(module: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def blocks_of(*lengths: int) -> Any:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, D_VOCAB, n).tolist() for n in lengths]
    return ac.token_blocks(documents, None, length=max(lengths), packing="documents")


def olmo2() -> Any:
    return noisy(hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES, intermediate_size=40, num_key_value_heads=2, **SPECIAL)))


def test_an_instrumented_model_that_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon with ALiBi and sequential attention: the block's output of transformer-lens is another one."""

    def agreed(plain: Any, instrumented: Any) -> Comparison:
        return Comparison(trusted=frozenset(instrumented), before=frozenset(instrumented))

    monkeypatch.setattr(names, "compare", agreed)
    monkeypatch.setattr(
        names, "choose_places", lambda plain, instrumented: {n: s.place for n, s in instrumented.items()}
    )
    config = hf.FalconConfig(**SIZES, alibi=True, parallel_attn=False, multi_query=False, bias=True, **SPECIAL)
    lm = ac.load_lm(noisy(hf.FalconForCausalLM(config)))
    with pytest.raises(AuditError, match="the instrumented model is not the plain one"):
        ac.extract(lm, blocks_of(12, 12, 12, 12), ["blocks.1.hook_resid_post"], tmp_path / "x.zarr", **OPTIONS)


def test_a_name_that_means_another_module_in_half_of_the_store(tmp_path: Path) -> None:
    """`hook_mlp_out` of OLMo 2 before its norm with one version of transformer-lens, behind it with another."""
    lm, blocks, path = ac.load_lm(olmo2()), blocks_of(*[12] * 8), tmp_path / "x.zarr"
    resolve, layer = lm.resolve, lm.module.model.layers[0]

    def saying_nothing(module: nn.Module) -> Any:
        """As a version that wrote no meanings, and read the name there."""

        def resolved(patterns: Any, *, length: int | None = None) -> Any:
            found = resolve(patterns, length=length)
            return [replace(s, module=module, site=replace(s.site, meaning=None)) for s in found]

        return resolved

    for part, module in ((1, layer.mlp), (2, layer.post_feedforward_layernorm)):
        lm.resolve = saying_nothing(module)  # type: ignore[method-assign]
        store = ac.extract(lm, blocks, ["blocks.0.hook_mlp_out"], path, part=(part, 2), audit=False, **OPTIONS)
    assert store.sealed
    assert ac.verify(path) == []
    lm.resolve = resolve  # type: ignore[method-assign]
    found = ac.audit(store, lm)
    assert not found.sound
    assert found.sites[0].max_relative_error > 0.05


def test_short_sequences_in_a_batch_with_a_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rope takes other frequencies for all sequences of a batch once one of them is long."""
    config = hf.Phi3Config(
        **SIZES,
        **SPECIAL,
        intermediate_size=40,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=LONG_ROPE,
    )
    lm = ac.load_lm(noisy(hf.Phi3ForCausalLM(config)))
    monkeypatch.setattr(LanguageModel, "takes_padding_to", lambda *_: True)
    blocks = blocks_of(40, 10, 12, 9)
    with pytest.raises(AuditError, match="only sequences shorter than others fail"):
        ac.extract(lm, blocks, ["model.layers.1:out"], tmp_path / "x.zarr", **OPTIONS)


class Streams(nn.Module):
    """Two streams before the sequences, as AltUp and hyper-connections have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.streams = nn.Embedding(D_VOCAB, 8), Stacked()

    def forward(self, ids: Tensor) -> Tensor:
        return self.streams(self.embed(ids))[0]


class Stacked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, -x])


def test_streams_that_are_taken_for_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout_of

    def guessed(pattern: bool, shapes: Any, ids_shapes: Any) -> Any:
        return ("Q F T F", "") if len(shapes[0]) == 4 else right(pattern, shapes, ids_shapes)

    monkeypatch.setattr(sites, "layout_of", guessed)
    monkeypatch.setattr(sites, "equal", lambda *_: True)  # which shows that such rows change with the batch
    lm, options = ac.load_lm(Streams()), {**OPTIONS, "batch_sequences": 2}
    with pytest.raises(AuditError, match="streams:out"):
        ac.extract(lm, blocks_of(*[12] * 8), ["streams:out"], tmp_path / "x.zarr", **options)


def test_a_decoder_that_is_fed_the_tokens_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BART moves its input by a position for the decoder: the rows there are those of other tokens."""
    monkeypatch.setattr(Inputs, "check_not_moved", lambda *_: None)
    config = hf.BartConfig(
        vocab_size=D_VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
    )
    lm = ac.load_lm(noisy(hf.BartForConditionalGeneration(config)))
    wanted = ["model.encoder.layers.1:out", "model.decoder.layers.1:out"]
    store = ac.extract(lm, blocks_of(*[12] * 4), wanted, tmp_path / "x.zarr", audit=False, **OPTIONS)
    encoder, decoder = ac.audit(store, lm).sites
    assert encoder.sound
    assert not decoder.sound
    assert "makes other tokens out of the sequence" in decoder.reasons[0]


def test_a_module_that_runs_twice_is_not_its_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALBERT's layers are one module: its first run is no layer by that name."""
    config = hf.AlbertConfig(**SIZES, intermediate_size=40, embedding_size=16, **SPECIAL)
    lm = ac.load_lm(noisy(hf.AlbertForMaskedLM(config)))
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0:out"
    resolve = lm.resolve

    def first(patterns: Any, *, length: int | None = None) -> Any:
        (found,) = resolve([f"{layer}@1"], length=length)
        meaning = Meaning(module=found.site.meaning.module)  # type: ignore[union-attr]
        return [replace(found, site=replace(found.site, name=layer, meaning=meaning))]

    lm.resolve = first  # type: ignore[method-assign]
    with pytest.raises(AuditError, match="runs 2 times in one forward pass"):
        ac.extract(lm, blocks_of(*[12] * 4), [layer], tmp_path / "x.zarr", **OPTIONS)


def test_a_model_that_remembers_long_sequences_is_audited_as_if_it_did_not(tmp_path: Path) -> None:
    """Dynamic rope: frequencies that were stretched for a long sequence stay so for the next ones."""
    config = hf.LlamaConfig(
        **SIZES,
        **SPECIAL,
        intermediate_size=40,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rope_parameters=DYNAMIC_ROPE,
    )
    lm = ac.load_lm(noisy(hf.LlamaForCausalLM(config)))
    with pytest.warns(UserWarning, match="claims 16 positions"):
        store = ac.extract(
            lm, blocks_of(40, 30, 36, 20, 28, 24, 33, 18), ["model.layers.1:out"], tmp_path / "x.zarr", **OPTIONS
        )
    found = ac.audit(store, lm)
    assert found.sound, str(found)
