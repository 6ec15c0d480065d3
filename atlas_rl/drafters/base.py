"""The protocol between the engine and every drafter.

A drafter is never trusted: the engine accepts a draft token only where the policy itself emits it (law 1), clips drafts to the
lengths it asked for, and benches a drafter that raises.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from atlas_rl.engine.batch import ForwardBatch
    from atlas_rl.engine.decode_state import DecodeState
    from atlas_rl.engine.policy_view import PolicyView
    from atlas_rl.types import SamplingParams


class DraftRow(Protocol):
    """What a drafter may know of a running sequence."""

    row_id: int
    """Unique over the life of the engine."""
    num_computed: int
    """Tokens of prompt and completion that the policy has computed: all but the last, while the row decodes."""
    block_table: list[int]
    """Blocks of the row's KV: position p is in block_table[p // block_size]; siblings share whole blocks of prompt."""
    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    """The completion so far; the engine appends to it, drafters only read."""
    noise_seed: int | None
    """Seed of the row's noise: the policy's token at a position of the completion is the arg-max of log p / T + noise keyed
    by (seed, position, token); a drafter that draws with it is right more often. None where the policy decodes greedily."""


class Drafts(NamedTuple):
    """Guessed continuations of R rows, K tokens at most."""

    token_ids: np.ndarray
    """[R, K] int64."""
    probs: np.ndarray
    """[R, K] estimated probability that a token and all before it are accepted: non-increasing, 0 after a draft's end. A row's
    sum is its expected gain."""

    @property
    def lens(self) -> np.ndarray:
        """[R] tokens of each draft."""
        return (self.probs > 0).cumprod(axis=1).sum(axis=1)

    def fault(self, num_rows: int, vocab_size: int) -> str | None:
        """What makes them no drafts for so many rows; None: they are."""
        token_ids, probs = self
        if not (token_ids.shape == probs.shape and token_ids.ndim == 2 and len(token_ids) == num_rows):
            return f"drafts of shape {token_ids.shape} with probabilities of {probs.shape} for {num_rows} rows"
        if probs.size and not (probs.min() >= 0 and probs.max() <= 1):  # not so for NaN either
            return "a probability outside [0, 1]"
        if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
            return f"a token id outside the vocabulary: {token_ids.min()} … {token_ids.max()}"
        return None


