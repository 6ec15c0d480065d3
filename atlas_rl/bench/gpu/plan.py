"""How much is measured, on a GPU and in a dry run on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atlas_kernels.checks import Sizes

QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL_LINEARS = tuple((rows, kind) for rows in (1, 4, 16, 64) for kind in ("qkv", "out", "gate_up", "down"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    repeats: int = 10
    """Of a kernel's timing."""
    copy_bytes: int = 2**30
    matrix_size: int = 8192
    # kernels
    sizes: Sizes = Sizes(
        num_rows=16,
        num_queries=5,
        context=4096,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        hidden=2048,
        intermediate=6144,
        vocab=151_936,
        linears=ALL_LINEARS,
    )
    attention_rows: tuple[int, ...] = (16, 32, 64)
    sample_rows: tuple[int, ...] = (1, 16, 64)
    linear_rows: tuple[int, ...] = (1, 4, 16, 64)
    distill_rows: int = 2048
    distill_vocab: int = 32_000
    # decode
    model: dict[str, Any] = field(default_factory=lambda: dict(QWEN3_1_7B))
    decode_rows: tuple[int, ...] = (1, 4, 16, 64)
    verify_rows: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    new_tokens: int = 128
    rounds: int = 3
    """Of arms in turn, after one that is not counted."""
    # policy
    policy_rows: tuple[tuple[int, int], ...] = ((1, 1), (1, 4), (2, 8), (8, 8))
    """Prompts, and samples of each."""
    policy_tokens: int = 128
    policy_warm: int = 3
    draining_prompts: int = 8
    draining_tokens: int = 288
    """Of a completion at most; the recorded ones have no more."""
    min_repeats: int = 6
    max_repeats: int = 9
    """Recorded batches, less those that drafters are warmed with."""
    law_prompts: int = 16
    law_tokens: int = 288
    # training
    updates: int = 10
    train_prompts: int = 8
    train_samples: int = 8
    train_tokens: int = 64
    quickstart: bool = True
    # memory
    kept_rollouts: int = 80
    large_rollouts: int = 20
    large_tokens: int = 4096
    large_rows: int = 64


FULL = Plan()
DRY = Plan(
    repeats=1,
    copy_bytes=2**16,
    matrix_size=32,
    sizes=Sizes(linears=((1, "qkv"), (3, "out"), (1, "gate_up"), (3, "down"))),
    attention_rows=(2,),
    sample_rows=(1, 2),
    linear_rows=(1, 3),
    distill_rows=4,
    distill_vocab=50,
    model=QWEN3_1_7B
    | {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128},
    decode_rows=(1, 3),
    verify_rows=(1,),
    prompt_tokens=6,
    new_tokens=8,
    rounds=1,
    policy_rows=((1, 1),),
    policy_tokens=12,
    policy_warm=1,
    draining_prompts=1,
    draining_tokens=32,
    min_repeats=1,
    max_repeats=1,
    law_prompts=1,
    law_tokens=16,
    updates=2,
    train_prompts=1,
    train_samples=4,
    train_tokens=8,
    quickstart=False,
    kept_rollouts=3,
    large_rollouts=2,
    large_tokens=64,
    large_rows=2,
)
