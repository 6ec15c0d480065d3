"""Building the policy's twin, and finding out whether it computes what the model computes.

What the engine runs is a fresh module of the model's class that holds the model's tensors. That is right only where the class and
the config say all there is about the model, and where attention goes through transformers' interface with nothing that our
function does not know. Both are checked, the second one by a small forward: a model that fails goes to the original `generate`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from atlas_rl.engine import attention
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache, KVShape

PROBE_LEN = 24
PROBE_WINDOW = 8
"""Sliding windows are cut to this in the probe, so that a window which only the mask knows of shows."""
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of logits, as a share of the largest logit (transformers' eager softmax is float32 even in float64)."""


class UnsupportedModel(ValueError):
    """The engine cannot run this model exactly; the message is the reason, in a few words."""


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """What can be told without building anything, or None."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    if model.get_output_embeddings() is None:
        return f"{type(model).__name__} has no language-model head"
    if getattr(config, "kv_lora_rank", None):
        return "it has multi-head latent attention"
    # transformers before 5.21 leave the cap out there, and train another model than the config describes
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        return "sdpa leaves out the soft-cap of its attention: load it with attn_implementation='eager'"
    # of other types, the frequencies may follow the longest position of a call, and a call of ours holds rows of all lengths
    if ropes := _rope_types(config) - {"default", "linear", "llama3", "yarn"}:
        return f"its rotary embedding is of type {', '.join(sorted(ropes))}"
    if len({p.device for p in model.parameters()}) > 1:
        return "its parameters lie on several devices"
    return None


def build_twin(model: PreTrainedModel, attn_implementation: str, sliding_window: int | None = None) -> PreTrainedModel:
    """A fresh module of the same class, in eval mode, without hooks, holding the very tensors of `model`.

    The config is a deep copy: a shared one would switch the trainer's attention.

    Raises:
        UnsupportedModel: class and config do not describe the model (adapters, pruned layers, parametrised weights).
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = attn_implementation
    text_config = config.get_text_config(decoder=True)
    if sliding_window is not None and getattr(text_config, "sliding_window", None):
        text_config.sliding_window = sliding_window
    twin = blank_model(type(model), config)
    adopt(twin, dict(model.named_modules()))
    return twin.eval()


def blank_model(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of this class on the meta device: structure without memory."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind(config)
    except TypeError as error:
        raise UnsupportedModel(f"{kind.__name__} is not built from its config alone ({error})") from None


def adopt(
    blank: PreTrainedModel, sources: Mapping[str, nn.Module], kind_of: Callable[[nn.Module], type] = type
) -> None:
    """Give a blank model the tensors of modules that stand for its own, by name.

    Args:
        kind_of: what a source counts as, where its class is a variant of what the config describes.
    """
    ours = dict(blank.named_modules())
    for name in sorted(sources.keys() | ours.keys()):
        if not _same_kind(sources.get(name), ours.get(name), kind_of):
            raise UnsupportedModel(f"its module {name or 'itself'} is not what its config describes (an adapter?)")
    for name, module in ours.items():
        source = sources[name]
        module._parameters.update(source._parameters)
        module._buffers.update(source._buffers)
        for key, value in list(
            vars(module).items()
        ):  # a rotary embedding keeps its original frequencies as a plain attribute
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, key, getattr(source, key))
    assert not any(t.is_meta for t in [*blank.parameters(), *blank.buffers()])


