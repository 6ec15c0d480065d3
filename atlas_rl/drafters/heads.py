"""What the trainable drafters have in common: a small module that goes on from the policy's hidden states, and the windows of
rollouts that it learns from.

Shapes: B windows, W positions of a window, S = W - K starts, K depths of a draft, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Pieces of rollouts. Position w of a window holds what the policy computed from token w and all before it.

    A draft that starts at position s reads the features there and the tokens s + 1, …, s + K, and guesses the tokens s + 2, …,
    s + K + 1, which the policy draws from its hidden states at s + 1, …, s + K.
    """

    token_ids_BW: torch.Tensor
    """[B, W + 1] int64: one more token than there are features."""
    hidden_BWD: torch.Tensor
    """Last hidden states, after the policy's final norm."""
    tapped_BWLD: torch.Tensor
    """Outputs of the L decoder layers that the head reads, in its order; L may be 0."""
    positions_B: torch.Tensor
    """Of each window's first token in its sequence, the prompt included."""
    prompt_lens_B: torch.Tensor
    seeds_B: torch.Tensor
    """Noise seed of each window's completion (int64)."""
    lens_B: torch.Tensor
    """Positions of each window that hold features; the rest is padding."""

    def __len__(self) -> int:
        return len(self.token_ids_BW)

    @property
    def width(self) -> int:
        return self.hidden_BWD.shape[1]

    def rows(self, index: torch.Tensor | slice) -> Windows:
        """Some of the windows."""
        return Windows(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def is_complete(self, depth: int) -> torch.Tensor:
        """[B, S, K] which guesses of drafts of this depth, from every start, have a target and are tokens of the completion."""
        device = self.lens_B.device
        starts = torch.arange(self.width - depth, device=device)[:, None]
        target = starts + torch.arange(
            1, depth + 1, device=device
        )  # [S, K] position whose hidden state draws the guessed token
        in_window = target < self.lens_B[:, None, None]
        return in_window & (self.positions_B[:, None, None] + target + 1 >= self.prompt_lens_B[:, None, None])


class DraftHead(nn.Module):
    """The weights of a drafter. Embeddings and output head are the policy's, live, and never trained here."""

    kind: ClassVar[str]
    layers: tuple[int, ...]
    """Decoder layers (from 0) of the policy whose outputs it reads."""

    @property
    def is_finite(self) -> bool:
        """Whether all weights are: a sum is finite only where its terms are, and takes a fifth of the time."""
        return bool(torch.stack([p.detach().sum() for p in self.parameters()]).isfinite().all())

    @abstractmethod
    def unroll(self, windows: Windows, depth: int, embedding_VD: torch.Tensor) -> torch.Tensor:
        """States [B, S, K, D], ready for the output head, of drafts of `depth` tokens from every start: the k-th has read the
        features at the start and the k tokens after it, as they were, not as it would have guessed them."""

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """What `type(self)(**config_dict)` builds the same module from."""
