"""A policy made larger that says the same: with a small one's drafters it shows what drafts buy where weights take the time."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def random_policy(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights, the same every time; in float32, in eval mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def deepened(policy: PreTrainedModel, added_layers: int) -> PreTrainedModel:
    """The policy with layers behind its own whose attention and MLP add zeros to the residual stream. They are computed like any
    others, from random weights: only the projections that they end with are zero."""
    try:
        _last_projections(policy.model.layers[-1])
    except AttributeError:
        raise ValueError(
            "bench config: added_layers needs a policy whose layers end in self_attn.o_proj and mlp.down_proj, as Llama's and "
            f"Qwen3's do, and {type(policy).__name__}'s do not: set added_layers to 0, or name another model"
        ) from None
    config = copy.deepcopy(policy.config)
    config.num_hidden_layers += added_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types + config.layer_types[-1:] * added_layers
    deep = random_policy(config)
    deep.load_state_dict(deep.state_dict() | policy.state_dict())
    for layer in deep.model.layers[policy.config.num_hidden_layers :]:
        for projection in _last_projections(layer):
            for parameter in projection.parameters():
                nn.init.zeros_(parameter)
    deep.generation_config = policy.generation_config
    return deep


def _last_projections(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.self_attn.o_proj, layer.mlp.down_proj
