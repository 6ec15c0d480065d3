"""How often a head's guesses are right, by depth, measured on windows of rollouts with the noise that drew them.

Shapes: B, W, S, K as in `drafters.heads`; N guesses.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from atlas_rl.adapt.losses import MAX_LOGITS, PolicyEnds
from atlas_rl.drafters.guess import draw
from atlas_rl.drafters.heads import DraftHead, Windows
from atlas_rl.types import SamplingParams

if TYPE_CHECKING:
    from rich.table import Table

MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Figures by depth (the first guess first), over every place of the windows where a draft can start.

    All guesses at a depth are judged, those after a wrong guess too, as if the tokens before had been guessed right.
    """

    num_starts: int
    overlap: list[float]
    """1 - TV(p, q): what no way of guessing can exceed."""
    coupled: list[float]
    """Guesses drawn with the policy's own noise that equal what it drew."""
    argmax: list[float]
    """The drafter's most probable token that equals what the policy drew."""
    runs: list[float]
    """Drafts whose coupled guesses are right up to this depth."""
    num_judged: list[int]
    """Guesses that the figures are of."""

    @property
    def tokens_per_step(self) -> list[float]:
        """Emitted per decode step with lookahead 1, 2, …: one, and the guesses that are right."""
        return [1 + sum(self.runs[: k + 1]) for k in range(len(self.runs))]

    @property
    def coupled_over_overlap(self) -> list[float]:
        return [c / o if o else 0.0 for c, o in zip(self.coupled, self.overlap, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = asdict(self) | {
            "tokens_per_step": self.tokens_per_step,
            "coupled_over_overlap": self.coupled_over_overlap,
        }
        return {name: [round(x, 4) for x in v] if isinstance(v, list) else v for name, v in figures.items()}

    def table(self, title: str) -> Table:
        from rich.table import Table

        grid = Table(title=title, title_justify="left")
        columns = ("depth", "1 - TV", "coupled", "arg-max", "coupled/(1 - TV)", "all right so far", "tokens/step")
        for column in columns:
            grid.add_column(column, justify="right")
        figures = (self.overlap, self.coupled, self.argmax, self.coupled_over_overlap, self.runs, self.tokens_per_step)
        for depth, row in enumerate(zip(*figures, strict=True), start=1):
            grid.add_row(str(depth), *(f"{x:.3f}" for x in row))
        return grid


@torch.no_grad()
def measure(
    head: DraftHead,
    windows: Windows,
    ends: PolicyEnds,
    sampling: SamplingParams,
    *,
    depth: int = MAX_DEPTH,
    vocab_ids: torch.Tensor | None = None,
) -> Acceptance:
    """Acceptance on windows of rollouts that were sampled so. The overlap is that of the unfiltered distributions, at temperature
    1 where sampling is greedy."""
    sums_4K = torch.zeros(4, depth, dtype=torch.float64)
    counts_K = torch.zeros(depth, dtype=torch.int64)
    max_logits = MAX_LOGITS.get(windows.hidden_BWD.device.type, MAX_LOGITS["cuda"])
    step = max(1, max_logits // ((windows.width - depth) * depth * len(ends.weight_VD)))
    for start in range(0, len(windows), step):
        part = windows.rows(slice(start, start + step))
        complete_BSK = part.is_complete(depth)
        judged_BSK3 = torch.zeros(*complete_BSK.shape, 3, device=complete_BSK.device)
        judged_BSK3[complete_BSK] = _judge(head, part, complete_BSK, ends, sampling, vocab_ids)
        runs_BSK1 = judged_BSK3[..., 1:2].cumprod(dim=2)
        sums_4K += torch.cat([judged_BSK3, runs_BSK1], dim=3).sum((0, 1)).T.cpu()
        counts_K += complete_BSK.sum((0, 1)).cpu()
    overlap_K, coupled_K, argmax_K, runs_K = (sums_4K / counts_K.clamp(min=1)).tolist()
    figures = {"overlap": overlap_K, "coupled": coupled_K, "argmax": argmax_K, "runs": runs_K}
    return Acceptance(num_starts=int(counts_K[0]), num_judged=counts_K.tolist(), **figures)


def _judge(
    head: DraftHead,
    windows: Windows,
    complete_BSK: torch.Tensor,
    ends: PolicyEnds,
    sampling: SamplingParams,
    vocab_ids: torch.Tensor | None,
) -> torch.Tensor:
    """[N, 3] of each complete guess: overlap with the policy's distribution, whether the coupled guess is right, and whether the
    most probable token is."""
    depth = complete_BSK.shape[2]
    states_ND = head.unroll(windows, depth, ends.embedding_VD)[complete_BSK]
    if getattr(head, "lm_head", None) is None:
        draft_NV = ends.logits(states_ND, vocab_ids)
    else:  # an output head of its own, as EAGLE-3 checkpoints of other trainers have
        draft_NV, vocab_ids = head.lm_head(states_ND).float(), head.draft_ids
    if vocab_ids is not None:  # tokens outside the draft vocabulary are never guessed
        full_NV = draft_NV.new_full((len(draft_NV), len(ends.weight_VD)), -torch.inf)
        draft_NV = full_NV.index_copy_(1, vocab_ids, draft_NV)
    row_N, start_N, k_N = complete_BSK.nonzero(as_tuple=True)
    source_N = start_N + k_N + 1  # the position that draws the guessed token
    temperature = sampling.temperature or 1.0
    target_NV = ends.logits(windows.hidden_BWD[row_N, source_N])
    overlap_N = torch.minimum((draft_NV / temperature).softmax(-1), (target_NV / temperature).softmax(-1)).sum(-1)
    tokens_N = windows.token_ids_BW[row_N, source_N + 1]
    positions_N = windows.positions_B[row_N] + source_N + 1 - windows.prompt_lens_B[row_N]
    guesses_N, _ = draw(draft_NV, sampling, windows.seeds_B[row_N].cpu().numpy(), positions_N.cpu().numpy())
    figures = (overlap_N, guesses_N == tokens_N, draft_NV.argmax(-1) == tokens_N)
    return torch.stack([figure.float() for figure in figures], dim=1)