@torch.inference_mode()
def probe_mismatch(model: PreTrainedModel, autocast: Callable[[], contextlib.AbstractContextManager]) -> str | None:
    """Compare the twin with one that runs transformers' own attention, over a few tokens in two chunks; None if they agree.

    With that one's forward over all tokens, as a trainer calls it, and over two chunks with a cache, as `generate` does: a few
    models see a sliding window only in the cache.
    """
    weight = model.get_input_embeddings().weight
    ids_N = torch.tensor(probe_ids(weight.shape[0]), device=weight.device)
    try:
        twin = build_twin(model, attention.NAME, PROBE_WINDOW)
        reference = build_twin(model, "eager", PROBE_WINDOW)
        with autocast():
            forward_NV = reference(ids_N[None], use_cache=False).logits[0]
            first = reference(ids_N[None, : PROBE_LEN // 2], use_cache=True)
            second = reference(ids_N[None, PROBE_LEN // 2 :], past_key_values=first.past_key_values)
            generate_NV = torch.cat([first.logits, second.logits], dim=1)[0]
            hidden = torch.cat([run_twin(twin, batch) for batch in probe_batches(model, forward_NV.dtype)])
            logits_NV = scale_logits(twin.get_output_embeddings()(hidden), model.config)
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever an architecture does that ours cannot: the original `generate` serves it
        (what,) = f"{type(error).__name__}: {error}".splitlines()[:1]
        return f"{type(model).__name__} does not run on Atlas' attention ({what})"
    for expected_NV, whose in ((forward_NV, "its forward"), (generate_NV, "its forward over a cache")):
        error = (logits_NV - expected_NV).abs().max() / expected_NV.abs().max()
        if not error <= PROBE_TOLERANCE[expected_NV.dtype] and expected_NV.isfinite().all():
            difference = f"a relative difference of {float(error):.1e} to {whose}"
            return f"{type(model).__name__} computes other logits on Atlas' attention ({difference})"
    return None


def probe_ids(vocab_size: int) -> list[int]:
    return [i * 7919 % vocab_size for i in range(PROBE_LEN)]


def probe_batches(model: PreTrainedModel, dtype: torch.dtype) -> list[ForwardBatch]:
    """The probe's tokens in two chunks over one cache."""
    weight, half = model.get_input_embeddings().weight, PROBE_LEN // 2
    cache = KVCache(kv_shape(model, dtype, block_size=PROBE_WINDOW), PROBE_LEN, weight.device)
    ids, table = probe_ids(weight.shape[0]), list(range(PROBE_LEN // PROBE_WINDOW))
    return [ForwardBatch.build(cache, [ids[start : start + half]], [start], [table]) for start in (0, half)]


def run_twin(twin: PreTrainedModel, batch: ForwardBatch) -> torch.Tensor:
    """Last hidden states [N, D], after the final norm."""
    output = twin.base_model(
        input_ids=batch.input_ids_N[None], position_ids=batch.positions_N[None], use_cache=False, atlas=batch
    )
    return output.last_hidden_state[0]


def decoder_layers(twin: PreTrainedModel) -> nn.ModuleList:
    """A twin's layers, whatever its architecture calls them."""
    num_layers = twin.config.get_text_config(decoder=True).num_hidden_layers
    for module in twin.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"{type(twin).__name__} has no list of {num_layers} layers: drafters that read hidden states cannot be used"
    )


def kv_shape(model: PreTrainedModel, dtype: torch.dtype, block_size: int) -> KVShape:
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    one_for_all = getattr(config, "multi_query", False)  # GPT-BigCode's name for a single KV head
    return KVShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=1 if one_for_all else getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        dtype=dtype,
        block_size=block_size,
    )


def scale_logits(logits: torch.Tensor, config) -> torch.Tensor:
    """Logit scalings of Cohere, Granite, Falcon-H1 and Gemma, as in their `forward`."""
    config = config.get_text_config(decoder=True)
    for factor in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, factor, None):
            logits = logits * getattr(config, factor)
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    return logits if not softcap else torch.tanh(logits / softcap) * softcap


def _same_kind(source: nn.Module | None, ours: nn.Module | None, kind_of: Callable[[nn.Module], type]) -> bool:
    return (
        source is not None
        and ours is not None
        and kind_of(source) is type(ours)
        and source._parameters.keys() == ours._parameters.keys()
        and source._buffers.keys() == ours._buffers.keys()
    )


def _rope_types(config) -> set[str]:
    """Of all its rotary embeddings: `rope_parameters` is one description, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    described = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return {p.get("rope_type", "default") for p in described}
