"""EAGLE-3 heads in the files of other engines: they are written in one of two layouts, and read in either.

- `specforge` (SpecForge, SGLang, the EAGLE authors): `LlamaForCausalLMEagle3`, tensors `midlayer.*`. The layer ids in
  `eagle_config` are of layers whose OUTPUT is read: SpecForge's default is [1, L // 2 − 1, L − 4]
  (`resolve_eagle_capture_layers`), and SGLang adds one to get the layer whose input that is (`set_eagle3_layers_to_capture`).
- `speculators` (vllm-project/speculators): `Eagle3DraftModel`, tensors `layers.0.*`. The layer ids are vLLM's, of layers whose
  INPUT is read, one higher: the default is [2, L // 2, L − 3] (`resolve_target_layer_ids` in speculators/models/utils.py;
  `aux_hidden_state_layers` in vLLM's models). vLLM looks for them at the top level of config.json
  (`_get_eagle3_aux_layers_from_config`), so that they are there in our SpecForge checkpoints as well.

In both, `lm_head` covers a draft vocabulary, column i stands for token i + d2t[i], and t2d marks these tokens (vLLM and SGLang,
`llama_eagle3.py`). `norm_before_residual` (speculators) makes hidden_norm(f) the residual in the place of f.

A head of ours has no lm_head: it reads the policy's, live. What is written then is the policy's as it was, for other engines, and
`"atlas": {"live_head": true}` says that we do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from atlas_rl.drafters.eagle_head import SUPPORTED_ROPES, EagleHead

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Layout = Literal["specforge", "speculators"]
LAYER_NAMES: dict[Layout, str] = {"specforge": "midlayer.", "speculators": "layers.0."}
"""What the names of the layer's tensors begin with."""
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3DraftModel", "Eagle3Speculator")


def is_eagle(config: dict[str, Any]) -> bool:
    named = not set(ARCHITECTURES).isdisjoint(config.get("architectures") or ())
    return named or config.get("speculators_model_type") == "eagle3"


