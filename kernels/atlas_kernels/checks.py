"""One check per op: inputs of some sizes, the Triton launcher and the torch twin on them, and how far they are apart.

The twin computes in float64 where it can. Shapes as in the twins' modules: N tokens or rows, R rows of a batch, V vocabulary,
D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from atlas_kernels import reference


class WrongResult(Exception):
    """A kernel ran, and what it left is not what its twin leaves."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the inputs; rows are ragged up to these."""

    num_rows: int = 3
    num_queries: int = 3
    """Tokens of a row in one forward, at most."""
    context: int = 40
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    hidden: int = 64
    intermediate: int = 160
    vocab: int = 1000
    linears: tuple[tuple[int, str], ...] = ((3, "down"),)
    """Rows and kinds of `fused_linear`: qkv (norm), out, gate_up (norm, gate), down (residual). Each has several routes."""


class Inputs:
    """Random, the same for the same sizes; the global generators are left alone."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def randn(self, *dims: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(dims, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *dims: int) -> torch.Tensor:
        return torch.randint(low, high, dims, generator=self.generator, device=self.device)

    def tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def keys(self, num_rows: int) -> torch.Tensor:
        seeds = self.integers(-(2**62), 2**62, num_rows)
        return reference.device_row_keys(seeds, self.integers(0, 5000, num_rows))

    def cache(self) -> torch.Tensor:
        """One layer [2, blocks, KV heads, S, D] with a spare block."""
        sizes = self.sizes
        return self.randn(2, sizes.num_rows * self.num_blocks + 1, sizes.num_kv_heads, sizes.block_size, sizes.head_dim)

    def tables(self) -> torch.Tensor:
        """[R, M] blocks, in any order."""
        num_rows = self.sizes.num_rows
        order = torch.randperm(num_rows * self.num_blocks, generator=self.generator, device=self.device)
        return order.view(num_rows, self.num_blocks)

    @property
    def num_blocks(self) -> int:
        """M, of a row."""
        return -(-self.sizes.context // self.sizes.block_size)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, each over what is expected there plus the root of the mean square; NaN where anything is not finite."""
    if got.shape != expected.shape:
        raise WrongResult(f"its shape is {tuple(got.shape)}, not {tuple(expected.shape)}")
    expected = expected.double()
    size = expected.abs() + expected.square().mean().sqrt().clamp(min=1e-30)
    return float(((got.double() - expected).abs() / size).max())


