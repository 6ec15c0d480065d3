"""Every causal language model of the installed transformers, tiny and random: does Atlas serve it, and as `generate` would?

    python -m atlas_rl.bench.decoders                  # all of them, about a minute
    python -m atlas_rl.bench.decoders gemma2 phi3      # these model types

Served means, in float64: greedy completions of ragged prompts longer than the sliding window equal those of transformers'
`generate` token for token, and log-probs of samples those of the model's own forward. What goes to `generate` is listed with the
reason. A model that Atlas accepts and computes otherwise is WRONG, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from itertools import cycle, islice

import torch
from rich.console import Console
from rich.progress import track
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, SamplingParams
from atlas_rl.engine.twin import unsupported_reason
from atlas_rl.types import Rollout

VOCAB_SIZE = 97
MAX_PARAMETERS = 100_000_000
LOGPROB_TOLERANCE = 1e-4
PROMPTS = [list(range(5, 19)), [20, 21, 22], list(range(30, 37))]
NEW_TOKENS = 24
NUM_LAYERS = 4
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
SMALL = {
    name: value
    for names, value in {
        "hidden_size d_model n_embd dim emb_dim embedding_size": 32,
        "intermediate_size d_ff n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size": 32,
        "num_hidden_layers n_layer n_layers decoder_layers encoder_layers": NUM_LAYERS,
        "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads": 4,
        "num_key_value_heads num_kv_shared_layers max_window_layers index_n_heads": 2,
        "head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar sliding_window": 8,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions": 128,
        "use_sliding_window": True,
        "initializer_range": 0.2,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size": 16,
        "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts": 2,
        "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts": 1,
        "q_lora_rank kv_lora_rank mamba_d_state index_head_dim hidden_size_per_layer_input": 8,
        "qk_rope_head_dim rotary_dim mamba_n_heads index_topk": 4,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    }.items()
    for name in names.split()
}
"""Fields of one meaning have many names; a config takes those that it knows."""
SOFTCAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5}
"""Only for configs that have one by default: others know the field and ignore it."""
OVERRIDES = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type: what its config wants beyond that, or kinds of layers that its default lacks."""


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The class's defaults, shrunk; the first layers have all kinds of layers that the default has."""
    default = config_class()
    fields = default.to_dict()
    values = {name: value for name, value in SMALL.items() if name in fields}
    values |= {name: value for name, value in SOFTCAPS.items() if fields.get(name)}
    if fields.get("attn_logit_softcapping"):
        values["attn_implementation"] = "eager"  # sdpa leaves the cap out in transformers before 5.21
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(fields.get(name) or ()))
        if kinds:
            values[name] = list(islice(cycle(kinds), NUM_LAYERS))
    for name in config_class.sub_configs:
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            values[name] = tiny_config(type(getattr(default, name))).to_dict()
    values |= {"vocab_size": VOCAB_SIZE, "bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0, "is_decoder": True}
    values |= OVERRIDES.get(config_class.model_type, {})
    return config_class(**values, experts_implementation="eager")


def unsettle(model: PreTrainedModel) -> PreTrainedModel:
    """Move every parameter away from its initial value, lest biases at 0 and norms at 1 hide what ignores them.

    Embeddings get small: a head that is tied to large ones says the last token again, whatever attention does.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(0.1)
    return model


def tiny_model(model_type: str) -> PreTrainedModel:
    """In float64."""

    def config() -> PreTrainedConfig:
        config = tiny_config(CONFIG_MAPPING[model_type])
        wants_text = model_class.config_class is config.sub_configs.get("text_config")
        return config.get_text_config() if wants_text else config

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in model_class(config()).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"it still has {num_parameters / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = model_class(config()).double().eval()
    model.generation_config = type(model.generation_config)()  # Bart's and others' forces tokens
    return unsettle(model)


def check(model_type: str) -> tuple[str, str]:
    """(served, fallback, unbuilt or WRONG; the figures or the reason)."""
    width = max(map(len, PROMPTS))
    call = {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        **GREEDY,
    }
    try:
        model = tiny_model(model_type)
        if reason := unsupported_reason(model):
            return "fallback", reason
        expected = model.generate(**call)[:, width:].tolist()
    except Exception as error:  # it needs more than small numbers, or a package: there is nothing to compare with
        return "unbuilt", _first_line(error)
    try:
        with AtlasRolloutGenerator(AtlasConfig(lookahead=2)).attach(model) as atlas:
            output = model.generate(**call)[:, width:].tolist()
            if atlas.attachment.told_reasons:
                return "fallback", "; ".join(atlas.attachment.told_reasons)
            rollouts = atlas.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS), num_samples=2)
    except Exception as error:
        return "WRONG", _first_line(error)
    note = ""
    if output != expected:
        # in float64, transformers' eager attention turns padding into NaN, and a padded row with it: once more without padding
        expected = [model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in PROMPTS]
        note = ", generate's own padded rows differ"
    if output != expected:
        return "WRONG", "other greedy tokens than generate"
    error = max(_logprob_error(model, rollout) for rollout in rollouts)
    distinct = len({token for row in expected for token in row})
    how = f"{type(model).__name__}, log-probs within {error:.0e}, {distinct} distinct greedy tokens{note}"
    return ("served" if error <= LOGPROB_TOLERANCE else "WRONG"), how


def _logprob_error(model: PreTrainedModel, rollout: Rollout) -> float:
    """Against a teacher-forced forward of the model."""
    ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    return (torch.tensor(rollout.logprobs) - logprobs).abs().max().item()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model_types", nargs="*", help="names of architectures, as transformers has them (default: all)"
    )
    model_types = parser.parse_args().model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    logging.getLogger("atlas_rl").setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    console = Console()
    for model_type in track(model_types, "decoders", console=console):
        kind, how = check(model_type)
        counts[kind] += 1
        console.print(f"{kind:9s}{model_type:28s}{how}", highlight=False, markup=False, soft_wrap=True)
    print(f"{sum(counts.values())} model types: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
