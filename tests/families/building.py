"""Language models of many families, each a few thousand weights: for what has to hold beyond one architecture."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    # GPT-2's, MPT's and others' words for the same
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "d_model": 32, "n_layers": 2, "n_heads": 4},
    **{"ffn_dim": 64, "ffn_hidden_size": 64, "num_layers": 2, "word_embed_proj_dim": 32},
    **{"encoder_layers": 2, "decoder_layers": 2},
    # attention that shrinks to a latent; windows
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"sliding_window": 16, "query_pre_attn_scalar": 8, "original_max_position_embeddings": 256},
    # experts
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 2, "topk_group": 1},
    **{"first_k_dense_replace": 1, "n_shared_experts": 1, "intermediate_size_mlp": 64, "moe_num_experts": 4},
    # state spaces
    **{"state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4},
    **{"mamba_head_dim": 16, "conv_kernel": 4, "n_groups": 1, "hidden_size_per_layer_input": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What a small model has of each size, under the names that configurations have for them."""

_SENSES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"depth": 2, "num_heads": 4, "attention_heads": 4, "num_key_value_heads": 4, "mlp_dim": 64, "image_size": 32},
    **{"patch_size": 8, "num_position_embeddings": 16, "out_hidden_size": 32, "output_channels": 32},
    **{"vision_output_dim": 32, "num_global_layers": 1, "num_blocks": 2, "window_size": 2, "max_source_positions": 16},
    **{"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8, "crop_size": 32},
    **{"base_channels": 32, "codebook_size": 16, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    **{"output_proj_dims": 32, "num_mel_bins": 8, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2},
    **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "encoder_layers": 2, "encoder_ffn_dim": 64},
}
"""The same of what sees or hears."""

_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
_LATENT = {"num_key_value_heads": 4}
_ROTARY = {"rotary_dim": 4}

_SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
_SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "image_size": 32, "patch_size": 8}  # fmt: skip
_INKLING_2 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
              "rel_extent": 16, "route_scale": 1.0}  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gpt2": {},
    "gptj": _ROTARY,
    "codegen": _ROTARY,
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "llama4_text": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                     "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
               "num_mem_blocks": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "adapter_rank": 4,
               "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
              "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_dt_rank": 4},
    **{
        name: {"layer_types": ["linear_attention", "full_attention"]}
        for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "bailing_hybrid", "olmo_hybrid")
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    **{name: {"logit_scale": 1.0} for name in ("cohere", "cohere2", "cohere2_moe")},
    "ernie4_5_moe": {"moe_k": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "route_scale": 1.0},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 1.0},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 4},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "gemma3": {
        "text_config": {**_SMALL_TEXT, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": _SMALL_VISION, "mm_tokens_per_image": 4},
    "gemma4_assistant": {
        "text_config": {**_SMALL_TEXT, "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 8,
                        "sliding_window": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0,
                        "vocab_size_per_layer_input": 0},
        "backbone_hidden_size": 32},
    "gemma4_unified_assistant": {
        "text_config": {**_SMALL_TEXT, "model_type": "gemma4_unified_text", "head_dim": 8, "sliding_window": 16,
                        "num_kv_shared_layers": 2},
        "backbone_hidden_size": 32},
    "blt": {
        "encoder_hash_byte_group_vocab": 40, "patch_size": 4,
        **{f"{part}_config": {**_SMALL_TEXT, "num_key_value_heads": 4, "head_dim": 8, **more} for part, more in (
            ("patcher", {}), ("encoder", {"hidden_size_global": 64}), ("decoder", {"hidden_size_global": 64}),
            ("global", {"hidden_size": 64, "head_dim": 16}))}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 1.0,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0,
                                                  "mrope_section": [2, 1, 1]}, "full_attention": None}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note": {
        "vision_config": {**_SMALL_VISION, "per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32,
                          "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "moe_intermediate_size": 16,
                          "num_experts_per_tok": 2},
        "audio_config": {**_SMALL_VISION, "num_key_value_heads": 4, "feature_size": 8, "downsample_hidden_size": 16,
                         "adapter_input_size": 32, "adapter_out_dim": 32}},
    "inkling2_loop_text": {"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2,
                           "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3,
                           "loop_num_passes": 2, "loop_gate_rank": 4, **_INKLING_2},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"], **_INKLING_2},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16],
                 "feed_forward_size": 64, "attention_head_size": 8, "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
                 "shape_vocab_size": 16},
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "xlm": {"emb_dim": 32},
    "llama-rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
}  # fmt: skip
"""What a family needs beyond its sizes, and `llama-rope`, which is a Llama whose context was stretched."""

