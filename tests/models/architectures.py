"""Configurations of published models, scaled down: their heads per KV head, head sizes, windows and flags,
with few layers, narrow layers and a small vocabulary."""

from __future__ import annotations

import hashlib
import json

VOCABULARY = 4096

#: What all of them share. The weights are large enough that attention decides between tokens.
COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.08,
}


def _heads(query: int, kv: int, size: int) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": size}


def _kinds(*pattern: str) -> list[str]:
    return [f"{kind}_attention" for kind in pattern]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + i / 16 for i in range(48)],
    "original_max_position_embeddings": 4096,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}

#: Served. Each name is that of the published model whose flags it has.
SERVED = {
    "Llama-2-7B": {"model_type": "llama", **_heads(4, 4, 128), "hidden_size": 512},
    "Llama-3.1-8B": {
        "model_type": "llama",
        **_heads(8, 2, 128),
        "rope_parameters": _LLAMA3_ROPE,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        **_heads(7, 1, 128),
        "hidden_size": 896,
        "use_sliding_window": False,
    },
    "Qwen3-8B": {"model_type": "qwen3", **_heads(8, 2, 128)},
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        **_heads(16, 2, 128),
        **_MOE,
        "norm_topk_prob": True,
    },
    "Mistral-7B-v0.1": {"model_type": "mistral", **_heads(8, 2, 128), "sliding_window": 256},
    "Mistral-Nemo": {"model_type": "mistral", **_heads(8, 2, 128), "sliding_window": None},
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        **_heads(8, 2, 128),
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "MiniCPM3-4B": {  # its values are padded to the size of its keys, 96
        "model_type": "minicpm3",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "scale_emb": 1,
        "dim_model_base": 256,
    },
    "Phi-2": {
        "model_type": "phi",
        "num_attention_heads": 32,
        "hidden_size": 2560,
        "initializer_range": 0.028,  # as much per dimension as the narrower ones have
        "partial_rotary_factor": 0.4,
    },
    "Phi-3-mini-4k": {
        "model_type": "phi3",
        **_heads(4, 4, 96),
        "hidden_size": 384,
        "sliding_window": 300,
    },
    "Phi-4": {
        "model_type": "phi3",
        **_heads(4, 1, 128),
        "hidden_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
    },
    "Phi-4-mini": {
        "model_type": "phi3",
        **_heads(3, 1, 128),
        "hidden_size": 384,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 4096,
        "rope_parameters": _LONG_ROPE,
    },
    "Gemma-2-9B": {
        "model_type": "gemma2",
        **_heads(4, 2, 256),
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 2.0,  # near the logits of so small a model; 50 is published
        "final_logit_softcapping": 30.0,
        "embedding_factor": 0.1,
        "sliding_window": 256,
        "layer_types": _kinds("sliding", "full") * 2,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3_text",
        **_heads(8, 4, 256),
        "query_pre_attn_scalar": 256,
        # Scaled up by the model, and the output's too: it would say the last token again and again.
        "embedding_factor": 0.1,
        "sliding_window": 256,
        "num_hidden_layers": 6,
        "layer_types": _kinds(*["sliding"] * 5, "full"),
    },
    "Falcon-7B": {
        "model_type": "falcon",
        "num_attention_heads": 15,
        "hidden_size": 960,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "bias": False,
    },
    "Falcon-40B": {
        "model_type": "falcon",
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "hidden_size": 512,
        "parallel_attn": True,
        "new_decoder_architecture": True,
        "bias": False,
    },
    "OLMo-2-7B": {"model_type": "olmo2", **_heads(4, 4, 128), "hidden_size": 512},
    "OLMo-3-7B": {
        "model_type": "olmo3",
        **_heads(4, 4, 128),
        "hidden_size": 512,
        "sliding_window": 256,
        "layer_types": _kinds("sliding", "sliding", "sliding", "full"),
    },
    "Granite-3.3-8B": {
        "model_type": "granite",
        **_heads(4, 1, 128),
        "hidden_size": 512,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    },
    "Command-R7B": {
        "model_type": "cohere2",
        **_heads(4, 1, 128),
        "hidden_size": 512,
        "sliding_window": 256,
        "logit_scale": 0.25,
        "layer_types": _kinds("sliding", "sliding", "sliding", "full"),
    },
    "StarCoder2-3B": {
        "model_type": "starcoder2",
        **_heads(12, 1, 128),
        "hidden_size": 1536,
        "sliding_window": 300,
        "use_bias": True,
    },
    "GLM-4-9B": {
        "model_type": "glm4",
        **_heads(8, 1, 128),
        "hidden_size": 256,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        **_heads(4, 1, 128),
        "hidden_size": 512,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "EXAONE-4.0-32B": {
        "model_type": "exaone4",
        **_heads(5, 1, 128),
        "hidden_size": 640,
        "sliding_window": 256,
        "layer_types": _kinds("sliding", "sliding", "sliding", "full"),
    },
    "Nemotron-4-15B": {
        "model_type": "nemotron",
        **_heads(6, 1, 128),
        "hidden_size": 768,
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
    },
    "Llama-4-Scout": {
        "model_type": "llama4_text",
        **_heads(5, 1, 128),
        "hidden_size": 640,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 512,
        "attention_chunk_size": 256,
    },
    "gpt-oss-20B": {
        "model_type": "gpt_oss",
        **_heads(8, 1, 64),
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": _kinds("sliding", "full") * 2,
    },
    "OPT-1.3B": {
        "model_type": "opt",
        "num_attention_heads": 4,
        "hidden_size": 256,
        "word_embed_proj_dim": 256,
        "ffn_dim": 512,
        "init_std": 0.08,
    },
    "Gemma-3n-E2B": {
        "model_type": "gemma3n_text",
        **_heads(8, 2, 256),
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": _kinds("sliding", "full") * 3,
        "sliding_window": 256,
        "intermediate_size": [512] * 6,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 64,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 16,
    },
}

