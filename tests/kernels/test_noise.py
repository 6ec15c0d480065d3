"""The noise: same integers everywhere, a Gumbel distribution, independent over seeds, positions and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiling import Case, check_compiles
from scipy import stats

from atlas_kernels import gumbel_noise, noise_bits, reference, row_keys

triton = pytest.importorskip("triton")

SHAPES = [(1, 1), (1, 97), (3, 2048), (5, 4099), (0, 64)]


def keys_of(seeds, positions) -> torch.Tensor:
    return row_keys(np.array(seeds, np.int64), np.array(positions, np.int64), torch.device("cpu"))


def random_keys(num_rows: int) -> torch.Tensor:
    rng = np.random.default_rng(num_rows)
    return keys_of(rng.integers(-(2**63), 2**63 - 1, num_rows), rng.integers(0, 100_000, num_rows))


@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_kernel_equals_twin(num_rows: int, vocab_size: int):
    from atlas_kernels import noise

    keys = random_keys(num_rows)
    assert torch.equal(noise.noise_bits(keys, vocab_size), reference.noise_bits(keys, vocab_size))
    exact = reference.gumbel_noise(keys, vocab_size, torch.float64)
    ulp = 2.0**-23 * exact.abs().clamp(min=1)
    for value in (
        noise.gumbel_noise(keys, vocab_size),
        reference.gumbel_noise(keys, vocab_size),
    ):
        # 2 ulp, and 1 more: the interpreter's numpy.log is less exact than a GPU's
        assert ((value.double() - exact).abs() <= 3 * ulp).all()


def test_integers_follow_the_published_hashes():
    """One value by hand, in Python's own integers: splitmix64 for the row, lowbias32 for the token."""

    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    seed, position, token = 123456789, 42, 1000
    key = splitmix64((splitmix64(seed) + position * 0x9E3779B97F4A7C15) % 2**64)
    x = (token * (key >> 32 | 1) + key) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    expected = (x ^ (x >> 16)) >> 1
    assert noise_bits(keys_of([seed], [position]), token + 1)[0, token] == expected


def test_a_value_does_not_depend_on_its_batch_or_vocabulary():
    keys = random_keys(64)
    together = gumbel_noise(keys, 1000)
    alone = torch.cat([gumbel_noise(keys[:, i : i + 1], 777) for i in range(64)])
    assert torch.allclose(together[:, :777], alone, rtol=0, atol=3e-7)
    assert torch.equal(noise_bits(keys, 1000)[:, :777], noise_bits(keys, 777))


def test_noise_is_standard_gumbel():
    values = gumbel_noise(keys_of(range(200), [0] * 200), 10_000).flatten().numpy()
    assert values.min() > reference.MIN_GUMBEL and values.max() < reference.MAX_GUMBEL
    assert stats.kstest(values[::20], "gumbel_r").pvalue > 1e-3
    # the upper tail decides rare tokens: P(g > 8) = 1 - exp(-exp(-8)), 671 expected of 2 million
    expected = len(values) * -np.expm1(-np.exp(-8.0))
    assert abs((values > 8).sum() - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_neighbours_are_uncorrelated(axis: str):
    seeds, positions = np.arange(400), np.arange(400)
    base = gumbel_noise(keys_of(seeds, positions), 1001)
    if axis == "seed":
        other = gumbel_noise(keys_of(seeds + 1, positions), 1001)
    elif axis == "position":
        other = gumbel_noise(keys_of(seeds, positions + 1), 1001)
    else:
        base, other = base[:, :-1], base[:, 1:]
    correlation = np.corrcoef(base.flatten().numpy(), other.flatten().numpy())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(400_000)


def test_compiles_for_ampere_and_hopper():
    keys = {"offset_ptr": "*i32", "stride_ptr": "*i32", "vocab_size": "i32"}
    check_compiles(
        [
            Case(
                module="atlas_kernels.noise",
                kernel="noise_kernel",
                arguments={"out_ptr": out} | keys,
                constants={"GUMBEL": is_gumbel, "BLOCK": 2048},
            )
            for is_gumbel, out in ((True, "*fp32"), (False, "*i32"))
        ]
    )
