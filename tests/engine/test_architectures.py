"""Each architecture as a tiny random model: served by Atlas, and token for token what transformers' `generate` makes of it.

Windows are shorter than the prompts, soft-caps low enough to bite, and no parameter is left at its initial value, so that what
ignores one of them makes other tokens.
"""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import SHAPE, left_padded, logprobs_of
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, SamplingParams
from atlas_rl.bench.decoders import check, tiny_model, unsettle
from atlas_rl.engine import policy_view, twin

WINDOW = 8
PROMPTS = [list(range(5, 35)), [40, 41, 42], list(range(50, 67))]
CALL = {**left_padded(PROMPTS), "max_new_tokens": 24, "pad_token_id": 0, "do_sample": False}
SAMPLING = SamplingParams(max_new_tokens=24)

MULTI_HEAD = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
GROUPED = SHAPE | {"head_dim": 16}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = GROUPED | {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "pad_token_id": 0,
}
CAPPED = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 4}

ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, SHAPE | {"attention_bias": True}),
    "qwen2": (Qwen2Config, SHAPE),
    "qwen2, sliding": (
        Qwen2Config,
        SHAPE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, GROUPED),
    "qwen3_moe": (Qwen3MoeConfig, EXPERTS | {"num_experts": 4}),
    "mistral": (MistralConfig, GROUPED | {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, ALTERNATING | CAPPED),
    "gemma3": (Gemma3TextConfig, ALTERNATING | {"query_pre_attn_scalar": 4}),
    "phi3": (Phi3Config, SHAPE | {"pad_token_id": 0}),
    "phi3, sliding": (Phi3Config, SHAPE | {"pad_token_id": 0, "sliding_window": WINDOW}),
    "olmo2": (Olmo2Config, SHAPE),
    "gpt2": (GPT2Config, MULTI_HEAD),
    "gpt_neox": (
        GPTNeoXConfig,
        MULTI_HEAD | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ),
    "gpt_neox, serial": (GPTNeoXConfig, MULTI_HEAD | {"use_parallel_residual": False}),
    "granite": (
        GraniteConfig,
        SHAPE | {"attention_multiplier": 0.5, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    ),
    "cohere": (CohereConfig, SHAPE | {"pad_token_id": 0, "logit_scale": 0.5, "use_qk_norm": True}),
    "olmoe": (OlmoeConfig, EXPERTS | {"num_experts": 4}),
    "mixtral": (MixtralConfig, EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
}


def build(config_class: type[PreTrainedConfig], fields: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    attention = "eager" if "attn_logit_softcapping" in fields else None
    return unsettle(AutoModelForCausalLM.from_config(config_class(**fields), attn_implementation=attention).eval())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name: str):
    """With and without drafts, which must not change samples either."""
    model = build(*ARCHITECTURES[name]).double()
    model.set_experts_implementation("eager")  # the default one has no float64
    if model.config._attn_implementation == "eager":
        # transformers' eager attention turns the padding of a float64 row into NaN: its reference goes row by row
        alone = [model.generate(**CALL | left_padded([prompt]))[0, len(prompt) :] for prompt in PROMPTS]
        expected = torch.cat([CALL["input_ids"], torch.stack(alone)], dim=1)
    else:
        expected = model.generate(**CALL)
    samples = {}
    for lookahead in (0, 4):
        with AtlasRolloutGenerator(AtlasConfig(lookahead=lookahead)).attach(model) as atlas:
            assert torch.equal(model.generate(**CALL), expected)
            assert atlas.stats.num_completions == len(PROMPTS), "it went through Atlas"
            for _ in range(2):  # the second time, the drafter has seen every answer
                rollouts = atlas.generate(PROMPTS, SAMPLING, num_samples=2, seed=3)
            samples[lookahead] = [rollout.token_ids for rollout in rollouts]
            assert (sum(atlas.stats.accepted_by_depth) > 0) == (lookahead > 0)
    assert samples[0] == samples[4]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_the_models_own(name: str):
    """Float32 samples, on packed weights, against a teacher-forced forward of the original."""
    model = build(*ARCHITECTURES[name])
    with AtlasRolloutGenerator(AtlasConfig(lookahead=4)).attach(model) as atlas:
        rollouts = atlas.generate(PROMPTS, SAMPLING, num_samples=2, seed=5)
    for rollout in rollouts:
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs_of(model, rollout), atol=1e-4, rtol=0)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_the_twin_uses_the_models_experts_implementation(experts: str):
    model = build(*ARCHITECTURES["qwen3_moe"])
    model.set_experts_implementation(experts)
    assert policy_view.PolicyView(model).twin.config._experts_implementation == experts


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("qwen3_next", "linear_attention"),
        ("mamba2", "linear_attention"),
        ("bamba", "linear_attention"),
        ("falcon_h1", "hybrid"),
        ("lfm2", "conv"),
    ],
)
def test_models_with_other_layers_fall_back_with_one_line(model_type: str, kinds: str, caplog):
    model = tiny_model(model_type)
    call = CALL | {"max_new_tokens": 4}
    expected = model.generate(**call)
    with AtlasRolloutGenerator().attach(model) as atlas, caplog.at_level(logging.WARNING, "atlas_rl"):
        for _ in range(2):
            assert torch.equal(model.generate(**call), expected)
            assert atlas.stats.num_completions == 0
    (line,) = [record.message for record in caplog.records if record.name.startswith("atlas_rl")]
    assert line == f"generate() goes to transformers, not through Atlas: it has layers of type {kinds}"


def test_a_soft_cap_that_sdpa_leaves_out_is_no_model_for_atlas():
    """Transformers before 5.21 trains it so."""
    model = build(*ARCHITECTURES["gemma2"])
    assert twin.unsupported_reason(model) is None
    model.config._attn_implementation = "sdpa"
    assert "load it with attn_implementation='eager'" in twin.unsupported_reason(model)


def test_the_sweep_tells_wrong_from_right(monkeypatch):
    assert check("gemma2")[0] == "served"
    assert check("mamba") == ("fallback", "it has layers of type linear_attention")
    monkeypatch.setattr(policy_view, "scale_logits", lambda logits, config: logits)
    assert check("gemma2")[0] == "WRONG", "without its final soft-cap"


def test_a_window_that_only_the_cache_knows_is_found_by_the_probe():
    """Moshi's attention sees everything, but the cache that its `generate` makes forgets what is outside the window."""
    kind, why = check("moshi")
    assert kind == "fallback"
    if "does not run" in why:
        pytest.skip("this transformers' Moshi hands no keywords down to its attention")
    assert "its forward over a cache" in why
