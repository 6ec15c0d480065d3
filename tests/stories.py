"""stories260K, a real pretrained decoder in llama2.c's format, as a transformers Llama (only where ATLAS_TEST_DATA has it)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def data_folder(name: str) -> Path:
    """A folder of the extra test data, or a skip that says what is missing."""
    root = os.environ.get("ATLAS_TEST_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs ATLAS_TEST_DATA with {name}/ in it")
    return Path(root) / name


def load_stories260k(dtype: torch.dtype) -> LlamaForCausalLM:
    raw = (data_folder("stories260K") / "stories260K.bin").read_bytes()
    dim, hidden, num_layers, num_heads, num_kv_heads, vocab_size, max_len = np.frombuffer(raw, np.int32, 7).tolist()
    config = LlamaConfig(
        vocab_size=abs(vocab_size),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    values, place = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy()), 0

    def take(*dims: int) -> torch.Tensor:
        nonlocal place
        place += int(np.prod(dims))
        return values[place - int(np.prod(dims)) : place].view(dims)

    def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """RoPE on interleaved pairs -> RoPE on halves."""
        return weight.view(heads, -1, 2, dim).transpose(1, 2).reshape(-1, dim)

    kv_dim = dim // num_heads * num_kv_heads
    state = {"model.embed_tokens.weight": take(abs(vocab_size), dim)}
    stacked = {
        "input_layernorm": take(num_layers, dim),
        "self_attn.q_proj": take(num_layers, dim, dim),
        "self_attn.k_proj": take(num_layers, kv_dim, dim),
        "self_attn.v_proj": take(num_layers, kv_dim, dim),
        "self_attn.o_proj": take(num_layers, dim, dim),
        "post_attention_layernorm": take(num_layers, dim),
        "mlp.gate_proj": take(num_layers, hidden, dim),
        "mlp.down_proj": take(num_layers, dim, hidden),
        "mlp.up_proj": take(num_layers, hidden, dim),
    }
    state["model.norm.weight"] = take(dim)
    for name, weights in stacked.items():
        for layer, weight in enumerate(weights):
            heads = {"self_attn.q_proj": num_heads, "self_attn.k_proj": num_kv_heads}.get(name)
            state[f"model.layers.{layer}.{name}.weight"] = halves(weight, heads) if heads else weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model.to(dtype).eval()
