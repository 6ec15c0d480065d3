"""A light recurrent head: it reads the policy's hidden states once, and then one token's embedding per guess. No KV cache.

    h = fc([RMSNorm_i(feature_i)])                                    the tapped layers' outputs and the last hidden state
    h = h + down(silu(gate) * up)                                     gate, up = W_state RMSNorm(h) + W_token RMSNorm(embedding)
    logits = output head of RMSNorm(h)

The part of gate and up that reads the token depends on nothing else: it is computed once per token of a window, and a drafter
may keep it per token id.

Shapes: N rows, D hidden size, I intermediate size; L tapped layers; B, W, S, K as in `heads`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from atlas_rl.drafters.heads import DraftHead, Windows
from atlas_rl.engine.policy_view import PolicyView


class RecurrentHead(DraftHead):
    kind: ClassVar[str] = "recurrent"

    def __init__(self, *, hidden_size: int, layers: Iterable[int], intermediate_size: int | None = None) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or hidden_size
        num_features = len(self.layers) + 1
        self.feature_norms = nn.ModuleList(_norm(hidden_size) for _ in range(num_features))
        self.fc = nn.Linear(num_features * hidden_size, hidden_size, bias=False)
        self.state_norm = _norm(hidden_size)
        self.token_norm = _norm(hidden_size)
        self.state_gate_up = nn.Linear(hidden_size, 2 * self.intermediate_size, bias=False)
        self.token_gate_up = nn.Linear(hidden_size, 2 * self.intermediate_size, bias=False)
        self.down = nn.Linear(self.intermediate_size, hidden_size, bias=False)
        self.out_norm = _norm(hidden_size)

    @classmethod
    def for_policy(cls, view: PolicyView, *, layers: Iterable[int] | None = None, **options: Any) -> RecurrentHead:
        """A fresh head for this policy: random weights, its final norm, two layers from its first half if none are named."""
        layers = sorted({view.num_layers // 4, view.num_layers // 2}) if layers is None else layers
        head = cls(hidden_size=view.hidden_size, layers=layers, **options)
        norm = getattr(view.twin.base_model, "norm", None)
        if norm is not None:  # what it gives for ones is its scale, whether it keeps that as weight or as 1 + weight
            with torch.no_grad():
                head.out_norm.weight.copy_(norm(torch.ones_like(norm.weight)[None])[0])
        return head.to(view.device)

    def config_dict(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "layers": list(self.layers),
            "intermediate_size": self.intermediate_size,
        }

    def start(self, tapped_NLD: torch.Tensor, hidden_ND: torch.Tensor) -> torch.Tensor:
        """States [N, D] (any leading dimensions) that have read the policy's features."""
        features = [*tapped_NLD.unbind(-2), hidden_ND]
        normed = [norm(x.to(norm.weight.dtype)) for norm, x in zip(self.feature_norms, features, strict=True)]
        return self.fc(torch.cat(normed, dim=-1)).to(self.fc.weight.dtype)  # states keep their precision under autocast

    def step(self, states_ND: torch.Tensor, embeddings_ND: torch.Tensor) -> torch.Tensor:
        """States after one more token each."""
        return self.advance(states_ND, self.read(embeddings_ND))

    def read(self, embeddings_ND: torch.Tensor) -> torch.Tensor:
        """What a token adds to gate and up, [N, 2 I]: a function of its embedding alone."""
        return self.token_gate_up(self.token_norm(embeddings_ND.to(self.token_norm.weight.dtype)))

    def advance(self, states_ND: torch.Tensor, read_NI: torch.Tensor) -> torch.Tensor:
        """States after the tokens that were read."""
        gate, up = (self.state_gate_up(self.state_norm(states_ND)) + read_NI).chunk(2, dim=-1)
        return states_ND + self.down(F.silu(gate) * up)

    def output(self, states_ND: torch.Tensor) -> torch.Tensor:
        """States as the policy's output head takes them."""
        return self.out_norm(states_ND)

    def unroll(self, windows: Windows, depth: int, embedding_VD: torch.Tensor) -> torch.Tensor:
        num_starts = windows.width - depth
        read_BWI = self.read(F.embedding(windows.token_ids_BW[:, 1 : windows.width], embedding_VD))
        state_BSD = self.start(windows.tapped_BWLD[:, :num_starts], windows.hidden_BWD[:, :num_starts])
        outputs = []
        for k in range(depth):
            state_BSD = self.advance(state_BSD, read_BWI[:, k : k + num_starts])
            outputs.append(self.output(state_BSD))
        return torch.stack(outputs, dim=2)


def _norm(size: int) -> nn.RMSNorm:
    return nn.RMSNorm(size, eps=1e-6)
