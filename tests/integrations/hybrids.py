"""Small models of transformers with recurrent layers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HIDDEN = 32

DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**DELTA_NET, "rope_parameters": ROPE},
    "qwen3_next": {**DELTA_NET, **EXPERTS},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense"] * 2,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "attention"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_key_value_heads": 1,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
}
"""Model type -> how it differs from the defaults."""

RECURRENT_LAYERS = dict.fromkeys(CONFIGS, 1) | {"mamba2": 2}


def tiny_hybrid(kind: str) -> PreTrainedModel:
    """Return the decoder of two layers, with random weights, for ``inputs_embeds`` of width HIDDEN."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **CONFIGS[kind],
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model
