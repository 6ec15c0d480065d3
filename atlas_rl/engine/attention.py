"""The attention function that the policy's twin runs with, registered with transformers under the name `atlas`.

It writes the new keys and values into the paged cache and attends over each row's block table. The batch arrives as the keyword
`atlas` of the model call, which transformers hands down to every attention layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

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
    layer = module.layer_idx
    atlas.kv_cache.store(layer, atlas.token_places, key_1HND[0].transpose(0, 1), value_1HND[0].transpose(0, 1))
    keys_RHSD, values_RHSD = atlas.kv_cache.gather(layer, atlas.piece_places, atlas.num_rows)
    query_RQHD = atlas.pad_queries(query_1HND[0].transpose(0, 1)).to(keys_RHSD.dtype)
    mask = atlas.mask(sliding_window, keys_RHSD.dtype, query_RQHD.shape[2] // keys_RHSD.shape[1])
    scaling = scaling if scaling is not None else query_RQHD.shape[-1] ** -0.5
    output_RQHD = _attend(query_RQHD, keys_RHSD, values_RHSD, mask, scaling, softcap)
    return atlas.unpad(output_RQHD).unsqueeze(0).contiguous(), None  # some modules call `view` on it


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


AttentionInterface.register(NAME, atlas_attention)
