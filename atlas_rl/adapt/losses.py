"""What a draft head is trained on: the acceptance of its guesses.

A guess is accepted with probability alpha = sum_v min(p_v, q_v) = 1 - TV(p, q) at best, p the policy's distribution and q the
drafter's. Its gradient is weak where p and q are far apart, that of KL(p‖q) is strong there but goes on fitting what is never
accepted. The LK hybrid (arXiv 2602.23881) goes from the one to the other as guesses become right:

    loss = lambda KL(p‖q) + (1 - lambda) TV(p, q),      lambda = exp(-3 alpha), held constant

Shapes: B, W, S, K, D as in `drafters.heads`, V vocabulary of the drafter, F of the policy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import atlas_kernels
from atlas_rl.drafters.heads import DraftHead, Windows
from atlas_rl.engine.twin import scale_logits

DEPTH_DECAY = 0.8
"""Weight of a depth over the one before it: a guess counts only where all before it were right."""
LAMBDA_DECAY = 3.0
MAX_LOGITS = {"cpu": 2**18, "cuda": 2**26}
"""Made at once (one window's at least), by kind of device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEnds:
    """The policy's embedding and output head as constants, through which gradients flow: packed products give none."""

    embedding_VD: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    config: Any

    @classmethod
    def of(cls, model: PreTrainedModel) -> PolicyEnds:
        """Live: they share the model's memory (unless it was made under inference mode, which autograd does not take)."""
        head = model.get_output_embeddings()

        def constant(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone() if tensor.is_inference() else tensor.detach()

        return cls(
            embedding_VD=constant(model.get_input_embeddings().weight),
            weight_VD=constant(head.weight),
            bias_V=None if getattr(head, "bias", None) is None else constant(head.bias),
            config=model.config,
        )

    def logits(self, states: torch.Tensor, vocab_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 (or 64) logits of states [..., D], over all tokens or those of a draft vocabulary."""
        weight_VD, bias_V = self.weight_VD, self.bias_V
        if vocab_ids is not None:
            weight_VD, bias_V = weight_VD[vocab_ids], None if bias_V is None else bias_V[vocab_ids]
        logits = scale_logits(F.linear(states.to(weight_VD.dtype), weight_VD, bias_V), self.config)
        return logits if logits.dtype == torch.float64 else logits.float()


def low_precision(device: torch.device) -> AbstractContextManager:
    """To train a head under: bf16 products where the machine has them, which halves the time of a step and costs nothing in
    acceptance. States and norms stay in float32."""
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16) if has_bf16 else nullcontext()


def lk_hybrid(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, vocab_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [...] and acceptance [...] of guesses; the loss has gradients to the draft logits alone, the acceptance none.

    Args:
        draft_logits: [..., V]. target_logits: [..., F]; F = V without a draft vocabulary.
        vocab_ids: [V] the policy's id of each token of the draft vocabulary. KL then fits q to p as it is within the vocabulary,
            and what p has outside counts as not accepted.
    """
    return _Hybrid.apply(draft_logits, target_logits, vocab_ids)


def unrolled_loss(
    head: DraftHead,
    windows: Windows,
    depth: int,
    ends: PolicyEnds,
    *,
    temperature: float = 1.0,
    vocab_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch of windows, and its acceptance by depth [K] (NaN where no draft is as long).

    Logits, and the gradients through them, are made a few windows at a time: all at once they would take the most memory by far,
    and more time, as they would not stay in a CPU's caches.
    """
    states_BSKD = head.unroll(windows, depth, ends.embedding_VD)
    complete_BSK = windows.is_complete(depth)
    counts_K = complete_BSK.sum((0, 1))
    depth_weights_K = DEPTH_DECAY ** torch.arange(depth, device=counts_K.device) / counts_K
    loss, grads_BSKD = states_BSKD.new_zeros(()), torch.zeros_like(states_BSKD)
    alpha_K = torch.zeros_like(depth_weights_K)
    max_logits = MAX_LOGITS.get(states_BSKD.device.type, MAX_LOGITS["cuda"])
    step = max(1, max_logits // (complete_BSK[0].numel() * len(ends.weight_VD)))
    for start in range(0, len(windows), step):
        part = slice(start, start + step)
        row_N, start_N, depth_N = complete_BSK[part].nonzero(as_tuple=True)
        with torch.no_grad():
            target_logits = ends.logits(windows.hidden_BWD[part, 1:])[row_N, start_N + depth_N]
        states = states_BSKD.detach()[part].requires_grad_(states_BSKD.requires_grad)
        draft_logits = ends.logits(states[row_N, start_N, depth_N], vocab_ids)
        if temperature != 1:
            draft_logits, target_logits = draft_logits / temperature, target_logits / temperature
        losses_N, alpha_N = lk_hybrid(draft_logits, target_logits, vocab_ids)
        part_loss = (losses_N * depth_weights_K[depth_N]).sum()
        if states.requires_grad:
            (grads_BSKD[part],) = torch.autograd.grad(part_loss, states)
        loss += part_loss.detach()
        alpha_K.index_add_(0, depth_N, alpha_N.to(alpha_K.dtype))
    return _WithGradient.apply(states_BSKD, loss, grads_BSKD), alpha_K / counts_K


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx, states, loss, grads):
        ctx.save_for_backward(grads)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None


class _Hybrid(torch.autograd.Function):
    """With its gradient by hand: autograd's passes over the vocabulary would take longer than all products of a small head."""

    @staticmethod
    def forward(ctx, draft_logits, target_logits, vocab_ids):
        rows_NV, targets_NF = (logits.reshape(-1, logits.shape[-1]) for logits in (draft_logits, target_logits))
        options = {"lambda_decay": LAMBDA_DECAY, "with_grad": ctx.needs_input_grad[0]}
        loss_N, alpha_N, grad_NV = atlas_kernels.lk_hybrid(rows_NV, targets_NF, vocab_ids, **options)
        loss, alpha = loss_N.view(draft_logits.shape[:-1]), alpha_N.view(draft_logits.shape[:-1])
        if grad_NV is not None:
            ctx.save_for_backward(grad_NV.view(draft_logits.shape))
        ctx.mark_non_differentiable(alpha)
        return loss, alpha

    @staticmethod
    def backward(ctx, grad_loss, grad_alpha):
        return ctx.saved_tensors[0] * grad_loss[..., None], None, None
