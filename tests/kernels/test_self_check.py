"""The check that kernels pass before a GPU's work is trusted to them: under the interpreter all do, and a broken one is found."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

import atlas_kernels
from atlas_kernels import self_check
from atlas_kernels.checks import WrongResult, relative_error

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.fixture
def unasked(monkeypatch):
    monkeypatch.setattr(self_check, "_reasons", {})


@pytest.mark.parametrize("name", self_check.MODULES)
def test_every_kernel_passes(name):
    for dtype in self_check.dtypes_of(name):
        assert self_check.error_of(name, CPU, dtype) <= 0.01


def test_every_dispatched_op_is_checked():
    no_ops = {"SharedPrefixes", "StepInputs", "cpu", "fix_routes", "row_keys", "unavailable_reason", "uses_triton"}
    assert set(atlas_kernels.__all__) - no_ops == set(self_check.MODULES)


def test_a_wrong_kernel_is_found_and_none_is_used_then(monkeypatch, caplog, unasked):
    attention = importlib.import_module("atlas_kernels.attention")
    right = attention.paged_attention
    monkeypatch.setattr(attention, "paged_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    found = self_check.failures(CPU)
    assert list(found) == ["paged_attention"] and "off by" in found["paged_attention"]
    with caplog.at_level(logging.WARNING):
        reasons = {atlas_kernels.unavailable_reason(CPU) for _ in range(3)}
    assert len(reasons) == 1 and "paged_attention" in reasons.pop()
    assert len(caplog.records) == 1 and "paged_attention" in caplog.text

    class OnGPU:
        is_cuda, device, dtype = True, CPU, torch.float32

    assert not atlas_kernels.uses_triton(OnGPU())
    monkeypatch.setattr(atlas_kernels, "triton_everywhere", True)
    assert atlas_kernels.uses_triton(OnGPU()), "tests may force kernels on"


def test_a_kernel_that_does_not_compile_is_found(monkeypatch):
    def broken(*args):
        raise RuntimeError("ptxas fatal: unknown target\nand a page of what it was given")

    monkeypatch.setattr(importlib.import_module("atlas_kernels.noise"), "noise_bits", broken)
    monkeypatch.setattr(self_check, "MODULES", {"noise_bits": "noise", "store_kv": "rotary"})
    assert self_check.failures(CPU) == {"noise_bits": "RuntimeError: ptxas fatal: unknown target (torch.float32)"}


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch, unasked):
    monkeypatch.setattr(self_check, "failures", lambda device: pytest.fail("it ran within a capture"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert atlas_kernels.unavailable_reason(torch.device("cuda", 0)) is None
    assert not self_check._reasons, "it is asked again later"


def test_a_check_does_not_ask_whether_it_may(monkeypatch, unasked):
    def failures(device):
        assert atlas_kernels.unavailable_reason(device) is None
        return {}

    monkeypatch.setattr(self_check, "failures", failures)
    assert atlas_kernels.unavailable_reason(CPU) is None


def test_errors_are_relative_and_nan_is_no_small_one():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert relative_error(x, x) == 0
    wrong = x.clone()
    wrong[7] += 1
    assert relative_error(wrong, x) > 0.2
    wrong[7] = torch.nan
    assert not relative_error(wrong, x) <= 1e9
    with pytest.raises(WrongResult):
        relative_error(x, x[:50])
