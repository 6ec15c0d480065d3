"""The two ends of a captured decode step: kernels against twins, and twins against the host's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiling import Case, check_compiles

from atlas_kernels import reference, row_keys
from atlas_rl.engine.sampling import count_accepted

pytest.importorskip("triton")

BLOCK_SIZE, NUM_SLOTS, NUM_BLOCKS, DUMMY = 16, 12, 5, 11
CPU = torch.device("cpu")


def make_state(seed: int) -> dict[str, torch.Tensor]:
    """Slots with ragged rows: 0 is finished and has filled its last block, 1 has one token left, the last is for padding."""
    rng = np.random.default_rng(seed)
    prompt_lens = rng.integers(1, 20, NUM_SLOTS)
    starts = prompt_lens + rng.integers(0, 40, NUM_SLOTS)
    remaining = rng.integers(2, 15, NUM_SLOTS)
    starts[0], remaining[0], remaining[1], remaining[DUMMY] = NUM_BLOCKS * BLOCK_SIZE, 0, 1, 0
    state = {
        "last_tokens_S": rng.integers(0, 50, NUM_SLOTS),
        "starts_S": starts,
        "remaining_S": remaining,
        "seeds_S": rng.integers(-(2**63), 2**63 - 1, NUM_SLOTS),
        "prompt_lens_S": prompt_lens,
        "tables_SM": rng.permutation(NUM_SLOTS * NUM_BLOCKS).reshape(NUM_SLOTS, NUM_BLOCKS),
    }
    return {name: torch.from_numpy(x) for name, x in state.items()}


def make_rows(seed: int, num_drafts: int, lengths: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Slots in any order, two rows of padding; drafts that are a strided part of a buffer; their lengths."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.cat([torch.randperm(DUMMY, generator=generator)[:8], torch.tensor([0, DUMMY, DUMMY])])
    slots[:8] = torch.where(slots[:8] == 0, 1, slots[:8]) if seed % 2 else slots[:8]
    drafts = torch.randint(50, (num_drafts + 2, len(slots)), generator=generator)[:num_drafts].T
    ragged = torch.randint(num_drafts + 1, (len(slots),), generator=generator)
    return slots, drafts, ragged if lengths == "ragged" else None


def accepted_tokens(step: reference.StepInputs, num_places: int, seed: int) -> torch.Tensor:
    """What the policy draws: each row's draft, right up to a random place."""
    generator = torch.Generator().manual_seed(seed)
    drawn = step.input_ids_N.view(-1, num_places).roll(-1, 1)
    wrong = torch.randint(num_places + 1, (len(drawn), 1), generator=generator) <= torch.arange(num_places)
    return torch.where(wrong, torch.randint(50, drawn.shape, generator=generator), drawn).flatten()


