"""Language models of many families, each a few thousand weights: for what has to hold beyond one architecture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi3": {"original_max_position_embeddings": 256},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**_LATENT, **_ROUTED, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "glm4_moe": {**_ROUTED, "head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
"""Of different kinds: tied, routed, with buffers (deepseek_v3, glm4_moe), with layers of their own (gpt2, phi3)."""


def make_family(name: str, tokenizer_of: Path, folder: Path, vocabulary: int | None = None) -> Path:
    """Save a model of a family, with random weights and buffers, and with the tokenizer of another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = AutoConfig.for_model(
        name, **{**SHARED, **FAMILIES.get(name, {}), "vocab_size": vocabulary or len(tokenizer)}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    for key, buffer in model.named_buffers():
        if key in model.state_dict():
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(folder)
    for path in tokenizer_of.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder
