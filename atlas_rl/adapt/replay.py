"""Finished rollouts as material for draft heads: one teacher-forced forward gives the features that the engine had.

Shapes: R rollouts, N tokens of all of them back to back, L tapped layers, D hidden size; B windows, W positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from atlas_rl.drafters.heads import Windows
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout

MAX_TOKENS = 4096
"""Of one forward."""
MAX_CHUNK = 512
"""Of one row in one forward: the attention mask grows with it."""
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Rollouts, prompts included, and what the policy computed from each of their tokens."""

    token_ids_N: torch.Tensor
    hidden_ND: torch.Tensor
    """Last hidden states, after the policy's final norm."""
    tapped_NLD: torch.Tensor
    lens_R: torch.Tensor
    """Tokens of each rollout (this and what follows: int64, on the host)."""
    prompt_lens_R: torch.Tensor
    seeds_R: torch.Tensor
    groups_R: torch.Tensor
    """Rollouts of the same prompt have the same number."""

    def __len__(self) -> int:
        return len(self.lens_R)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_N)

    @property
    def first_starts_R(self) -> torch.Tensor:
        """Where a draft can start first: it guesses the completion's first token, or its second where the prompt is one token."""
        return (self.prompt_lens_R - 2).clamp(min=0)

    @property
    def num_starts_R(self) -> torch.Tensor:
        """Places where a draft can start: the last one guesses the last token."""
        return (self.lens_R - 2 - self.first_starts_R).clamp(min=0)

    def __add__(self, other: Replay) -> Replay:
        return Replay(**{f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)})

    def newest(self, max_tokens: int) -> Replay:
        """The last rollouts that hold no more than so many tokens together, one at least."""
        kept_R = self.lens_R.flip(0).cumsum(0) <= max_tokens
        num_rows = max(1, int(kept_R.sum()))
        num_tokens = int(self.lens_R[-num_rows:].sum())
        if num_rows == len(self):
            return self
        sizes = {f.name: num_tokens if "_N" in f.name else num_rows for f in fields(self)}
        return Replay(**{name: getattr(self, name)[-size:].clone() for name, size in sizes.items()})

    def rows(self, index_R: torch.Tensor) -> Replay:
        """Some of the rollouts."""
        ends_R = self.lens_R.cumsum(0)
        pieces = [torch.arange(int(ends_R[r] - self.lens_R[r]), int(ends_R[r])) for r in index_R.tolist()]
        places_N = torch.cat(pieces).to(self.token_ids_N.device)
        return Replay(**{f.name: getattr(self, f.name)[places_N if "_N" in f.name else index_R] for f in fields(self)})

    def sample(self, count: int, width: int, depth: int, generator: torch.Generator) -> Windows:
        """Random windows for drafts of some depth: each place where a draft can start is in as many of them on average."""
        spread = width - depth - 1  # how far before a rollout's first start a window may begin and still hold it
        ends_R = (self.num_starts_R + spread * (self.num_starts_R > 0)).cumsum(0)
        place_B = torch.randint(int(ends_R[-1]), (count,), generator=generator)
        row_B = torch.searchsorted(ends_R, place_B, right=True)
        from_last_B = ends_R[row_B] - place_B  # 1: the window begins with the rollout's last start
        last_start_B = (self.first_starts_R + self.num_starts_R)[row_B] - 1
        return self.cut(row_B, (last_start_B + 1 - from_last_B).clamp(min=0), width)

    def tiles(self, width: int, depth: int) -> Windows:
        """Windows that hold every place where a draft can start once."""
        stride = width - depth
        rows, begins = [], []
        for row, (first, count) in enumerate(
            zip(self.first_starts_R.tolist(), self.num_starts_R.tolist(), strict=True)
        ):
            tiles = range(first, first + count, stride)
            rows += [row] * len(tiles)
            begins += tiles
        return self.cut(torch.tensor(rows), torch.tensor(begins), width)

    def cut(self, rows_B: torch.Tensor, begins_B: torch.Tensor, width: int) -> Windows:
        """Windows of these rollouts from these positions on."""
        offsets_R = self.lens_R.cumsum(0) - self.lens_R
        place_BW = begins_B[:, None] + torch.arange(width + 1)
        place_BW = (
            place_BW.minimum(self.lens_R[rows_B][:, None] - 1) + offsets_R[rows_B][:, None]
        )  # padding: the last token
        device = self.token_ids_N.device
        place_BW = place_BW.to(device)
        per_window = {
            "positions_B": begins_B,
            "prompt_lens_B": self.prompt_lens_R[rows_B],
            "seeds_B": self.seeds_R[rows_B],
            # the last token's features lead to nothing that is known
            "lens_B": (self.lens_R[rows_B] - 1 - begins_B).clamp(max=width),
        }
        return Windows(
            token_ids_BW=self.token_ids_N[place_BW],
            hidden_BWD=self.hidden_ND[place_BW[:, :-1]],
            tapped_BWLD=self.tapped_NLD[place_BW[:, :-1]],
            **{name: tensor.to(device) for name, tensor in per_window.items()},
        )