def test_device_keys_are_the_hosts():
    from atlas_kernels import steps

    rng = np.random.default_rng(0)
    seeds = np.concatenate([rng.integers(-(2**63), 2**63 - 1, 300), [0, -1, -(2**63), 2**63 - 1]])
    positions = np.concatenate([rng.integers(0, 10**6, 300), [0, 1, 2**40, -3]])
    for num_rows in (0, 1, 304):
        expected = row_keys(seeds[:num_rows], positions[:num_rows], CPU)
        on_device = torch.from_numpy(seeds[:num_rows]), torch.from_numpy(positions[:num_rows])
        assert torch.equal(reference.device_row_keys(*on_device), expected)
        assert torch.equal(steps.device_row_keys(*on_device), expected)


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("lengths", ["all", "ragged"])
@pytest.mark.parametrize("seed", [0, 1])
def test_prepare_step(num_drafts: int, lengths: str, seed: int):
    """Kernel == twin == what a host would write down row by row."""
    from atlas_kernels import steps

    state, (slots, drafts, draft_lens) = make_state(seed), make_rows(seed, num_drafts, lengths)
    arguments = (slots, *state.values(), drafts, draft_lens, BLOCK_SIZE)
    got, twin = steps.prepare_step(*arguments), reference.prepare_step(*arguments)
    for name in twin._fields:
        assert torch.equal(getattr(got, name), getattr(twin, name)), name
        assert getattr(got, name).dtype == getattr(twin, name).dtype, name

    last, starts, remaining, seeds, prompt_lens, tables = (x.tolist() for x in state.values())
    assert torch.equal(twin.starts_R, state["starts_S"][slots])
    assert torch.equal(twin.block_tables_RM, state["tables_SM"][slots])
    for row, slot in enumerate(slots.tolist()):
        drafted = num_drafts if draft_lens is None else draft_lens[row].item()
        length = min(1 + drafted, remaining[slot])
        part = slice(row * (num_drafts + 1), (row + 1) * (num_drafts + 1))
        assert twin.query_lens_R[row] == length
        positions = [starts[slot] + min(j, max(length - 1, 0)) for j in range(num_drafts + 1)]
        assert twin.positions_N[part].tolist() == positions
        ids = ([last[slot], *drafts[row].tolist()])[:length]
        assert twin.input_ids_N[part].tolist() == ids + [last[slot]] * (num_drafts + 1 - length)
        kv_slots = [tables[slot][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions[:length]]
        assert twin.kv_slots_N[part].tolist() == kv_slots + [-1] * (num_drafts + 1 - length)
        drawn = np.array(positions) + 1 - prompt_lens[slot]
        keys = row_keys(np.full(len(drawn), seeds[slot]), drawn, CPU)
        assert torch.equal(twin.keys_2N[:, part], keys)


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("stop_ids", [[], [3], [3, 7, 11, 12, 13, 14]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finish_step(num_drafts: int, stop_ids: list[int], seed: int):
    """Kernel == twin == the engine's own count of right draft tokens, cut at a stop token."""
    from atlas_kernels import steps

    num_places, stops = num_drafts + 1, torch.tensor(stop_ids, dtype=torch.int64)
    state, (slots, drafts, draft_lens) = make_state(seed), make_rows(seed, num_drafts, "ragged" if seed else "all")
    slots[:2] = torch.tensor([1, 2])  # one with a single token left, one that stops in the middle of what it accepts
    slots[2:8] = torch.arange(3, 9)
    step = reference.prepare_step(slots, *state.values(), drafts, draft_lens, BLOCK_SIZE)
    tokens = accepted_tokens(step, num_places, seed)
    tokens[num_places : 2 * num_places] = torch.tensor([*drafts[1].tolist(), 49])
    if stop_ids and num_drafts > 1:
        tokens[num_places + 1] = step.input_ids_N[num_places + 2] = 3
    logprobs = -torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    states = [{name: state[name].clone() for name in ("last_tokens_S", "starts_S", "remaining_S")} for _ in range(2)]
    arguments = (slots, step.input_ids_N, tokens, logprobs, step.query_lens_R, stops)
    got = steps.finish_step(*arguments, *states[0].values())
    twin = reference.finish_step(*arguments, *states[1].values())
    for a, b in zip((*got, *states[0].values()), (*twin, *states[1].values())):
        assert torch.equal(a, b) and a.dtype == b.dtype

    expected = {name: state[name].clone() for name in states[0]}
    for row, slot in enumerate(slots.tolist()):
        part, length = slice(row * num_places, (row + 1) * num_places), step.query_lens_R[row].item()
        if not length:
            assert twin[0][row].tolist() == [-1] + [0] * (2 * num_places) and twin[1][row] == row * num_places
            continue
        mine, ids = tokens[part][:length].tolist(), step.input_ids_N[part][:length].numpy()
        num_right = count_accepted(np.array(mine), ids, np.array([length]))[0]
        emitted = mine[: num_right + 1]
        stopped_at = next((i for i, token in enumerate(emitted) if token in stop_ids), None)
        taken = len(emitted) if stopped_at is None else stopped_at + 1
        assert twin[0][row, 0] == num_right and twin[1][row] == row * num_places + taken - 1
        assert torch.equal(twin[0][row, 1:], torch.cat([tokens[part].double(), logprobs[part].double()]))
        expected["last_tokens_S"][slot] = emitted[taken - 1]
        expected["starts_S"][slot] += taken
        expected["remaining_S"][slot] = 0 if stopped_at is not None else state["remaining_S"][slot] - taken
    for name, value in expected.items():
        assert torch.equal(states[1][name], value), name


def test_no_rows():
    from atlas_kernels import steps

    empty = torch.empty(0, dtype=torch.int64)
    state = make_state(0)
    step = steps.prepare_step(empty, *state.values(), empty.view(0, 4), None, BLOCK_SIZE)
    assert step.input_ids_N.numel() == 0 and step.keys_2N.shape == (2, 0)
    changing = [state[name] for name in ("last_tokens_S", "starts_S", "remaining_S")]
    assert steps.finish_step(empty, empty, empty, torch.empty(0), empty, empty, *changing)[1].numel() == 0


def test_compiles_for_ampere_and_hopper():
    from atlas_kernels import steps

    def case(kernel: str, constants: dict, **counts: str) -> Case:
        names = getattr(steps, kernel).arg_names
        pointers = {name: "*i64" for name in names if name.endswith("_ptr") and name not in constants}
        special = {"keys_ptr": "*i32", "logprobs_ptr": "*fp32", "out_ptr": "*fp64"}
        arguments = pointers | {name: kind for name, kind in special.items() if name in names} | counts
        num_warps = 4 if kernel == "row_keys_kernel" else 1
        return Case(
            module="atlas_kernels.steps",
            kernel=kernel,
            arguments={name: arguments[name] for name in names if name in arguments},
            constants=constants,
            num_warps=num_warps,
        )

    strides = dict.fromkeys(["tables_stride", "drafts_row_stride"], "i32")
    counts = strides | dict.fromkeys(["drafts_stride", "num_tokens", "num_places", "num_blocks", "block_size"], "i32")
    blocks = {"BLOCK_M": steps.BLOCK_M}
    check_compiles(
        [
            case("row_keys_kernel", {"BLOCK": steps.BLOCK_N}, num_rows="i32"),
            case("prepare_kernel", {"PLACES": 8} | blocks, **counts),
            case("prepare_kernel", {"PLACES": 1, "draft_lens_ptr": None, "num_places": 1} | blocks, **counts),
            case("finish_kernel", {"PLACES": 8}, num_stops="i32", num_places="i32"),
            case("finish_kernel", {"PLACES": 1, "num_stops": 1, "num_places": 1}),
        ]
    )
