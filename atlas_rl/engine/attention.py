"""The attention function that the policy's twin runs with, registered with transformers under the name `atlas`.

It writes the new keys and values into the paged cache and attends over each row's block table. The batch arrives as the keyword
`atlas` of the model call, which transformers hands down to every attention layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from atlas_kernels import cpu, paged_attention, store_kv
from atlas_rl.engine.batch import ForwardBatch

NAME = "atlas"
HARMLESS = frozenset(
    {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "layer_type"}
)
"""Keywords that modules pass on and that change nothing here."""
MIN_BATCHED_ROWS = 4
MAX_SMALL_QUERY = 32
"""From this many rows on, up to this many queries per KV head, two batched products beat the fused kernel in float32 on CPU
(about twofold)."""


def atlas_attention(
    module: torch.nn.Module,
    query_1HND: torch.Tensor,
    key_1HND: torch.Tensor,
    value_1HND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    atlas: ForwardBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling * Q K^T [soft-capped] + mask) V over the row's own KV. Returns [1, N, H, D].

    A keyword that is not known here (attention sinks, position biases) would be ignored at the price of wrong tokens: it raises.
    """
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in HARMLESS)
    if unknown or attention_mask is not None or dropout:
        raise NotImplementedError(f"its attention takes {', '.join(unknown) or 'a mask or dropout'}")
    query_NHD, key_NHD, value_NHD = (x[0].transpose(0, 1) for x in (query_1HND, key_1HND, value_1HND))
    if atlas.takes_kernels:
        store_kv(key_NHD, value_NHD, atlas.slots_N, atlas.kv_cache.layers[module.layer_idx])
    elif uses_cpu_kernels(atlas) and key_NHD.dtype == torch.float32:
        cpu.store_kv(key_NHD, value_NHD, atlas.slots_N, atlas.kv_cache.layers[module.layer_idx])
    else:
        atlas.kv_cache.store(module.layer_idx, atlas.token_places, key_NHD, value_NHD)
    scaling = scaling if scaling is not None else query_NHD.shape[-1] ** -0.5
    return attend(atlas, module.layer_idx, query_NHD, scaling, sliding_window, softcap).unsqueeze(0), None


def uses_cpu_kernels(batch: ForwardBatch) -> bool:
    """Whether the compiled CPU kernels take this batch's cache."""
    shape = batch.kv_cache.shape
    on_cpu = batch.positions_N.device.type == "cpu" and shape.dtype == torch.float32
    return on_cpu and cpu.supports(shape.head_dim) and cpu.unavailable_reason() is None


def attend(
    batch: ForwardBatch,
    layer: int,
    query_NHD: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a batch's tokens, whose keys and values are stored, over each row's own. Returns [N, H, D]."""
    kv_cache = batch.kv_cache
    if batch.takes_kernels:
        rows = (batch.block_tables_RM, batch.starts_R, batch.query_lens_R)
        shared = batch.shared if sliding_window is None else None  # a window moves through what is shared
        places = {"query_starts_R": batch.query_starts_R, "max_query_len": batch.max_query_len, "shared": shared}
        return paged_attention(query_NHD, kv_cache.layers[layer], *rows, scaling, sliding_window, softcap, **places)
    if query_NHD.dtype == torch.float32 and uses_cpu_kernels(batch):  # at any length faster than a gather and products
        rows = (batch.block_tables_RM, batch.starts_R, batch.query_lens_R)
        return cpu.paged_attention(query_NHD, kv_cache.layers[layer], *rows, scaling, sliding_window, softcap)
    keys_RHSD, values_RHSD = kv_cache.gather(layer, batch.piece_places, batch.num_rows)
    query_RQHD = batch.pad_queries(query_NHD).to(keys_RHSD.dtype)
    mask = batch.mask(sliding_window, keys_RHSD.dtype, query_RQHD.shape[2] // keys_RHSD.shape[1])
    output_NHD = batch.unpad(_attend(query_RQHD, keys_RHSD, values_RHSD, mask, scaling, softcap))
    return output_NHD.contiguous()  # some modules call `view` on it


def _attend(
    query_RQHD: torch.Tensor,
    keys_RHSD: torch.Tensor,
    values_RHSD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """The query heads that share a KV head are stacked along Q (as `mask` is), so that keys and values are never repeated."""
    num_rows, query_len, num_heads, head_dim = query_RQHD.shape
    num_kv_heads = keys_RHSD.shape[1]
    groups = num_heads // num_kv_heads
    query = query_RQHD.view(num_rows, query_len, num_kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(num_rows, num_kv_heads, groups * query_len, head_dim)
    fused = num_rows < MIN_BATCHED_ROWS or groups * query_len > MAX_SMALL_QUERY or query.dtype.itemsize < 4
    if softcap is None and fused:
        output = F.scaled_dot_product_attention(query, keys_RHSD, values_RHSD, attn_mask=mask, scale=scaling)
    else:
        scores = torch.matmul(query.mul_(scaling), keys_RHSD.transpose(-1, -2))
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        weights = scores.add_(mask).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
        output = torch.matmul(weights.to(query.dtype), values_RHSD)
    output = output.view(num_rows, num_kv_heads, groups, query_len, head_dim).permute(0, 3, 1, 2, 4)
    return output.reshape(num_rows, query_len, num_heads, head_dim)


def keep_out_of_compiled_layers() -> None:
    """From now on a compiled layer calls our function as it is."""
    AttentionInterface.register(NAME, torch.compiler.disable(atlas_attention))


AttentionInterface.register(NAME, atlas_attention)
