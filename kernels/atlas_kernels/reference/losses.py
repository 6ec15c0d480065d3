"""What drafters are trained on.

Shapes: N rows, V vocabulary of the drafter, F of the policy.
"""

from __future__ import annotations

import torch


def lk_hybrid(
    draft_logits_NV: torch.Tensor,
    target_logits_NF: torch.Tensor,
    vocab_ids_V: torch.Tensor | None = None,
    *,
    lambda_decay: float = 3.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """lambda KL(p'‖q) + (1 - lambda) TV(p, q), lambda = exp(-lambda_decay alpha) held constant, alpha = sum_v min(p_v, q_v).

    p is the policy's distribution, q the drafter's, over the draft vocabulary; p' is p renormalised to it.

        d KL / d logits = q - p'
        d TV / d logits = q (sum(r) - 1[q < p])  r = q where q < p, else 0

    Args:
        vocab_ids_V: the policy's id of each token of the draft vocabulary; without them F = V. What p has outside counts as not
            accepted.
    Returns:
        [N] losses and [N] alphas, in float32 (64 where the logits are); the losses' gradient [N, V] in the dtype of draft logits.
    """
    dtype = torch.promote_types(draft_logits_NV.dtype, torch.float32)
    p, log_p = _distribution(target_logits_NF.to(dtype))
    near, log_near = (p, log_p) if vocab_ids_V is None else _distribution(log_p[:, vocab_ids_V])
    p = p if vocab_ids_V is None else p[:, vocab_ids_V]
    negative_entropy = (near * log_near).sum(-1)
    log_q = draft_logits_NV.to(dtype).log_softmax(-1)
    kl = negative_entropy - (near * log_q).sum(-1)
    q = log_q.exp_()
    alpha = torch.minimum(p, q).sum(-1)
    lam = torch.exp(-lambda_decay * alpha)
    loss = lam * kl + (1 - lam) * (1 - alpha)
    if not with_grad:
        return loss, alpha, None
    r = q.clone().lt_(p).mul_(q)
    lam, rest = lam[:, None], (1 - lam)[:, None]
    grad = q.mul_(lam + rest * r.sum(-1, keepdim=True)).sub_(r.mul_(rest)).sub_(near * lam)
    return loss, alpha, grad.to(draft_logits_NV.dtype)


def _distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = logits.log_softmax(-1)
    return log_p.exp(), log_p