#: Gemma 4: full attention with larger heads than sliding windows have.
_GEMMA4 = {
    "model_type": "gemma4_text",
    "global_head_dim": 512,
    "embedding_factor": 0.1,
    "sliding_window": 256,
    "num_hidden_layers": 6,
    "layer_types": _kinds("sliding", "full") * 3,
}
SERVED |= {
    "Gemma-4-E2B": {
        **_GEMMA4,
        **_heads(8, 1, 256),
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 64,
    },
    "Gemma-4-31B": {
        **_GEMMA4,
        **_heads(8, 4, 256),
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
    },
}

#: In 16 bits rounding would choose other experts, so every token takes all of them.
ALL_EXPERTS = {
    "Qwen3-30B-A3B": {"num_experts": 4, "num_experts_per_tok": 4},
    "Mixtral-8x7B": {"num_local_experts": 2},
    "gpt-oss-20B": {"num_local_experts": 4},
    "Llama-4-Scout": {"num_local_experts": 1},
}
#: Whose full attention has heads that FlashAttention 3 does not take.
LARGE_HEADS = ("Gemma-4-E2B", "Gemma-4-31B")
#: Whose head size has no CUDA kernels, so that Triton's have to be chosen.
WITHOUT_CUDA = ("Phi-2",)

#: Sparse layers where they are not all but the first of four, because others have a window or chunks.
SPARSE_LAYERS = {
    "Mistral-7B-v0.1": 0,
    "Phi-3-mini-4k": 0,
    "StarCoder2-3B": 0,
    "Gemma-2-9B": 2,
    "Gemma-3-4B": 1,
    "OLMo-3-7B": 1,
    "Command-R7B": 1,
    "EXAONE-4.0-32B": 1,
    "Llama-4-Scout": 1,
    "gpt-oss-20B": 2,
    "Gemma-3n-E2B": 3,
    "Gemma-4-E2B": 3,
    "Gemma-4-31B": 3,
}

#: Recurrent layers beside full attention. Heads and states have their published sizes, because vLLM fits pages
#: of attention to the states; Jamba has a quarter of its width. Every token takes all experts, so rounding chooses
#: no others.
HYBRIDS = {
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        **_heads(16, 2, 256),
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_hidden_layers": 8,
        "layer_types": _kinds("linear", "linear", "linear", "full") * 2,
    },
    "Qwen3.5-9B": {
        "model_type": "qwen3_5_text",
        **_heads(16, 4, 256),
        "mamba_ssm_dtype": "float32",
        "layer_types": _kinds("linear", "linear", "linear", "full"),
    },
    "Granite-4.0-H-Tiny": {
        "model_type": "granitemoehybrid",
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_size": 1536,
        "shared_intermediate_size": 128,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "mamba_n_heads": 48,
        "mamba_d_state": 128,
        "layer_types": _kinds("linear", "linear", "full", "linear"),
    },
    "Nemotron-H-8B": {
        "model_type": "nemotron_h",
        **_heads(32, 8, 128),
        "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
    },
    "LFM2-1.2B": {
        "model_type": "lfm2",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 2048,
        "block_dim": 2048,
        "conv_dim": 2048,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    "Jamba-1.5-Mini": {
        "model_type": "jamba",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 1024,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
    },
}


def digest(config: dict) -> str:
    """Tells a record of a configuration from one of another."""
    whole = json.dumps({**COMMON, **config}, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


_OTHER = "--attention-backend"

#: Refused before a server starts: configuration, and what the sentence names.
REFUSED = {
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2",
            **_heads(4, 4, 64),
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
        },
        ("multi-head latent attention", _OTHER),
    ),
    "BLOOM-7B": ({"model_type": "bloom", "n_head": 4, "n_layer": 4}, ("ALiBi", _OTHER)),
    "Falcon-RW-7B": (
        {"model_type": "falcon", "num_attention_heads": 4, "alibi": True},
        ("ALiBi", _OTHER),
    ),
    "Qwen2.5-7B-1M": (
        {
            "model_type": "qwen2",
            **_heads(7, 1, 128),
            "hidden_size": 896,
            "dual_chunk_attention_config": {"chunk_size": 4096, "local_size": 512},
        },
        ("dual chunk attention", _OTHER),
    ),
    "Mamba-2.8B": ({"model_type": "mamba", "state_size": 16}, ("without attention", "drop")),
    "BERT": (
        {"model_type": "bert", "architectures": ["BertModel"], "num_attention_heads": 4},
        ("pooling runner", _OTHER),
    ),
    "ModernBERT": (
        {
            "model_type": "modernbert",
            "architectures": ["ModernBertModel"],
            "num_attention_heads": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        ("pooling runner", _OTHER),
    ),
    "Whisper": (
        {
            "model_type": "whisper",
            "architectures": ["WhisperForConditionalGeneration"],
            "decoder_start_token_id": 1,
        },
        ("encoder-decoder", _OTHER),
    ),
    "Qwen3, bidirectional": (
        {"model_type": "qwen3", **_heads(4, 1, 128), "is_causal": False},
        ("later tokens", _OTHER),
    ),
    "Step-1": (
        {"model_type": "llama", "architectures": ["Step1ForCausalLM"], **_heads(4, 1, 64)},
        ("ALiBi", _OTHER),
    ),
}