PUBLISHED_AS = dict.fromkeys(("emu3", "mllama"), "AutoModelForImageTextToText")
"""Families whose files are those of a larger model, out of which transformers takes the one for text."""

_OF_SOUND = "it writes codes of sound, and transformers gives its class the configuration of a larger model"
UNBUILT = {
    "gemma3n": "what it sees with is a model of timm, which fedloom does not install; gemma3n_text is built",
    "musicgen": _OF_SOUND,
    "musicgen_melody": _OF_SOUND,
}
"""Why a family cannot be built here."""

FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt2", "phi3", "olmo2", "mixtral", "deepseek_v3", "glm4_moe")
"""Of different kinds: tied, routed, with buffers (deepseek_v3, glm4_moe), with layers of their own (gpt2, phi3)."""

_MOST_WEIGHTS = 5_000_000


class TooLarge(Exception):
    """A family's configuration that stays large whatever is asked of it."""


def tiny_config(name: str, vocabulary: int, **settings: Any) -> PretrainedConfig:
    """A small configuration of a family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name.partition("-rope")[0]]
    parts = {
        part: _of_part(part, spec, vocabulary)
        for part, spec in getattr(kind, "sub_configs_defaults", {}).items()
        if not getattr(spec, "optional", False)
    }
    config: PretrainedConfig = kind(**{**_sizes(kind, vocabulary), **parts, **SPECIAL.get(name, {}), **settings})
    if (text := config.get_text_config(decoder=True)) is not config:
        text.vocab_size = vocabulary
    return config


def _of_part(part: str, spec: Any, vocabulary: int) -> dict[str, Any]:
    """The settings of a configuration's part: of its text, which is a family by itself, or of what sees or hears."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING.get(spec.model_type, spec.config_class)
    if "text" not in part and part != "decoder":
        return {"model_type": spec.model_type, **{k: v for k, v in _SENSES.items() if k in _known(kind)}}
    return {"model_type": spec.model_type, **_sizes(kind, vocabulary), **SPECIAL.get(spec.model_type, {})}


def _sizes(kind: Any, vocabulary: int) -> dict[str, Any]:
    known = _known(kind)
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    sizes |= {key: vocabulary for key in _VOCABULARIES if key in known}
    return sizes | (_LATENT if "kv_lora_rank" in known else {})


def _known(kind: Any) -> set[str]:
    """The keys of a configuration."""
    known = set(inspect.signature(kind.__init__).parameters)
    return known | {key for parent in kind.__mro__ for key in getattr(parent, "__annotations__", {})}


def make_family(name: str, tokenizer_of: Path, folder: Path, vocabulary: int | None = None, **settings: Any) -> Path:
    """Save a model of a family, with random weights and buffers, and with the tokenizer of another.

    Raises TooLarge where the configuration does not become small.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    kind = getattr(transformers, PUBLISHED_AS.get(name, "AutoModelForCausalLM"))
    config = tiny_config(name, vocabulary or len(AutoTokenizer.from_pretrained(tokenizer_of)), **settings)
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind.from_config(config).parameters())
    if weights > _MOST_WEIGHTS:
        raise TooLarge(f"{name} has {weights:,} weights")
    torch.manual_seed(0)
    model = kind.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    for key, buffer in model.named_buffers():
        if key in model.state_dict() and buffer.is_floating_point():
            noise = 0.05 * torch.randn(buffer.shape)
            # What is 0 may be a mask; a buffer of nothing else is a bias that is still to be learnt.
            buffer.copy_(buffer * (1 + noise) if buffer.any() else noise)
    model.save_pretrained(folder)
    for path in tokenizer_of.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder
