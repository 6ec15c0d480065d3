"""Coupled sampling and filter thresholds: kernels against twins, and both against the engine's own sampling on CPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from compiling import Case, check_compiles

import atlas_kernels
from atlas_kernels import reference, row_keys
from atlas_rl.engine.sampling import SamplingBatch, filter_scores, sample
from atlas_rl.types import SamplingParams

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # as on a GPU

TIE = 1e-5
"""Two perturbed scores that are closer may come in either order."""

LOGPROB_TOLERANCE = {"atol": 2e-5, "rtol": 1e-6}
SHAPES = [(1, 1), (1, 97), (3, 1024), (4, 1025), (2, 5003), (0, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernels(monkeypatch):
    from atlas_kernels import sampling

    monkeypatch.setattr(atlas_kernels, "triton_everywhere", True)
    monkeypatch.setattr(sampling, "num_multiprocessors", lambda device: 1)  # few programs, of several blocks each
    return sampling


def make_logits(
    num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    return (spread * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def make_keys(num_rows: int, seed: int = 0) -> torch.Tensor:
    return row_keys(seed + np.arange(num_rows), np.arange(num_rows) * 7, torch.device("cpu"))


def near_ties(logits_NV, keys_2N, temperature, *, thresholds_N=None, forbidden=None, token_ids_V=None) -> torch.Tensor:
    """Rows whose two best perturbed scores, in float64, are closer than TIE."""
    num_rows, vocab_size = logits_NV.shape
    if vocab_size < 2:
        return torch.zeros(num_rows, dtype=torch.bool)
    ids = torch.arange(vocab_size) if token_ids_V is None else token_ids_V
    scaled = logits_NV.double() / temperature
    scores = scaled + reference.gumbel_noise(keys_2N, vocab_size, torch.float64, ids)
    scores = scores.masked_fill(ids < 0, -torch.inf)
    if thresholds_N is not None:
        scores = scores.masked_fill(scaled < thresholds_N.double()[:, None] - 1e-6, -torch.inf)
    if forbidden is not None:
        scores = scores.masked_fill((ids[:, None] == forbidden[0]).any(-1) & forbidden[1][:, None], -torch.inf)
    best = scores.topk(2).values
    return best[:, 0] - best[:, 1] < TIE


def assert_same_draws(kernels, logits_NV, keys_2N, temperature, **options) -> None:
    tokens, logprobs = kernels.coupled_sample(logits_NV, keys_2N, temperature, **options)
    twin_tokens, twin_logprobs = reference.coupled_sample(logits_NV, keys_2N, temperature, **options)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    sure = torch.ones(len(tokens), dtype=torch.bool)
    if keys_2N is not None:
        sure = ~near_ties(logits_NV, keys_2N, temperature, **options)
        assert (~sure).sum() <= 0.05 * len(sure)
    assert torch.equal(tokens[sure], twin_tokens[sure])
    torch.testing.assert_close(logprobs[sure], twin_logprobs[sure], **LOGPROB_TOLERANCE)


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_coupled_sample(kernels, num_rows: int, vocab_size: int, dtype: torch.dtype, temperature: float):
    logits = make_logits(num_rows, vocab_size, dtype)
    assert_same_draws(kernels, logits, make_keys(num_rows), temperature)
    # equal logits are frequent in 16 bits: the lowest column wins
    assert_same_draws(kernels, logits, None, temperature)


@pytest.mark.parametrize("spread", [0.0, 0.1, 30.0])
def test_flat_and_peaked_rows(kernels, spread: float):
    """From many tokens that could win to one that must; strided rows."""
    logits = make_logits(40, 4000, spread=spread)[:, :3000]
    assert_same_draws(kernels, logits, make_keys(40, seed=5), 1.0)


def test_rising_logits(kernels):
    """Each block has logits far above all before: sums are scaled down again and again, nothing overflows."""
    ramp = torch.linspace(-2000, 2000, 4096).repeat(2, 1)
    for logits in (ramp, ramp.flip(1), ramp.roll(1500, 1)):
        assert_same_draws(kernels, logits, make_keys(2), 1.0)
        assert_same_draws(kernels, logits, None, 1.0)


@pytest.mark.parametrize("greedy", [False, True])
def test_the_number_of_chunks_changes_nothing(kernels, monkeypatch, greedy: bool):
    logits = make_logits(6, 7000, torch.float16, spread=0.5)
    keys = None if greedy else make_keys(6)
    draws = []
    for num_processors in (1, 3, 6, 100):
        monkeypatch.setattr(kernels, "num_multiprocessors", lambda device, count=num_processors: count)
        draws.append(kernels.coupled_sample(logits, keys, 0.8))
    sizes = {kernels.chunk_sizes(6, 7000, n)[1] for n in (1, 3, 6, 100)}
    assert len(sizes) > 2
    for tokens, logprobs in draws[1:]:
        assert torch.equal(tokens, draws[0][0])
        torch.testing.assert_close(logprobs, draws[0][1], **LOGPROB_TOLERANCE)


def test_chunks_cover_the_vocabulary_and_the_device(kernels):
    for num_rows, vocab_size in itertools.product([1, 2, 16, 64, 300, 5000], [1, 1024, 32_000, 151_936, 262_144]):
        chunk_size, num_chunks = kernels.chunk_sizes(num_rows, vocab_size, 132)
        assert (num_chunks - 1) * chunk_size < vocab_size <= num_chunks * chunk_size
        assert num_rows * num_chunks <= max(4 * 132, num_rows)
    assert kernels.chunk_sizes(1, 151_936, 132) == (kernels.BLOCK, 149)
    assert 480 <= 64 * kernels.chunk_sizes(64, 151_936, 132)[1] <= 528


@pytest.mark.parametrize("greedy", [False, True])
def test_masked_and_broken_rows(kernels, greedy: bool):
    logits = make_logits(6, 3000)
    logits[0, 5:] = -torch.inf
    logits[1] = -1e30
    logits[1, 2007] = 0.0
    logits[2, 11], logits[3, 2011], logits[4, 1500:] = torch.nan, torch.inf, torch.inf
    logits[5, :2048] = -torch.inf
    keys = None if greedy else make_keys(6)
    tokens, logprobs = kernels.coupled_sample(logits, keys, 1.0)
    twin_tokens, twin_logprobs = reference.coupled_sample(logits, keys, 1.0)
    fine = torch.tensor([0, 1, 5])
    assert torch.equal(tokens[fine], twin_tokens[fine]) and tokens[1] == 2007
    torch.testing.assert_close(logprobs[fine], twin_logprobs[fine], **LOGPROB_TOLERANCE)
    assert logprobs[2:5].isnan().all() and twin_logprobs[2:5].isnan().all()
    assert ((tokens >= 0) & (tokens < 3000)).all()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholds_forbidden_ids_and_a_part_of_the_vocabulary(kernels, dtype: torch.dtype, greedy: bool):
    num_rows, vocab_size = 5, 2500
    logits, keys = make_logits(num_rows, vocab_size, dtype), None if greedy else make_keys(num_rows)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randperm(50_000, generator=generator)[:vocab_size]
    token_ids[torch.randperm(vocab_size, generator=generator)[:300]] = -1
    logits[:, token_ids == -1] += 30  # they would win
    ids = token_ids[token_ids >= 0][:7]
    logits[:, (token_ids[:, None] == ids).any(-1)] += 40
    # one row allows just a few columns, one filters nothing
    thresholds = torch.tensor([9.0, 0.0, -torch.inf, 5.0, 10.0])
    forbidden = ids, torch.tensor([True, False, True, True, True])
    given = {"thresholds_N": thresholds, "forbidden": forbidden, "token_ids_V": token_ids}
    plain_ids = {"thresholds_N": thresholds, "forbidden": (torch.nonzero(token_ids >= 0)[:7, 0], forbidden[1])}
    for options in (given, plain_ids, *({name: value} for name, value in given.items())):
        assert_same_draws(kernels, logits, keys, 0.9, **options)
    tokens, _ = kernels.coupled_sample(logits, keys, 0.9, **given)
    assert (tokens[forbidden[1], None] != ids).all() and (tokens >= 0).all() and (tokens[1] == ids).any()


def test_a_forbidden_token_far_above_all_others(kernels):
    """Its neighbours' probabilities are 0 in float32; the draw is among them all the same, and so is their log-prob."""
    logits = make_logits(2, 3000)
    logits[:, 1234] = 500.0
    forbidden = torch.tensor([1234]), torch.tensor([True, False])
    assert_same_draws(kernels, logits, make_keys(2), 1.0, forbidden=forbidden)
    assert kernels.coupled_sample(logits, make_keys(2), 1.0, forbidden=forbidden)[0][1] == 1234


FILTERS = [{"top_k": 1}, {"top_k": 40}, {"top_k": 10**6}, {"top_p": 0.0}, {"top_p": 0.9}, {"min_p": 0.05}, {}]
FILTERS += [{"top_k": 50, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.01}, {"top_k": 20, "top_p": 0.9, "min_p": 0.1}]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_filter_thresholds(kernels, filters: dict, dtype: torch.dtype):
    forbidden = torch.tensor([3, 77, 900]), torch.tensor([True, False, True, False])
    logits = make_logits(4, 1003, dtype)
    logits[:, 77] = 20.0
    logits[1, 100:] = -torch.inf
    for options in ({}, {"forbidden": forbidden}):
        got = kernels.filter_thresholds(logits, 0.8, **filters, **options)
        twin = reference.filter_thresholds(logits, 0.8, **filters, **options)
        assert got.dtype == twin.dtype == torch.float32
        torch.testing.assert_close(got, twin, atol=1e-6, rtol=1e-6)
    assert kernels.filter_thresholds(logits[:0], 0.8, **filters).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_at_a_boundary_stay_together(kernels, dtype: torch.dtype):
    row = torch.tensor([-1.0, 2.0, 0.0, -0.0, 2.0, 0.0, -5.0, 1.0], dtype=dtype)[None]
    for ops in (kernels, reference):
        assert ops.filter_thresholds(row, 1.0, top_k=1) == 2
        assert ops.filter_thresholds(row, 1.0, top_k=4) == 0
        assert ops.filter_thresholds(row, 0.5, top_k=7) == -2
        assert ops.filter_thresholds(row.flip(1), 1.0, top_p=0.1) == 2
        assert ops.filter_thresholds(torch.full_like(row, -3.0), 1.0, top_p=0.5, top_k=3) == -3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "filters", [{"top_k": k} for k in (1, 7, 50, 99, 100)] + [{"top_p": p} for p in (0.02, 0.5, 0.97)]
)
def test_neighbouring_values(kernels, dtype: torch.dtype, filters: dict):
    """The boundary lies between values with none between them, several times each: bisection has to end on the very one."""
    steps = torch.randint(30, (6, 100), generator=torch.Generator().manual_seed(1))
    logits = (1 + torch.finfo(dtype).eps * steps * torch.tensor([1, -1]).repeat(3)[:, None]).to(dtype)
    got, twin = (ops.filter_thresholds(logits, 1.0, **filters) for ops in (kernels, reference))
    assert torch.equal(got, twin)


@pytest.mark.parametrize("ops", ["kernels", "twins"])
@pytest.mark.parametrize("too_early", [False, True])
def test_draws_are_those_of_the_engine(kernels, ops: str, too_early: bool):
    """All combinations of filters, and of rows in which a stop token cannot be drawn yet."""
    module, num_rows, num_ties = kernels if ops == "kernels" else reference, 2, 0
    choices = itertools.product([0, 1, 30], [1.0, 0.7], [0.0, 0.1], [1.0, 0.6], [False, True])
    for i, (top_k, top_p, min_p, temperature, greedy) in enumerate(choices):
        params = SamplingParams(
            temperature=0.0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            min_new_tokens=4 if too_early else 0,
            eos_token_ids=(5,),
            stop_token_ids=(9, 10**6),
        )
        logits = make_logits(num_rows + i, 600)[:num_rows]
        logits[:, 9] += 9
        seeds, positions = np.arange(num_rows), np.arange(num_rows)
        batch = SamplingBatch.of(params, seeds, positions, torch.device("cpu"))
        expected, logprobs = sample(logits.clone(), batch)

        temperature = 1.0 if greedy else temperature
        forbidden = (torch.tensor([5, 9, 10**6]), batch.too_early_N) if too_early else None
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        thresholds = None if greedy else module.filter_thresholds(logits, temperature, **filters, forbidden=forbidden)
        keys = None if greedy else batch.keys_2N
        drawn = module.coupled_sample(logits, keys, temperature, thresholds_N=thresholds, forbidden=forbidden)
        sure = torch.ones(num_rows, dtype=torch.bool)
        if not greedy:
            scores = filter_scores(logits, logits / temperature, batch) + reference.gumbel_noise(keys, 600)
            best = scores.topk(2).values
            sure = best[:, 0] - best[:, 1] >= TIE
        num_ties += (~sure).sum()
        assert torch.equal(drawn[0][sure], expected[sure]), params
        torch.testing.assert_close(drawn[1][sure], logprobs[sure], **LOGPROB_TOLERANCE)
    assert num_ties <= 2