def group_numbers(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[R] int64: equal prompts by content have equal numbers, in order of first appearance."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])


def replay(view: PolicyView, layers: Sequence[int], rollouts: Sequence[Rollout], seeds: Sequence[int]) -> Replay:
    """Features of rollouts, in their order; `seeds` are those of their requests."""
    rows = [rollout.prompt_ids + rollout.token_ids for rollout in rollouts]
    hidden: list[torch.Tensor] = [None] * len(rows)
    tapped: list[torch.Tensor] = [None] * len(rows)
    # no autograd, and no inference tensors either: autograd could not read them later
    with torch.inference_mode(False), torch.no_grad(), _tapping(view, layers):
        for group in _groups(list(map(len, rows))):
            for i, (hidden_ND, tapped_NLD) in zip(group, _forward(view, layers, [rows[i] for i in group]), strict=True):
                hidden[i], tapped[i] = hidden_ND, tapped_NLD
        return Replay(
            token_ids_N=torch.tensor([token for row in rows for token in row], device=view.device),
            hidden_ND=torch.cat(hidden),
            tapped_NLD=torch.cat(tapped),
            lens_R=torch.tensor(list(map(len, rows))),
            prompt_lens_R=torch.tensor([len(rollout.prompt_ids) for rollout in rollouts]),
            seeds_R=torch.tensor(list(seeds)),
            groups_R=group_numbers([rollout.prompt_ids for rollout in rollouts]),
        )


@contextmanager
def _tapping(view: PolicyView, layers: Sequence[int]) -> Iterator[None]:
    before = view.tapped_layers
    view.tap(layers)
    try:
        yield
    finally:
        view.tap(before)


def _groups(lens: list[int]) -> Iterator[list[int]]:
    """Rows that go through the policy together: of about one length, so that little is padded."""
    group: list[int] = []
    for i in sorted(range(len(lens)), key=lens.__getitem__):
        if group and (len(group) + 1) * min(lens[i], MAX_CHUNK) > MAX_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _forward(
    view: PolicyView, layers: Sequence[int], rows: list[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Last hidden states [N, D] and tapped outputs [N, L, D] of each row, computed chunk by chunk over a cache of its own."""
    num_blocks = -(-max(map(len, rows)) // BLOCK_SIZE)
    cache = KVCache(view.kv_shape(BLOCK_SIZE), len(rows) * num_blocks, view.device)
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), MAX_CHUNK):
        active = [i for i, row in enumerate(rows) if len(row) > start]
        tables = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in active]
        chunks = [rows[i][start : start + MAX_CHUNK] for i in active]
        batch = ForwardBatch.build(cache, chunks, [start] * len(active), tables)
        hidden_ND = view.hidden_states(batch)
        tapped_NLD = hidden_ND.new_empty(len(hidden_ND), 0, hidden_ND.shape[1])
        if layers:
            tapped_NLD = torch.stack([batch.tapped[layer] for layer in layers], dim=1)
        lens = batch.query_lens.tolist()
        for i, *features in zip(active, hidden_ND.split(lens), tapped_NLD.split(lens), strict=True):
            parts[i].append(features)
    for row_parts in parts:
        yield tuple(map(torch.cat, zip(*row_parts, strict=True)))
