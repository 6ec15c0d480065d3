"""What a call of `model.generate` asks for, in the engine's terms, or the reason why only the original can do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from atlas_rl.types import Rollout, SamplingParams

HANDLED_OPTIONS = frozenset(
    "max_new_tokens max_length min_new_tokens min_length do_sample temperature top_k top_p min_p repetition_penalty "
    "num_return_sequences eos_token_id pad_token_id return_dict_in_generate".split()
)
INERT_OPTIONS = frozenset(
    # how to cache and compile, which the engine decides; what only matters to beams or an assistant; bookkeeping
    "use_cache cache_implementation cache_config max_cache_len disable_compile compile_config prefill_chunk_size "
    "continuous_batching_config low_memory early_stopping length_penalty num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind max_matching_ngram_size is_assistant "
    "bos_token_id decoder_start_token_id transformers_version _from_model_config renormalize_logits".split()
)

CALL_OPTIONS = frozenset({"synced_gpus"})
"""Arguments of the call that change nothing here: no rank waits for another one while it decodes."""


class Unsupported(Exception):
    """The engine cannot serve this call exactly; the message says why, in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    prompts: list[tuple[int, ...]]
    """One per completion: a row is repeated for each of its return sequences."""
    sampling: SamplingParams
    input_ids: torch.Tensor
    """[rows, width] as the caller gave them, repeated likewise."""
    pad_token_id: int
    return_dict: bool

    def to_output(self, rollouts: list[Rollout]) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Caller's prompt ids, then completions padded on the right: [rows, width + longest completion]."""
        longest = max(len(rollout.token_ids) for rollout in rollouts)
        padded = [r.token_ids + [self.pad_token_id] * (longest - len(r.token_ids)) for r in rollouts]
        completions = torch.tensor(padded, dtype=self.input_ids.dtype, device=self.input_ids.device)
        sequences = torch.cat([self.input_ids, completions], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if self.return_dict else sequences


def plan_generation(
    model: PreTrainedModel,
    inputs: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> GenerationPlan:
    """Read a `generate` call as transformers would.

    Raises:
        Unsupported: with the reason, when the call has to go to the original `generate`.
        ValueError: a row holds no token at all.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in CALL_OPTIONS}
    explicit_length = any(
        source is not None
        for source in (
            kwargs.get("max_length"),
            generation_config and generation_config.max_length,
            model.generation_config.max_length,
        )
    )
    for name in ("logits_processor", "stopping_criteria"):
        if name in kwargs and not kwargs[name]:  # None, or an empty list
            del kwargs[name]
    config, model_kwargs = model._prepare_generation_config(generation_config, **kwargs)
    input_ids = inputs if inputs is not None else model_kwargs.pop("input_ids", None)
    attention_mask = model_kwargs.pop("attention_mask", None)
    if not (isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2):
        raise Unsupported("input_ids is not a tensor of two dimensions")
    given = sorted(name for name, value in model_kwargs.items() if value is not None)
    if given:
        raise Unsupported(f"it is called with {', '.join(given)}")
    _check_options(config)

    eos_ids = token_ids(config.eos_token_id)
    pad_id = config.pad_token_id if config.pad_token_id is not None else (eos_ids[0] if eos_ids else None)
    if pad_id is None:
        raise Unsupported("neither pad_token_id nor eos_token_id is set")
    prompts = unpadded(input_ids, attention_mask, config.pad_token_id, eos_ids)
    copies = config.num_return_sequences
    return GenerationPlan(
        prompts=[prompt for prompt in prompts for _ in range(copies)],
        sampling=_sampling_params(config, input_ids.shape[1], eos_ids, explicit_length),
        input_ids=input_ids.repeat_interleave(copies, dim=0) if copies > 1 else input_ids,
        pad_token_id=int(pad_id),
        return_dict=bool(config.return_dict_in_generate),
    )


def sampling_params(model: PreTrainedModel, generation_config: GenerationConfig) -> SamplingParams:
    """How `model.generate` would sample under a config that says how many new tokens there may be.

    Raises:
        Unsupported: as `plan_generation`.
    """
    config, _ = model._prepare_generation_config(generation_config)
    _check_options(config)
    return _sampling_params(config, 0, token_ids(config.eos_token_id), explicit_length=True)


def _check_options(config: GenerationConfig) -> None:
    """Anything set that the engine neither honours nor may ignore is a reason to step aside; that covers options to come."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in config.to_dict().items():
        if name in HANDLED_OPTIONS or name in INERT_OPTIONS:
            continue
        if value not in (None, False, defaults.get(name)):
            raise Unsupported(f"generation option {name}")
    if not config.do_sample and config.num_return_sequences > 1:
        raise Unsupported("several greedy return sequences")
    if config.do_sample and not config.temperature:
        raise Unsupported("sampling at temperature 0")


def _sampling_params(
    config: GenerationConfig, width: int, eos_ids: tuple[int, ...], explicit_length: bool
) -> SamplingParams:
    if config.max_new_tokens is not None:
        max_new = config.max_new_tokens
    else:
        max_new = config.max_length - width if explicit_length else config.max_length
    if max_new < 1:
        raise Unsupported("max_length leaves no room for a new token")
    min_new = config.min_new_tokens if config.min_new_tokens is not None else max(0, (config.min_length or 0) - width)
    filters = {}
    if config.do_sample:
        filters = {
            "temperature": float(config.temperature),
            "top_k": config.top_k or 0,
            "top_p": config.top_p if config.top_p is not None else 1.0,
            "min_p": config.min_p or 0.0,
        }
    try:
        return SamplingParams(
            **({"temperature": 0.0} | filters),
            repetition_penalty=config.repetition_penalty or 1.0,
            max_new_tokens=max_new,
            min_new_tokens=min(min_new, max_new),
            eos_token_ids=eos_ids,
        )
    except ValueError as error:  # transformers has its own word on such values
        raise Unsupported(str(error)) from None


def token_ids(value: int | list[int] | torch.Tensor | None) -> tuple[int, ...]:
    """The ids of an `eos_token_id` in any of transformers' forms."""
    if value is None:
        return ()
    return tuple(torch.as_tensor(value).flatten().tolist())


def unpadded(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None, eos_ids: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Each row without its left padding.

    Raises:
        Unsupported: it is padded elsewhere. ValueError: a row holds no token at all.
    """
    if attention_mask is None:
        # transformers' own rule: padding is read off the ids only where pad cannot be mistaken for EOS
        inferable = pad_token_id is not None and pad_token_id not in eos_ids
        attention_mask = input_ids.ne(pad_token_id) if inferable else torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise Unsupported("the attention mask has another shape than the prompts")
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1)
    if not mask.any(1).all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"prompt {row} is empty: its attention mask has no 1. Give it at least one token, for instance BOS"
        )
    width = mask.shape[1]
    if not torch.equal(mask, torch.arange(width) >= (width - lengths)[:, None]):
        raise Unsupported("prompts are not padded on the left")
    return [tuple(row[width - n :]) for row, n in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