def write_eagle(
    head: EagleHead, output_head: torch.Tensor | None, policy_path: str, layout: Layout
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a head; see `save_head`."""
    tensors = dict(head.state_dict())
    if head.lm_head is not None:
        draft_ids = head.draft_ids.cpu()
    elif output_head is not None:
        tensors["lm_head.weight"] = output_head
        draft_ids = torch.arange(head.vocab_size)
    else:
        draft_ids = None
    if draft_ids is not None:
        tensors["d2t"] = draft_ids - torch.arange(len(draft_ids))
        tensors["t2d"] = torch.zeros(head.vocab_size, dtype=torch.bool).index_fill_(0, draft_ids, True)
    layer = {
        "model_type": "llama",
        "hidden_size": head.hidden_size,
        "intermediate_size": head.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": head.num_heads,
        "num_key_value_heads": head.num_kv_heads,
        "head_dim": head.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": head.max_position_embeddings,
        "rms_norm_eps": head.rms_norm_eps,
        "vocab_size": head.vocab_size,
        "tie_word_embeddings": False,
        **_written_rope(head.rope_parameters),
    }
    common: dict[str, Any] = {
        "draft_vocab_size": head.vocab_size if draft_ids is None else len(draft_ids),
        "norm_before_residual": head.norm_before_residual,
        "torch_dtype": str(head.fc.weight.dtype).removeprefix("torch."),
        "atlas": {"live_head": head.lm_head is None},
    }
    layers = list(head.layers) if head.layers is not None else None
    if layers is not None:
        common["eagle_aux_hidden_state_layer_ids"] = [layer_id + 1 for layer_id in layers]
    if layout == "specforge":
        aux = {"use_aux_hidden_state": True} | ({} if layers is None else {"eagle_aux_hidden_state_layer_ids": layers})
        return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **common, "eagle_config": aux}, tensors
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        **common,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": policy_path, "architectures": []},
        },
    }
    return config, _renamed(tensors, LAYER_NAMES["specforge"], LAYER_NAMES["speculators"])


def _written_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 has it, and as those who read older configs look for it."""
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def read_eagle(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[EagleHead, dict[str, torch.Tensor]]:
    """The head that a config describes, and the tensors that it is to be given.

    Raises:
        ValueError: it is damaged, or of a variant that cannot be run.
    """
    where = folder / CONFIG
    is_speculators = config.get("speculators_model_type") == "eagle3"
    layer = config.get("transformer_layer_config") if is_speculators else config
    if not isinstance(layer, dict):
        raise ValueError(f"{where}: no transformer_layer_config, which describes the layer of a speculators checkpoint")
    if is_speculators and "norm_before_residual" not in config:
        raise ValueError(f"{where}: no norm_before_residual; say true or false, as the head was trained")
    _check_supported(where, config, layer)
    tensors = _renamed(
        tensors, LAYER_NAMES["speculators"], LAYER_NAMES["specforge"]
    )  # vLLM takes both names in both, too
    offsets = tensors.pop("d2t", None)
    tensors.pop("t2d", None)
    if (config.get("atlas") or {}).get("live_head"):
        tensors.pop("lm_head.weight", None)
    lm_head = tensors.get("lm_head.weight")
    size, num_heads = _field(where, layer, "hidden_size"), _field(where, layer, "num_attention_heads")
    head = EagleHead(
        hidden_size=size,
        vocab_size=_field(where, layer, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=layer.get("num_key_value_heads") or num_heads,
        head_dim=layer.get("head_dim") or size // num_heads,
        intermediate_size=_field(where, layer, "intermediate_size"),
        layers=_layers(config),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        rope_parameters=_read_rope(where, layer),
        max_position_embeddings=layer.get("max_position_embeddings", 2048),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        draft_vocab_size=None if lm_head is None else len(lm_head),
        own_embedding="embed_tokens.weight" in tensors,
    )
    if lm_head is not None and offsets is not None:
        _take_offsets(head, offsets, folder / WEIGHTS)
    return head, tensors


def _check_supported(where: Path, config: dict[str, Any], layer: dict[str, Any]) -> None:
    """What would make the layer another one than `EagleHead`."""
    size, variant = layer.get("hidden_size"), config | (config.get("eagle_config") or {})
    for field, value, expected in (
        ("num_hidden_layers", layer.get("num_hidden_layers", 1), 1),
        ("hidden_act", layer.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(layer.get("attention_bias")), False),
        ("mlp_bias", bool(layer.get("mlp_bias")), False),
        ("model_type", layer.get("model_type", "llama"), "llama"),
        ("norm_before_fc", bool(variant.get("norm_before_fc")), False),
        ("norm_output", bool(variant.get("norm_output")), False),
        ("target_hidden_size", config.get("target_hidden_size") or size, size),
    ):
        if value != expected:
            raise ValueError(f"{where}: {field} is {value!r}, but only {expected!r} can be run: use another head")


def _layers(config: dict[str, Any]) -> list[int] | None:
    """Layers whose outputs are read; None if the checkpoint leaves it to the default."""
    outputs = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if outputs:
        return list(outputs)
    inputs = config.get("eagle_aux_hidden_state_layer_ids")
    return [layer - 1 for layer in inputs] if inputs else None


def _read_rope(where: Path, layer: dict[str, Any]) -> dict[str, Any]:
    rope = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or layer.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in SUPPORTED_ROPES:
        raise ValueError(
            f"{where}: a rotary embedding of type {rope['rope_type']!r} cannot be run; known are {', '.join(SUPPORTED_ROPES)}"
        )
    return rope


def _take_offsets(head: EagleHead, offsets: torch.Tensor, where: Path) -> None:
    """d2t: what is to be added to a column's number to get its token."""
    columns = torch.arange(head.lm_head.out_features)
    draft_ids = columns + offsets if offsets.shape == columns.shape else None
    if draft_ids is None or not ((draft_ids >= 0) & (draft_ids < head.vocab_size)).all():
        raise ValueError(
            f"{where}: d2t does not map the {len(columns)} columns of lm_head into {head.vocab_size} tokens; it has to "
            "hold, for each column, its token less its number"
        )
    head.draft_ids = draft_ids


def _field(where: Path, layer: dict[str, Any], name: str) -> int:
    if not isinstance(layer.get(name), int):
        raise ValueError(f"{where}: {name} is {layer.get(name)!r} instead of a number: the checkpoint is damaged")
    return layer[name]


def _renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    """With another first part of their names."""
    return {new + n.removeprefix(old) if n.startswith(old) else n: tensor for n, tensor in tensors.items()}
