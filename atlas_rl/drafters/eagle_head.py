"""The EAGLE-3 layer: one decoder layer that reads three of the policy's layers and its own guesses (arXiv 2503.01840).

    f_t = fc(concat(low, middle, high)_t)
    a_t = f_t + Attention(concat(input_norm(embed(token t + 1)), hidden_norm(f_t)))
    o_t = a_t + MLP(post_norm(a_t)),    logits of token t + 2 = head(norm(o_t))

The next step of a draft reads o_t, before the norm, in the place of f, and the guessed token. Layer, names and order of the
tensors are those of SpecForge (`specforge/modeling/draft/llama3_eagle.py`), vLLM and SGLang (`llama_eagle3.py` of either).

Shapes as in `heads`; H query heads, J key and value heads, d head size, G = H / J.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from atlas_rl.drafters.heads import DraftHead, Windows

NUM_TAPS = 3
SUPPORTED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of a call."""


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose outputs EAGLE-3 reads: one low, one in the middle, one high; the last ones of a small policy."""
    if num_layers < 7:
        return tuple(range(max(0, num_layers - NUM_TAPS), num_layers))
    return 1, num_layers // 2 - 1, num_layers - 4


class EagleLayer(nn.Module):
    """The decoder layer; what stands between `project` and `finish` is the caller's attention."""

    def __init__(
        self, size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate: int, eps: float
    ) -> None:
        super().__init__()
        attention, mlp = nn.Module(), nn.Module()
        attention.q_proj = nn.Linear(2 * size, num_heads * head_dim, bias=False)
        attention.k_proj = nn.Linear(2 * size, num_kv_heads * head_dim, bias=False)
        attention.v_proj = nn.Linear(2 * size, num_kv_heads * head_dim, bias=False)
        attention.o_proj = nn.Linear(num_heads * head_dim, size, bias=False)
        mlp.gate_proj = nn.Linear(size, intermediate, bias=False)
        mlp.up_proj = nn.Linear(size, intermediate, bias=False)
        mlp.down_proj = nn.Linear(intermediate, size, bias=False)
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)

    def project(
        self, embeds: torch.Tensor, states: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries […, H, d], keys and values […, J, d], not yet rotated."""
        both = torch.cat([self.input_layernorm(embeds), self.hidden_norm(states)], dim=-1)
        attention = self.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (projection(both).unflatten(-1, (-1, head_dim)) for projection in projections)
        return query, key, value

    def finish(self, residual: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What follows attention, from its output […, H * d]."""
        attended = residual + self.self_attn.o_proj(mixed)
        x, mlp = self.post_attention_layernorm(attended), self.mlp
        return attended + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


class EagleHead(DraftHead):
    """
    Args:
        layers: decoder layers (from 0) whose outputs it reads; None: `default_layers` of the policy, once it is known.
        rope_parameters: as in transformers' configs. norm_before_residual: the residual is hidden_norm(f), not f.
        draft_vocab_size: of an output head of its own; None: the policy's, live.
        own_embedding: it has token embeddings of its own; most do not.
    """

    kind: ClassVar[str] = "eagle"

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        layers: Sequence[int] | None = None,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 2048,
        norm_before_residual: bool = False,
        draft_vocab_size: int | None = None,
        own_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.intermediate_size, self.rms_norm_eps = intermediate_size, rms_norm_eps
        self.layers = None if layers is None else tuple(layers)
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.norm_before_residual = norm_before_residual
        self.fc = nn.Linear((NUM_TAPS if layers is None else len(self.layers)) * hidden_size, hidden_size, bias=False)
        self.midlayer = EagleLayer(hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, rms_norm_eps)
        self.norm = nn.RMSNorm(hidden_size, rms_norm_eps)
        self.lm_head = None if draft_vocab_size is None else nn.Linear(hidden_size, draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size) if own_embedding else None
        # the token that each column of its own head stands for; checkpoints hold the offset from the column
        draft_ids = None if draft_vocab_size is None else torch.arange(draft_vocab_size)
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        rope = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=self.rope_parameters,
        )
        self.rotary = (
            LlamaRotaryEmbedding(rope),
        )  # a tuple: its frequencies stay float32 whatever the head is cast to

    @classmethod
    def for_policy(cls, config: PretrainedConfig, layers: Sequence[int] | None = None, **options: Any) -> EagleHead:
        """A fresh head of the shape of one of a policy's layers: its heads, rotary embedding and MLP."""
        text = config.get_text_config(decoder=True)
        num_heads = text.num_attention_heads
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in SUPPORTED_ROPES or "rope_theta" not in rope:
            rope = None  # one per layer type, or none at all
        shape = {
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "num_heads": num_heads,
            "num_kv_heads": getattr(text, "num_key_value_heads", None) or num_heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // num_heads,
            "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
            "rope_parameters": rope and dict(rope),
            "max_position_embeddings": getattr(text, "max_position_embeddings", 2048),
        }
        return cls(layers=layers or default_layers(text.num_hidden_layers), **shape | options)

    def config_dict(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "layers": None if self.layers is None else list(self.layers),
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope_parameters,
            "max_position_embeddings": self.max_position_embeddings,
            "norm_before_residual": self.norm_before_residual,
            "draft_vocab_size": None if self.lm_head is None else self.lm_head.out_features,
            "own_embedding": self.embed_tokens is not None,
        }

    def rotations(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [*positions, d]."""
        return self.rotary[0](torch.empty(0, dtype=dtype, device=positions.device), positions)

    def residual(self, states: torch.Tensor) -> torch.Tensor:
        return self.midlayer.hidden_norm(states) if self.norm_before_residual else states

    def unroll(self, windows: Windows, depth: int, embedding_VD: torch.Tensor) -> torch.Tensor:
        """Training-time test: step k of every start at once. Its query sees the features' keys up to the start, and of the
        later steps, which read its own guesses, its own keys only. A window's padding comes last: no start before it sees it."""
        num_starts = windows.width - depth
        dtype = self.fc.weight.dtype
        embedding_VD = embedding_VD if self.embed_tokens is None else self.embed_tokens.weight
        positions_BS = windows.positions_B[:, None] + torch.arange(num_starts, device=windows.positions_B.device)
        states = self.fc(windows.tapped_BWLD[:, :num_starts].flatten(2).to(dtype)).to(dtype)  # also under autocast
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        outputs = []
        for step in range(depth):
            tokens_BS = windows.token_ids_BW[:, step + 1 : step + 1 + num_starts]
            embeds = F.embedding(tokens_BS, embedding_VD).to(dtype)
            query, key, value = self.midlayer.project(embeds, states, self.head_dim)
            cos, sin = (x[:, :, None] for x in self.rotations(positions_BS + step, dtype))
            keys.append(rotate(key, cos, sin))
            values.append(value)
            mixed = attend_unrolled(rotate(query, cos, sin), keys, values)
            states = self.midlayer.finish(self.residual(states), mixed)
            outputs.append(self.norm(states))
        return torch.stack(outputs, dim=2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of […, d]; both halves of cos and sin hold the same."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def attend_unrolled(
    query_BSHd: torch.Tensor, keys_BSJd: list[torch.Tensor], values_BSJd: list[torch.Tensor]
) -> torch.Tensor:
    """Attention of one step's queries over the first step's keys, causally, and the later steps' at the same start only."""
    num_kv_heads, head_dim = keys_BSJd[0].shape[2:]
    query = query_BSHd.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, J, G, S, d]
    keys, values = ([x.permute(0, 2, 1, 3)[:, :, None] for x in xs] for xs in (keys_BSJd, values_BSJd))
    num_starts = query.shape[3]
    later = torch.ones(num_starts, num_starts, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ keys[0].transpose(-1, -2)).masked_fill(later, -torch.inf)
    own = [(query * key).sum(-1, keepdim=True) for key in keys[1:]]
    scores = torch.cat([scores, *own], dim=-1) * head_dim**-0.5
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    mixed = weights[..., :num_starts] @ values[0]
    for step, value in enumerate(values[1:]):
        mixed = mixed + weights[..., num_starts + step, None] * value
    return mixed.permute(0, 3, 1, 2, 4).flatten(2)
