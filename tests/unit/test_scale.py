"""Projections of `python -m atlas_rl.bench.scale`: sizes against transformers' own models, sums by hand, one real measurement."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from atlas_rl.bench import scale


def shapes_of(name: str) -> Qwen3Config:
    hidden, mlp, layers, heads, tied = scale.SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": scale.VOCAB}
    heads = {"num_attention_heads": heads, "num_key_value_heads": scale.KV_HEADS, "head_dim": scale.HEAD_DIM}
    return Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", scale.SHAPES)
def test_a_policy_has_as_many_parameters_as_transformers_says(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes_of(name))
    policy = scale.Policy.of(name)
    assert policy.total == sum(p.numel() for p in model.parameters())
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert policy.adapted == sum(m.weight.numel() for m in linears)
    assert policy.adapters == scale.LORA_RANK * sum(m.in_features + m.out_features for m in linears)


def test_memory_and_traffic():
    policy = scale.Policy(total=1000, adapted=900, adapters=10, drafter=5, kv_bytes_per_token=1)
    assert scale.memory(policy, "zero2", 8) == {
        "weights": 2000, "training": 1750, "copy": 0, "drafter": 80, "total": 3830,
    }  # fmt: skip
    zero3, fsdp2, lora = (scale.memory(policy, mode, 8) for mode in ("zero3", "fsdp2", "lora"))
    assert (zero3["weights"], zero3["copy"]) == (250, 2000)
    assert zero3["total"] == fsdp2["total"], "float32 shards, or bf16 ones and a master in the optimizer"
    assert (lora["weights"], lora["training"], lora["copy"]) == (2000, 17.5, 1800)
    assert scale.traffic(policy, "zero3", 4)["weights"] == 1500 and scale.traffic(policy, "lora", 4)["weights"] == 0
    assert scale.traffic(policy, "zero2", 4)["gradients"] == 30


def test_unit_costs_are_measured_and_put_into_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scale", "--markdown", "--megabytes", "2", "--devices", "2,16"])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    scale.main()
    text = capsys.readouterr().out
    assert (
        "2 processes over gloo: gather " in text
        and "2 / 16" in text
        and text.count("| 32B") + text.count("|    32B") == 4
    )
