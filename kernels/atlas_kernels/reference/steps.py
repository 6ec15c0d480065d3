"""What surrounds the forward of a captured decode step: its inputs from the rows' state, and the state after it.

Shapes: S slots of row state, R rows of the batch, K draft tokens, Q = K + 1 places of a row, N = R * Q, M blocks of a row,
E stop tokens, W = 1 + 2 Q. A row keeps its slot for life; rows that only pad the batch point at a slot that has none remaining.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of `noise`, as signed 64-bit integers
MIX_A, MIX_B = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


class StepInputs(NamedTuple):
    """What one forward over every row's last token and its draft needs; row r's places are r * Q … r * Q + Q - 1."""

    input_ids_N: torch.Tensor
    positions_N: torch.Tensor
    kv_slots_N: torch.Tensor
    """Where keys and values go; -1 for the places beyond a row's query length."""
    keys_2N: torch.Tensor
    """int32, of `row_keys`, for the token to draw after each place."""
    starts_R: torch.Tensor
    query_lens_R: torch.Tensor
    """1 + draft length, at most what remains; 0 for a row that is finished."""
    block_tables_RM: torch.Tensor


def device_row_keys(seeds_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """`row_keys` of seeds and positions that are on the device. [N] int64 each -> [2, N] int32."""
    mixed_N = _splitmix64(_splitmix64(seeds_N) + positions_N * GOLDEN)
    return torch.stack([mixed_N.int(), (mixed_N >> 32).int() | 1])


def prepare_step(
    slots_R: torch.Tensor,
    last_tokens_S: torch.Tensor,
    starts_S: torch.Tensor,
    remaining_S: torch.Tensor,
    seeds_S: torch.Tensor,
    prompt_lens_S: torch.Tensor,
    tables_SM: torch.Tensor,
    drafts_RK: torch.Tensor,
    draft_lens_R: torch.Tensor | None,
    block_size: int,
) -> StepInputs:
    """The inputs of a step, all int64 (see `StepInputs`).

    Args:
        last_tokens_S, starts_S: each row's last token, which is not in the cache yet, and its position.
        remaining_S: tokens that the row may still emit. seeds_S, prompt_lens_S: what its noise is keyed by.
        tables_SM: blocks of the KV cache. drafts_RK: draft tokens, draft_lens_R of them right-padded; None: all K.
    """
    num_rows, num_drafts = drafts_RK.shape
    starts_R, remaining_R, last_R1 = starts_S[slots_R], remaining_S[slots_R], last_tokens_S[slots_R][:, None]
    # a finished row has none remaining, hence a query length of 0
    query_lens_R = (
        remaining_R.clamp(max=1 + num_drafts) if draft_lens_R is None else remaining_R.minimum(1 + draft_lens_R)
    )
    place_Q = torch.arange(1 + num_drafts, device=slots_R.device)
    in_query_RQ = place_Q < query_lens_R[:, None]
    input_ids_RQ = torch.where(in_query_RQ, torch.cat([last_R1, drafts_RK], dim=1), last_R1)
    positions_RQ = starts_R[:, None] + place_Q.minimum((query_lens_R[:, None] - 1).clamp(min=0))
    tables_RM = tables_SM[slots_R]
    # a finished row may have filled its last block: its position is beyond the table
    blocks_RQ = tables_RM.gather(1, (positions_RQ // block_size).clamp(max=tables_RM.shape[1] - 1))
    kv_slots_RQ = torch.where(in_query_RQ, blocks_RQ * block_size + positions_RQ % block_size, -1)
    drawn_RQ = positions_RQ + 1 - prompt_lens_S[slots_R][:, None]
    keys_2N = device_row_keys(seeds_S[slots_R][:, None].expand_as(drawn_RQ).flatten(), drawn_RQ.flatten())
    return StepInputs(
        input_ids_RQ.flatten(),
        positions_RQ.flatten(),
        kv_slots_RQ.flatten(),
        keys_2N,
        starts_R,
        query_lens_R,
        tables_RM,
    )


def finish_step(
    slots_R: torch.Tensor,
    input_ids_N: torch.Tensor,
    tokens_N: torch.Tensor,
    logprobs_N: torch.Tensor,
    query_lens_R: torch.Tensor,
    stop_ids_E: torch.Tensor,
    last_tokens_S: torch.Tensor,
    starts_S: torch.Tensor,
    remaining_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count each row's right draft tokens and advance its state, in place, by what it takes.

    A draft token is right where the policy drew it; a row emits the right prefix and the token drawn after it, and takes of
    these what comes up to its first stop token. Then nothing remains; else what remained, less what was taken.

    Args:
        input_ids_N, query_lens_R: of the step's `StepInputs`. tokens_N, logprobs_N: drawn after each place.
    Returns:
        [R, W] float64, what the host reads in one copy: right draft tokens, tokens of the Q places, their log-probs; -1 and
        zeros for a row that was finished before. [R] int64: the place of the last token taken.
    """
    num_rows = len(slots_R)
    ids_RQ, tokens_RQ, logprobs_RQ = (x.view(num_rows, -1) for x in (input_ids_N, tokens_N, logprobs_N))
    num_places = tokens_RQ.shape[1]
    place_Q = torch.arange(num_places, device=slots_R.device)
    in_draft_RK = place_Q[1:] < query_lens_R[:, None]
    num_right_R = ((tokens_RQ[:, :-1] == ids_RQ[:, 1:]) & in_draft_RK).long().cumprod(1).sum(1)
    stops_RQ = (tokens_RQ[:, :, None] == stop_ids_E).any(-1) & (place_Q <= num_right_R[:, None])
    stop_places_R = torch.where(stops_RQ, place_Q, num_places).amin(1)
    last_R = stop_places_R.minimum(num_right_R)

    # rows that pad the batch share a slot: each writes back what it read there
    was_running_R, taken_R = query_lens_R > 0, last_R + 1
    old_last_R, old_starts_R, old_remaining_R = last_tokens_S[slots_R], starts_S[slots_R], remaining_S[slots_R]
    new_remaining_R = torch.where(stop_places_R < num_places, 0, old_remaining_R - taken_R)
    new_last_R = tokens_RQ.gather(1, last_R[:, None])[:, 0]
    last_tokens_S[slots_R] = torch.where(was_running_R, new_last_R, old_last_R)
    starts_S[slots_R] = torch.where(was_running_R, old_starts_R + taken_R, old_starts_R)
    remaining_S[slots_R] = torch.where(was_running_R, new_remaining_R, old_remaining_R)

    out_RW = torch.cat([num_right_R[:, None].double(), tokens_RQ.double(), logprobs_RQ.double()], dim=1)
    nothing_W = torch.arange(-1, out_RW.shape[1] - 1, device=slots_R.device).clamp(max=0).double()
    out_RW = torch.where(was_running_R[:, None], out_RW, nothing_W)
    rows_R = torch.arange(num_rows, device=slots_R.device)
    return out_RW, rows_R * num_places + torch.where(was_running_R, last_R, 0)


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """As in `noise`; int64's >> is arithmetic: the masks make it logical."""
    x = x + GOLDEN
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * MIX_A
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * MIX_B
    return x ^ ((x >> 31) & (1 << 33) - 1)
