"""Draft heads in files: a folder with config.json and model.safetensors, nothing that runs code when it is read.

EAGLE-3 heads are written as other engines read them, in one of two layouts, and read in either:

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

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas_rl.drafters.eagle_head import SUPPORTED_ROPES, EagleHead
from atlas_rl.drafters.heads import DraftHead

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Layout = Literal["specforge", "speculators"]
NAMES: dict[str, str] = {"midlayer.": "layers.0."}
"""Tensors in a SpecForge checkpoint, and in a speculators one, by their first part."""
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3DraftModel", "Eagle3Speculator")


def save_head(
    head: DraftHead,
    folder: str | Path,
    *,
    output_head: torch.Tensor | None = None,
    policy_path: str = "",
    layout: Layout = "specforge",
) -> None:
    """Write a head, beside the folder first: what is in the folder is whole at any time.

    Args:
        output_head: the policy's output weights [V, D], for a head that has none of its own: without them, other engines cannot
            serve the checkpoint. policy_path: what a speculators checkpoint names as its verifier.
    """
    if isinstance(head, EagleHead):
        config, tensors = _eagle_checkpoint(head, output_head, policy_path, layout)
    else:
        config, tensors = {"atlas_kind": head.kind, **head.config_dict()}, dict(head.state_dict())
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        scratch.chmod(0o755)  # mkdtemp's is private
        _replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_head(folder: str | Path) -> DraftHead:
    """The head in a folder: one of ours, or an EAGLE-3 checkpoint of SpecForge or speculators. In float32, on the CPU.

    Raises:
        ValueError: what is there cannot be read, or is nothing that we can run.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    with torch.random.fork_rng(devices=[]):  # modules draw weights before they are given any
        if "atlas_kind" in config:
            head = _own_head(folder, dict(config))
        elif _is_eagle(config):
            head, tensors = _eagle_head(folder, config, tensors)
        else:
            raise ValueError(
                f"{folder / CONFIG}: architectures {config.get('architectures')} is no draft head that can be read; known "
                "are Atlas-RL's own and EAGLE-3 (SpecForge, speculators)"
            )
    _load_strictly(head, tensors, folder / WEIGHTS)
    return head


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds a draft head, and not a language model, as far as its config tells."""
    config = _read_config(Path(folder))
    return "atlas_kind" in config or _is_eagle(config)


# ---- EAGLE-3, written --------------------------------------------------------------------------------------------------------


def _eagle_checkpoint(
    head: EagleHead, output_head: torch.Tensor | None, policy_path: str, layout: Layout
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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
    return config, {_renamed(name, NAMES): tensor for name, tensor in tensors.items()}


def _written_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 has it, and as those who read older configs look for it."""
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


# ---- EAGLE-3, read -----------------------------------------------------------------------------------------------------------


def _is_eagle(config: dict[str, Any]) -> bool:
    named = not set(ARCHITECTURES).isdisjoint(config.get("architectures") or ())
    return named or config.get("speculators_model_type") == "eagle3"


def _eagle_head(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[EagleHead, dict[str, torch.Tensor]]:
    where = folder / CONFIG
    is_speculators = config.get("speculators_model_type") == "eagle3"
    layer = config.get("transformer_layer_config") if is_speculators else config
    if not isinstance(layer, dict):
        raise ValueError(f"{where}: no transformer_layer_config, which describes the layer of a speculators checkpoint")
    if is_speculators and "norm_before_residual" not in config:
        raise ValueError(f"{where}: no norm_before_residual; say true or false, as the head was trained")
    _check_supported(where, config, layer)
    tensors = {_renamed(name, {v: k for k, v in NAMES.items()}): tensor for name, tensor in tensors.items()}
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


# ---- files -------------------------------------------------------------------------------------------------------------------


def _own_head(folder: Path, config: dict[str, Any]) -> DraftHead:
    kind = config.pop("atlas_kind")
    kinds = head_kinds()
    if kind not in kinds:
        raise ValueError(f"{folder / CONFIG}: atlas_kind {kind!r} is unknown; known are {', '.join(sorted(kinds))}")
    try:
        return kinds[kind](**config)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG}: it does not describe a {kind} head ({error}): save it again") from None


def head_kinds() -> dict[str, type[DraftHead]]:
    from atlas_rl.drafters.recurrent_head import RecurrentHead

    return {EagleHead.kind: EagleHead, RecurrentHead.kind: RecurrentHead}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a folder that holds a draft head") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): the checkpoint is damaged, fetch or save it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object: the checkpoint is damaged, fetch or save it again")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{path} is missing (weights in other files, pickles among them, are not read): convert them")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): the checkpoint is damaged, fetch or save it again"
        ) from None


def _load_strictly(head: DraftHead, tensors: dict[str, torch.Tensor], where: Path) -> None:
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            said, is_there = (list(shapes[name]) if name in shapes else "none" for shapes in (expected, found))
            raise ValueError(
                f"{where}: tensor {name} has shape {is_there}, but {CONFIG} says {said}: the files do not belong together, "
                "or the head is of a variant that cannot be run"
            )
        if not tensors[name].isfinite().all():
            raise ValueError(f"{where}: tensor {name} holds NaN or infinity: the head diverged, use an earlier one")
    head.load_state_dict(tensors)


def _field(where: Path, layer: dict[str, Any], name: str) -> int:
    if not isinstance(layer.get(name), int):
        raise ValueError(f"{where}: {name} is {layer.get(name)!r} instead of a number: the checkpoint is damaged")
    return layer[name]


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _replace_folder(source: Path, target: Path) -> None:
    """Rename, an older folder of that name out of the way first (a folder that is not empty cannot be renamed over)."""
    if not target.exists():
        os.rename(source, target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, retired / "head")
    os.rename(source, target)
    shutil.rmtree(retired, ignore_errors=True)