class StepDrafter(Protocol):
    """A drafter's side within captured decode steps. What it knows of a row lies in the row's slot, on the device.

    `draft` and `keep` are captured: they look at no value and use only memory that stays where it is. The host's side goes on
    being told of rows (`admit`, `release`), and where it has KV in their blocks of prefixes (`prefilled`, `copy_blocks`).
    """

    def wake(self, sampling: SamplingParams, num_slots: int, num_positions: int) -> None:
        """A rollout begins, after the host's side was woken: so many slots, rows of at most so many tokens. Between rollouts the
        policy's weights may have changed, and its own."""

    def sleep(self, keep: bool) -> None:
        """A rollout is over, after the host's side was put to sleep. Memory that captured steps read is kept for the next one
        (`keep`), or given back."""

    def memory_key(self) -> Hashable:
        """Changes whenever other memory is used than before."""

    def admit(self, slots: list[int], batch: ForwardBatch | None, places: np.ndarray, state: DecodeState) -> None:
        """Rows begin; the last token of row i's prefix is at places[i] of the prefilled batch, -1: there is none."""

    def draft(self, num_drafts: int, slots_R: torch.Tensor, state: DecodeState) -> torch.Tensor:
        """Guesses [R, K] of what follows each row's last token. Their KV may go where the step may write: to 1 + K positions from
        the last token's on, but no more than remain of a row."""

    def keep(self, slots_R: torch.Tensor, batch: ForwardBatch, places_R: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """The end of every step, whoever drafted: tokens_N were drawn after the places of its batch, each row's last one at
        places_R; what follows these in a row was drafted wrongly."""


class Drafter:
    """What the engine calls, in this order: `wake` as a rollout begins; after a prefill forward `prefilled`, `copy_blocks`,
    `admit` and `started`; then `propose`, `verified` and `observe` for each decode step; `release` for rows that leave; `sleep`.

    A drafter is not asked at every step. `verified` is called at every one, `observe` at the latest before the next `propose`: of
    what a row has emitted at its end, `release` may be the first to tell. Only `name` and `propose` have to be given.
    """

    name: str
    layers: tuple[int, ...] | None = None
    """Decoder layers (from 0) whose outputs it reads in `batch.tapped`; () if `batch.hidden_ND` is enough, None if it looks at
    tokens alone: then `prefilled`, `started` and `verified` are not called."""
    uses_blocks: bool = False
    """Whether it keeps KV of its own in the rows' blocks: these then have room for a draft before `propose` is called, and
    `kv_shape(block_size)` says how much it is."""
    can_rest: bool = False
    """Whether it need not be told of steps until it is wanted again, and then begins without features of the rows."""
    keeps_up: bool = True
    """Whether its side within steps learns enough in those that others draft; else `rejoin` is called."""

    def bind(self, view: PolicyView) -> None:
        """Called once, before anything else. Embeddings and head of `view` are live: the policy's own at any time.

        Raises:
            ValueError: it was made for another policy.
        """

    def within_step(self) -> StepDrafter | None:
        """Its side within captured steps, once it is bound; None: its drafts are the host's to make."""
        return None

    def wake(self, sampling: SamplingParams, num_blocks: int, block_size: int) -> None:
        """A rollout begins; its blocks have numbers below `num_blocks`."""

    def sleep(self) -> None:
        """A rollout is over: give its memory back."""

    def prefilled(self, batch: ForwardBatch, next_token_ids: np.ndarray) -> None:
        """A prefill forward over parts of prefixes, in `batch`; `next_token_ids` [R] follow each row's last token there. A prefix
        is a prompt (or a preempted row's tokens) without its last token, which each row decodes itself."""

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """(source, target) blocks: what a drafter keeps in the first is wanted in the second too."""

    def admit(self, rows: Sequence[DraftRow]) -> None:
        """Rows start decoding; after a preemption `output_ids` is not empty."""

    def started(self, rows: Sequence[DraftRow], batch: ForwardBatch, places: np.ndarray) -> None:
        """The same rows: the last token of row i's prefix is at `places[i]` of the prefilled batch; -1: there was none."""

    def propose(self, rows: Sequence[DraftRow], max_lens: np.ndarray, min_prob: float = 0.0) -> Drafts:
        """One draft per row, of at most `max_lens[i]` tokens (0: none wanted). A token that is accepted, with all before it, with
        a probability below `min_prob` would not be verified: nothing is lost by leaving it out."""
        raise NotImplementedError

    def verified(self, rows: Sequence[DraftRow], batch: ForwardBatch, num_right: np.ndarray) -> None:
        """A decode step's forward over each row's last token and a draft (of whichever drafter), of which the first
        `num_right[i]` tokens were right: places up to and with the row's first + num_right[i] hold what rows have emitted
        (or have ended before)."""

    def rest(self) -> None:
        """Steps come that it is not told of, if it `can_rest`."""

    def observe(self, rows: Sequence[DraftRow], num_drafted: np.ndarray, num_accepted: np.ndarray) -> None:
        """`output_ids` of each row has grown since the drafter was last told of it; of the `num_drafted[i]` verified draft tokens
        (a prefix of what it proposed, maybe none of it) the first `num_accepted[i]` were right."""

    def drafted_within(self, rows: Sequence[DraftRow]) -> None:
        """In the place of `observe`, after a captured step within which it drafted; `output_ids` hold what came of it."""

    def rejoin(self, rows: Sequence[DraftRow]) -> None:
        """Before it drafts within a step, where it did not in the last one: all that rows have emitted is known."""

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        """Rows leave: finished, or else preempted or aborted (a preempted row is admitted again)."""

    def weights_updated(self) -> None:
        """Its own weights have changed, between rollouts."""

    def reset(self) -> None:
        """Between rollouts: forget what is not saved with a checkpoint."""

    def policy_updated(self) -> None:
        """The policy's weights have changed; what was learned from older rollouts is worth less now."""
