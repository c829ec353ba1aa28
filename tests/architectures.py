"""Architectures of transformers, each as small as it can be made, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, "type_vocab_size": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CAUSAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "apertus": ("apertus", _LLAMA),
    "arcee": ("arcee", _LLAMA),
    "biogpt": ("biogpt", {**_BERT, "scale_embedding": False}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 4}),
    "cohere": ("cohere", _LLAMA),
    "cohere2": ("cohere2", {**_LLAMA, "head_dim": 8}),
    "ctrl": ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 40, "n_positions": 64}),
    "ernie4_5": ("ernie4_5", {**_LLAMA, "head_dim": 8}),
    "exaone4": ("exaone4", _LLAMA),
    "falcon, old": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon, ALiBi, sequential": (
        "falcon",
        {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    "falcon, new": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "glm": ("glm", {**_LLAMA, "head_dim": 8}),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 8}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 8,
        },
    ),
    "gpt_neox": ("gpt_neox", _BERT),
    "gpt_neox, no attention bias": ("gpt_neox", {**_BERT, "attention_bias": False}),
    "gpt_oss": (
        "gpt_oss",
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "granite": (
        "granite",
        {
            **_LLAMA,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "granitemoe": ("granitemoe", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("helium", {**_LLAMA, "head_dim": 8}),
    "llama": ("llama", _LLAMA),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 8}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "nemotron": ("nemotron", {**_LLAMA, "head_dim": 8}),
    "olmo": ("olmo", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "olmoe": ("olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai-gpt": ("openai-gpt", _GPT2),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "persimmon": ("persimmon", _LLAMA),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2_moe": ("qwen2_moe", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "head_dim": 8}),
    "smollm3": ("smollm3", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "xglm": (
        "xglm",
        {"d_model": 32, "ffn_dim": 40, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
    ),
}
"""Causal language models: type, and the sizes of a small one."""

MASKED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "albert": ("albert", {**_BERT, "embedding_size": 16, "num_hidden_groups": 1}),
    "bert": ("bert", _BERT),
    "camembert": ("camembert", _BERT),
    "convbert": ("convbert", {**_BERT, "embedding_size": 32, "head_ratio": 2}),
    "deberta": ("deberta", _BERT),
    "deberta-v2": ("deberta-v2", {**_BERT, "relative_attention": True, "pos_att_type": "p2c|c2p"}),
    "distilbert": (
        "distilbert",
        {"dim": 32, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "electra": ("electra", {**_BERT, "embedding_size": 16}),
    "modernbert": ("modernbert", {**_BERT, "local_attention": 8}),
    "mpnet": ("mpnet", _BERT),
    "roberta": ("roberta", _BERT),
    "xlm-roberta": ("xlm-roberta", _BERT),
}
"""Encoders with a masked language model's head."""

D_VOCAB = 97


def small_model(model_type: str, sizes: Mapping[str, Any], auto: str) -> Any:
    """A model of that type whose norms, biases and scales all do something."""
    import transformers

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=D_VOCAB, **special, **sizes)
    module = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()
