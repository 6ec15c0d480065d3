"""Configs and parameters: defaults, YAML round trip, and errors that name field and remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atlas_rl.config import AdaptConfig, AtlasConfig, EngineConfig, read_yaml
from atlas_rl.types import SamplingParams


def test_defaults_need_no_argument():
    assert AtlasConfig().drafter_names == ("suffix", "recurrent", "static")
    assert AtlasConfig(speculate=False).drafter_names == ()
    assert AtlasConfig(lookahead=0).drafter_names == ()


def test_yaml_round_trip(tmp_path):
    config = AtlasConfig(
        drafters=("suffix", "static"),
        lookahead=3,
        static_drafter="some/drafter",
        retrain="on_drift",
        deterministic=True,
        engine=EngineConfig(block_size=8, kv_memory_gib=0.5),
        adapt=AdaptConfig(max_share=0.3, learning_rate=1e-5, intermediate_size=64),
    )
    config.to_yaml(tmp_path / "atlas.yaml")
    assert AtlasConfig.from_yaml(tmp_path / "atlas.yaml") == config
    AtlasConfig().to_yaml(tmp_path / "default.yaml")
    assert AtlasConfig.from_yaml(tmp_path / "default.yaml") == AtlasConfig()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lookahed": 3}, ["lookahed", "lookahead"]),
        ({"engine": {"blocksize": 3}}, ["engine.blocksize", "block_size"]),
        ({"engine": 3}, ["engine"]),
        ({"engine": {"block_size": 0}}, ["engine.block_size"]),
        ({"engine": {"kv_memory_gib": -1.0}}, ["engine.kv_memory_gib", "null"]),
        ({"lookahead": "four"}, ["lookahead"]),
        ({"lookahead": -1}, ["lookahead"]),
        ({"drafters": ["eagel"]}, ["drafters", "eagel", "suffix"]),
        ({"speculate": "maybe"}, ["speculate"]),
        ({"retrain": "sometimes"}, ["retrain", "sometimes", "on_drift"]),
        ({"retrain": 3}, ["retrain"]),
        ({"static_drafter": 3}, ["static_drafter"]),
        ({"drafters": []}, ["drafters", "recurrent"]),
        ({"adapt": {"max_shar": 0.1}}, ["adapt.max_shar", "max_share"]),
        ({"adapt": {"max_share": 0.0}}, ["adapt.max_share"]),
        ({"adapt": {"max_share": 1.5}}, ["adapt.max_share"]),
        ({"adapt": {"max_share": "much"}}, ["adapt.max_share"]),
        ({"adapt": {"tokens_per_update": 0}}, ["adapt.tokens_per_update"]),
        ({"adapt": {"deterministic_steps": 0}}, ["adapt.deterministic_steps"]),
        ({"adapt": {"depth": 0}}, ["adapt.depth"]),
        ({"adapt": {"max_tokens": 0}}, ["adapt.max_tokens"]),
        ({"adapt": {"rollouts_kept": 0}}, ["adapt.rollouts_kept"]),
        ({"adapt": {"learning_rate": 0.0}}, ["adapt.learning_rate"]),
        ({"adapt": {"learning_rate": float("nan")}}, ["adapt.learning_rate"]),
        ({"adapt": {"max_grad_norm": -1.0}}, ["adapt.max_grad_norm"]),
        ({"adapt": {"tolerance": 1.0}}, ["adapt.tolerance"]),
        ({"adapt": {"tolerance": -0.1}}, ["adapt.tolerance"]),
        ({"adapt": {"intermediate_size": 0}}, ["adapt.intermediate_size"]),
    ],
)
def test_bad_values_are_named(values: dict, words: list[str]):
    with pytest.raises(ValueError) as caught:
        AtlasConfig.from_dict(values)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("text", "words"), [("a: [1", ["not valid YAML"]), ("- a\n- b", ["field: value"])])
def test_broken_yaml_is_named(tmp_path, text: str, words: list[str]):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", (4, 0)),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_bad_sampling_params_are_named(field: str, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_min_longer_than_max_is_named():
    with pytest.raises(ValueError, match="min_new_tokens=9.*max_new_tokens=8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8)


def test_lengths_per_completion():
    assert SamplingParams(max_new_tokens=[3, 4]).max_lens(2) == (3, 4)
    with pytest.raises(ValueError, match="3 completions"):
        SamplingParams(max_new_tokens=(3, 4)).max_lens(3)


def test_the_package_imports_without_torch():
    code = "import atlas_rl, sys; atlas_rl.AtlasConfig(); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
