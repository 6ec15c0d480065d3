"""What surrounds the forward of a captured decode step. Shapes as in `reference.steps`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atlas_kernels.reference import StepInputs

BLOCK_N, BLOCK_M = 256, 256


@triton.jit
def splitmix64(x):
    """One step of the generator from state x, in uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_keys(seed, position):
    """Offset and stride of splitmix64(splitmix64(seed) + GOLDEN * position); the stride is odd."""
    seed, position = seed.to(tl.uint64, bitcast=True), position.to(tl.uint64, bitcast=True)
    mixed = splitmix64(splitmix64(seed) + position * 0x9E3779B97F4A7C15)
    offset = mixed.to(tl.uint32).to(tl.int32, bitcast=True)
    return offset, (mixed >> 32).to(tl.uint32).to(tl.int32, bitcast=True) | 1


@triton.jit(do_not_specialize=["num_rows"])
def row_keys_kernel(seeds_ptr, positions_ptr, keys_ptr, num_rows, BLOCK: tl.constexpr):
    """keys[0, n], keys[1, n] = offset, stride of seed n and position n. Grid: (blocks of rows,)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    offset, stride = row_keys(tl.load(seeds_ptr + row, mask, 0), tl.load(positions_ptr + row, mask, 0))
    tl.store(keys_ptr + row, offset, mask)
    tl.store(keys_ptr + num_rows + row, stride, mask)


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    slots_ptr,
    last_tokens_ptr,
    starts_ptr,
    remaining_ptr,
    seeds_ptr,
    prompt_lens_ptr,
    tables_ptr,
    tables_stride,
    drafts_ptr,
    drafts_row_stride,
    drafts_stride,
    draft_lens_ptr,
    input_ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    keys_ptr,
    out_starts_ptr,
    query_lens_ptr,
    out_tables_ptr,
    num_tokens,
    num_places,
    num_blocks,
    block_size,
    PLACES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """query_len = min(1 + draft_len, remaining); place j < query_len: the last token or draft token j - 1 at position start + j,
    whose KV slot the row's table says and whose keys are those of the token to draw after it. Grid: (rows,)."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    start, remaining = tl.load(starts_ptr + slot), tl.load(remaining_ptr + slot)
    query_len = tl.minimum(remaining, num_places)
    if draft_lens_ptr is not None:
        query_len = tl.minimum(query_len, 1 + tl.load(draft_lens_ptr + row))
    tl.store(out_starts_ptr + row, start)
    tl.store(query_lens_ptr + row, query_len)

    place = tl.arange(0, PLACES)
    is_place, in_query = place < num_places, place < query_len
    draft = drafts_ptr + row.to(tl.int64) * drafts_row_stride + (place - 1) * drafts_stride
    token = tl.load(draft, mask=in_query & (place > 0), other=0)
    token = tl.where(in_query & (place > 0), token, tl.load(last_tokens_ptr + slot))
    position = start + tl.minimum(place, tl.maximum(query_len - 1, 0))
    table = tables_ptr + slot * tables_stride
    block = tl.load(table + position // block_size, mask=in_query, other=0)
    kv_slot = tl.where(in_query, block * block_size + position % block_size, -1)
    key_offset, key_stride = row_keys(tl.load(seeds_ptr + slot), position + 1 - tl.load(prompt_lens_ptr + slot))

    out = row * num_places + place
    tl.store(input_ids_ptr + out, token, is_place)
    tl.store(positions_ptr + out, position, is_place)
    tl.store(kv_slots_ptr + out, kv_slot, is_place)
    tl.store(keys_ptr + out, key_offset, is_place)
    tl.store(keys_ptr + num_tokens + out, key_stride, is_place)
    for first in range(0, num_blocks, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        tl.store(out_tables_ptr + row * num_blocks + m, tl.load(table + m, m < num_blocks, 0), m < num_blocks)


@triton.jit
def finish_kernel(
    slots_ptr,
    input_ids_ptr,
    tokens_ptr,
    logprobs_ptr,
    query_lens_ptr,
    stop_ids_ptr,
    num_stops,
    last_tokens_ptr,
    starts_ptr,
    remaining_ptr,
    out_ptr,
    last_places_ptr,
    num_places,
    PLACES: tl.constexpr,
):
    """num_right = first place whose draft token is wrong; taken = min(num_right, first stop token) + 1. Grid: (rows,).

    Each slot is written by the one row that runs in it: rows that were finished, padding among them, write no state.
    """
    row = tl.program_id(0)
    query_len = tl.load(query_lens_ptr + row)
    is_running = query_len > 0
    place = tl.arange(0, PLACES)
    is_place = place < num_places
    token = tl.load(tokens_ptr + row * num_places + place, is_place, 0)
    logprob = tl.load(logprobs_ptr + row * num_places + place, is_place, 0.0)
    in_draft = place < query_len - 1
    draft = tl.load(input_ids_ptr + row * num_places + place + 1, in_draft, 0)
    num_right = tl.min(tl.where(in_draft & (token == draft), PLACES, place), 0)

    is_stop = place < 0
    for i in range(num_stops):
        is_stop = is_stop | (token == tl.load(stop_ids_ptr + i))
    stop_place = tl.min(tl.where(is_stop & (place <= num_right), place, PLACES), 0)
    last = tl.minimum(stop_place, num_right)
    slot = tl.load(slots_ptr + row)
    remaining = tl.load(remaining_ptr + slot) - last - 1
    tl.store(last_tokens_ptr + slot, tl.sum(tl.where(place == last, token, 0), 0), is_running)
    tl.store(starts_ptr + slot, tl.load(starts_ptr + slot) + last + 1, is_running)
    tl.store(remaining_ptr + slot, tl.where(stop_place < PLACES, 0, remaining), is_running)

    out = out_ptr + row * (1 + 2 * num_places)
    tl.store(out, tl.where(is_running, num_right, -1).to(tl.float64))
    tl.store(out + 1 + place, tl.where(is_running, token, 0).to(tl.float64), is_place)
    tl.store(out + 1 + num_places + place, tl.where(is_running, logprob, 0.0).to(tl.float64), is_place)
    tl.store(last_places_ptr + row, (row * num_places + tl.where(is_running, last, 0)).to(tl.int64))


def device_row_keys(seeds_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """Same as `reference.device_row_keys`, bit for bit. Both contiguous. Moves 24 bytes per row."""
    num_rows = len(seeds_N)
    keys_2N = torch.empty(2, num_rows, dtype=torch.int32, device=seeds_N.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, BLOCK_N),)
        row_keys_kernel[grid](seeds_N, positions_N, keys_2N, num_rows, BLOCK=BLOCK_N)
    return keys_2N


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
    """Same as `reference.prepare_step`. A row's table is contiguous, the drafts may be strided.

    Bound by the launch: it moves 16 bytes per block of a table and some 40 per place.
    """
    num_rows, num_places, num_blocks = len(slots_R), 1 + drafts_RK.shape[1], tables_SM.shape[1]
    num_tokens = num_rows * num_places
    step = StepInputs(
        input_ids_N=slots_R.new_empty(num_tokens),
        positions_N=slots_R.new_empty(num_tokens),
        kv_slots_N=slots_R.new_empty(num_tokens),
        keys_2N=slots_R.new_empty(2, num_tokens, dtype=torch.int32),
        starts_R=torch.empty_like(slots_R),
        query_lens_R=torch.empty_like(slots_R),
        block_tables_RM=slots_R.new_empty(num_rows, num_blocks),
    )
    if num_rows:
        prepare_kernel[(num_rows,)](
            slots_R,
            last_tokens_S,
            starts_S,
            remaining_S,
            seeds_S,
            prompt_lens_S,
            tables_SM,
            tables_SM.stride(0),
            drafts_RK,
            *drafts_RK.stride(),
            draft_lens_R,
            *step,
            num_tokens,
            num_places,
            num_blocks,
            block_size,
            PLACES=triton.next_power_of_2(num_places),
            BLOCK_M=BLOCK_M,
            num_warps=1,
        )
    return step


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
    """Same as `reference.finish_step`. Bound by the launch: it moves some 36 bytes per place."""
    num_rows = len(slots_R)
    num_places = len(tokens_N) // max(num_rows, 1)
    out_RW = torch.empty(num_rows, 1 + 2 * num_places, dtype=torch.float64, device=slots_R.device)
    last_places_R = torch.empty_like(slots_R)
    if num_rows:
        finish_kernel[(num_rows,)](
            slots_R,
            input_ids_N,
            tokens_N,
            logprobs_N,
            query_lens_R,
            stop_ids_E,
            len(stop_ids_E),
            last_tokens_S,
            starts_S,
            remaining_S,
            out_RW,
            last_places_R,
            num_places,
            PLACES=triton.next_power_of_2(num_places),
            num_warps=1,
        )
    return out_RW, last_places_R