def require_equal(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit by bit; NaN equals NaN."""
    same = (got == expected) | ((got != got) & (expected != expected))
    if got.shape != expected.shape or not bool(same.all()):
        raise WrongResult(f"{what} differ")


# ---- a check per op: launcher and inputs in, relative error out; the others are in `layer_checks` ----------------------------


def check_noise_bits(launcher: Callable, inputs: Inputs) -> float:
    keys, vocab = inputs.keys(inputs.sizes.num_rows), inputs.sizes.vocab
    require_equal(launcher(keys, vocab), reference.noise_bits(keys, vocab), "noise bits")
    return 0.0


def check_gumbel_noise(launcher: Callable, inputs: Inputs) -> float:
    keys, vocab = inputs.keys(inputs.sizes.num_rows), inputs.sizes.vocab
    error = relative_error(launcher(keys, vocab), reference.gumbel_noise(keys, vocab, torch.float64))
    if not error <= 1e-5:  # a fast logarithm would pass what other kernels are judged by
        raise WrongResult(f"the noise is off by {error:.2g}")
    return error


def check_device_row_keys(launcher: Callable, inputs: Inputs) -> float:
    seeds = inputs.integers(-(2**62), 2**62, 300)
    seeds[:2] = inputs.tensor([-(2**63), 2**63 - 1])
    positions = inputs.integers(0, 10**6, 300)
    require_equal(launcher(seeds, positions), reference.device_row_keys(seeds, positions), "row keys")
    return 0.0


def _state(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Slots of ragged rows: one is finished, one has one token left; the last is padding."""
    sizes, num_slots = inputs.sizes, inputs.sizes.num_rows + 1
    prompt_lens = inputs.integers(1, sizes.context // 2, num_slots)
    remaining = inputs.integers(2, 15, num_slots)
    remaining[:2], remaining[-1] = inputs.tensor([0, 1]), 0
    tables = torch.cat([inputs.tables(), inputs.tables()[:1]])
    return {
        "last_tokens_S": inputs.integers(0, 50, num_slots),
        "starts_S": prompt_lens + inputs.integers(0, sizes.context // 2 - sizes.num_queries, num_slots),
        "remaining_S": remaining,
        "seeds_S": inputs.integers(-(2**62), 2**62, num_slots),
        "prompt_lens_S": prompt_lens,
        "tables_SM": tables,
    }


def _prepared(op: Callable, inputs: Inputs, state: dict[str, torch.Tensor]) -> reference.StepInputs:
    num_slots, num_drafts = len(state["starts_S"]), inputs.sizes.num_queries - 1
    slots = torch.arange(num_slots, device=inputs.device)
    drafts = (7 * slots[:, None] + torch.arange(num_drafts, device=inputs.device)) % 50
    return op(slots, *state.values(), drafts, slots % (num_drafts + 1), inputs.sizes.block_size)


def check_prepare_step(launcher: Callable, inputs: Inputs) -> float:
    state = _state(inputs)
    for name, x, y in zip(
        reference.StepInputs._fields,
        _prepared(launcher, inputs, state),
        _prepared(reference.prepare_step, inputs, state),
    ):
        require_equal(x, y, name)
    return 0.0


def check_finish_step(launcher: Callable, inputs: Inputs) -> float:
    state = _state(inputs)
    step = _prepared(reference.prepare_step, inputs, state)
    num_rows, num_places = len(step.query_lens_R), inputs.sizes.num_queries
    tokens = step.input_ids_N.view(num_rows, num_places).roll(-1, 1)  # every draft token is right, up to a place
    wrong = torch.arange(num_places, device=inputs.device) >= torch.arange(num_rows, device=inputs.device)[:, None]
    drawn = (
        torch.where(wrong, 49 - tokens, tokens).flatten(),
        inputs.randn(num_rows * num_places, dtype=torch.float32),
    )
    left = []
    for op in (launcher, reference.finish_step):
        rows = [state[name].clone() for name in ("last_tokens_S", "starts_S", "remaining_S")]
        slots = torch.arange(num_rows, device=inputs.device)
        out = op(slots, step.input_ids_N, *drawn, step.query_lens_R, inputs.tensor([3, 17]), *rows)
        left.append([*out, *rows])
    for name, x, y in zip(("outputs", "places", "last tokens", "starts", "remaining"), *left):
        require_equal(x, y, name)
    return 0.0


def check_coupled_sample(launcher: Callable, inputs: Inputs) -> float:
    sizes = inputs.sizes
    logits, keys = inputs.randn(sizes.num_rows, sizes.vocab) * 3, inputs.keys(sizes.num_rows)
    forbidden = (inputs.integers(0, sizes.vocab, 2), torch.arange(sizes.num_rows, device=inputs.device) % 2 == 0)
    thresholds = reference.filter_thresholds(logits, 0.7, top_k=50)
    ids = torch.randperm(sizes.vocab, generator=inputs.generator, device=inputs.device)
    ids[-3:] = -1
    cases = [
        (keys, 1.0, {}),
        (keys, 0.7, {"thresholds_N": thresholds - 1e-4, "forbidden": forbidden}),
        (keys, 1.0, {"token_ids_V": ids}),
        (None, 1.0, {}),
    ]
    return max(_sampling_error(launcher, logits, *case) for case in cases)


def _sampling_error(
    launcher: Callable, logits: torch.Tensor, keys: torch.Tensor | None, temperature: float, options: dict[str, Any]
) -> float:
    """Of the log-probs. A token may be another than the twin's where both score the same."""
    tokens, logprobs = launcher(logits, keys, temperature, **options)
    expected, expected_logprobs = reference.coupled_sample(logits.double(), keys, temperature, **options)
    columns = [tokens, expected]
    if "token_ids_V" in options:
        column_of = options["token_ids_V"].argsort()[3:]  # behind the three that are no token
        ordered = options["token_ids_V"][column_of]
        columns = [column_of[torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)] for x in columns]
    scores = logits.double() / temperature
    if keys is not None:
        scores += reference.gumbel_noise(keys, logits.shape[1], torch.float64, options.get("token_ids_V"))
    lost = scores.gather(1, columns[1][:, None]) - scores.gather(1, columns[0][:, None])
    if not float(lost.abs().max()) <= 1e-4:
        raise WrongResult(f"coupled_sample drew a token that scores {float(lost.abs().max()):.2g} less than another")
    same = tokens == expected
    return relative_error(logprobs[same], expected_logprobs[same]) if bool(same.any()) else 0.0


def check_filter_thresholds(launcher: Callable, inputs: Inputs) -> float:
    """In the share of probability that is kept. Top-k alone has to be exact."""
    logits = inputs.randn(inputs.sizes.num_rows, inputs.sizes.vocab) * 2
    errors = []
    for cuts in ({"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 200, "top_p": 0.8, "min_p": 0.01}):
        got, expected = (op(logits, 0.8, **cuts)[:, None] for op in (launcher, reference.filter_thresholds))
        scaled = logits.float() / 0.8
        if cuts == {"top_k": 40}:  # the thresholds themselves may be rounded differently
            require_equal(
                (scaled >= got - 1e-5).sum(1), (scaled >= expected - 1e-5).sum(1), "top-k's numbers of tokens"
            )
        probs = scaled.double().softmax(-1)
        shares = [(probs * (scaled >= x - 1e-5)).sum(1) for x in (got, expected)]
        errors.append(relative_error(*shares) / 10)  # a token at top-p's very boundary may fall on either side
    return max(errors)


def check_lk_hybrid(launcher: Callable, inputs: Inputs) -> float:
    """Over the whole vocabulary, and over a draft vocabulary of a third of it."""
    sizes, errors = inputs.sizes, []
    target = inputs.randn(sizes.num_rows, sizes.vocab) * 2
    for ids in (None, torch.arange(0, sizes.vocab, 3, device=inputs.device)):
        draft = inputs.randn(sizes.num_rows, sizes.vocab if ids is None else len(ids)) * 2
        got, expected = launcher(draft, target, ids), reference.lk_hybrid(draft.double(), target.double(), ids)
        errors += [relative_error(x, y) for x, y in zip(got, expected, strict=True)]
    return max(errors)
