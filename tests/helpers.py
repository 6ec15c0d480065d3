"""Tiny random models and requests."""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, RolloutRequest

VOCAB_SIZE = 97
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,  # far enough from uniform to have something to draft
}


def tiny_llama(dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | overrides)).to(dtype).eval()


def tiny_qwen3(dtype: torch.dtype = torch.float32, **overrides) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 16} | overrides)).to(dtype).eval()


MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3}


def make_engine(model: PreTrainedModel, config=None, drafter=None, **view_options) -> RolloutEngine:
    return RolloutEngine(PolicyView(model, **view_options), config, drafter)


def make_requests(
    num_prompts: int, num_samples: int, max_new_tokens: int = 24, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> list[RolloutRequest]:
    """Random prompts of 1 to 40 tokens, `num_samples` completions each, distinct seeds."""
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(2, vocab_size), k=rng.randint(1, 40))) for _ in range(num_prompts)]
    return [
        RolloutRequest(prompt_ids=prompt, seed=1000 * i + j, max_new_tokens=max_new_tokens)
        for i, prompt in enumerate(prompts)
        for j in range(num_samples)
    ]


def recurrent(view: PolicyView, name: str = "recurrent") -> RecurrentDrafter:
    """Of random weights."""
    torch.manual_seed(0)
    return RecurrentDrafter(RecurrentHead.for_policy(view).to(view.compute_dtype), name=name)


def tokens_of(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


def left_padded(rows: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def logprobs_of(model: PreTrainedModel, rollout: Rollout, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of the rollout's tokens, by a teacher-forced forward (under autocast to `dtype`)."""
    ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