def test_dispatch(kernels, monkeypatch):
    """float64 is the twin's; on CPU plain float32 is C++'s, all else the twin's."""
    logits, keys = make_logits(2, 50), make_keys(2)
    assert atlas_kernels.coupled_sample(logits.double(), keys, 1.0)[1].dtype == torch.float64
    assert torch.equal(atlas_kernels.filter_thresholds(logits.double(), 1.0, top_k=3), logits.topk(3).values[:, -1])

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(reference, "coupled_sample", refuse)
    monkeypatch.setattr(atlas_kernels.cpu, "coupled_sample", refuse)
    atlas_kernels.coupled_sample(logits, keys, 1.0)  # Triton, under its interpreter
    monkeypatch.setattr(atlas_kernels, "triton_everywhere", False)
    for plain in (logits, logits.half()):
        with pytest.raises(AssertionError):
            atlas_kernels.coupled_sample(plain, keys, 1.0)


def test_compiles_for_ampere_and_hopper(kernels):
    pointers = {"offset_ptr": "*i32", "stride_ptr": "*i32", "thresholds_ptr": "*fp32", "forbidden_ids_ptr": "*i64"}
    pointers |= {"is_forbidden_ptr": "*i1", "token_ids_ptr": "*i64", "best_ptr": "*fp32", "columns_ptr": "*i32"}
    pointers |= {
        "bases_ptr": "*fp32",
        "totals_ptr": "*fp32",
        "tokens_ptr": "*i64",
        "logprobs_ptr": "*fp32",
        "out_ptr": "*fp32",
    }
    sizes = dict.fromkeys(["logits_stride", "num_forbidden", "vocab_size", "chunk_size", "num_chunks", "top_k"], "i32")
    sizes |= dict.fromkeys(["inverse_temperature", "top_p", "top_p_span", "log_min_p"], "fp32")
    noise, ids, forbidden = ["offset_ptr", "stride_ptr"], ["token_ids_ptr"], ["forbidden_ids_ptr", "is_forbidden_ptr"]

    def case(kernel: str, dtype: str, num_warps: int, absent: list[str] = (), **constants) -> Case:
        names = getattr(kernels, kernel).arg_names
        types = {"logits_ptr": dtype} | pointers | sizes
        constants |= dict.fromkeys(absent)
        arguments = {name: types[name] for name in names if name not in constants}
        return Case(
            module="atlas_kernels.sampling",
            kernel=kernel,
            arguments=arguments,
            constants=constants,
            num_warps=num_warps,
        )

    cases = []
    for dtype in ("*bf16", "*fp32"):
        for absent in (
            ["thresholds_ptr", *forbidden, *ids],
            [*noise, "thresholds_ptr", *forbidden, *ids],
            [*forbidden, *ids],
            ids,
            [],
        ):
            cases.append(case("sample_kernel", dtype, kernels.NUM_WARPS, absent, BLOCK=kernels.BLOCK))
        filters = {"TOP_K": True, "TOP_P": True, "BLOCK": kernels.FILTER_BLOCK}
        shift = kernels.UNUSED_BITS[torch.bfloat16 if dtype == "*bf16" else torch.float32]
        for absent in (forbidden, []):
            cases.append(case("threshold_kernel", dtype, kernels.FILTER_WARPS, absent, SHIFT=shift, **filters))
    cases.append(case("combine_kernel", "*bf16", 1, ids, CHUNKS=256))
    # Triton takes an integer that is 1 for a constant
    cases.append(case("combine_kernel", "*bf16", 1, CHUNKS=1, num_chunks=1))
    cases.append(case("sample_kernel", "*bf16", kernels.NUM_WARPS, BLOCK=kernels.BLOCK, num_forbidden=1))
    filters = {"TOP_K": True, "TOP_P": False, "SHIFT": 16, "BLOCK": kernels.FILTER_BLOCK}
    cases.append(case("threshold_kernel", "*bf16", kernels.FILTER_WARPS, top_k=1, num_forbidden=1, **filters))
    check_compiles(cases)
