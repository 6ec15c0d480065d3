"""Which drafters a config means, for a policy."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import tiny_llama

from atlas_rl.config import AtlasConfig
from atlas_rl.drafters import arms_of, build_drafters
from atlas_rl.drafters.checkpoints import save_head
from atlas_rl.drafters.eagle_head import EagleHead
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.policy_view import PolicyView


@pytest.fixture(scope="module")
def view() -> PolicyView:
    return PolicyView(tiny_llama())


@pytest.fixture
def folder(view, tmp_path):
    save_head(RecurrentHead.for_policy(view), tmp_path / "head")
    return str(tmp_path / "head")


def names(drafters) -> list[str]:
    return [drafter.name for drafter in drafters.all]


@pytest.mark.parametrize(
    ("options", "expected", "num_new"),
    [
        ({}, ["suffix", "static", "recurrent"], 2),
        ({"retrain": "never"}, ["suffix"], 0),
        ({"speculate": False}, [], 0),
        ({"lookahead": 0}, [], 0),
        ({"drafters": ("suffix",)}, ["suffix"], 0),
        ({"drafters": ("recurrent",)}, ["recurrent"], 1),
        ({"drafters": ("recurrent", "static")}, ["static", "recurrent"], 2),
    ],
)
def test_without_a_head_new_ones_are_made(view, options, expected, num_new):
    drafters = build_drafters(AtlasConfig(**options), view)
    assert names(drafters) == expected and len(drafters.of_new_head) == num_new == 2 * drafters.is_new - (num_new == 1)
    assert (drafters.adaptive is not None) == ("recurrent" in expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["suffix", "static", "recurrent"]),
        ({"retrain": "never"}, ["suffix", "static"]),
        ({"retrain": "never", "drafters": ("recurrent",)}, ["recurrent"]),
        ({"drafters": ("static",)}, ["static"]),
    ],
)
def test_a_recurrent_head_is_where_both_start(view, folder, options, expected):
    drafters = build_drafters(AtlasConfig(static_drafter=folder, **options), view)
    assert names(drafters) == expected and not drafters.is_new
    if expected[-2:] == ["static", "recurrent"]:
        static, adaptive = drafters.all[-2:]
        assert torch.equal(static.head.fc.weight, adaptive.head.fc.weight)
        assert static.head.fc.weight.data_ptr() != adaptive.head.fc.weight.data_ptr(), "the frozen one stays"


def test_other_static_drafters_go_beside_a_new_head(view, tmp_path):
    save_head(
        EagleHead.for_policy(view.model.config, (0, 1)), tmp_path / "eagle", output_head=view.model.lm_head.weight
    )
    drafters = build_drafters(AtlasConfig(static_drafter=str(tmp_path / "eagle")), view)
    assert names(drafters) == ["suffix", "static", "recurrent"] and drafters.all[1].uses_blocks
    assert drafters.of_new_head == (drafters.adaptive,)
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "model")
    drafters = build_drafters(AtlasConfig(static_drafter=str(tmp_path / "model")), view)
    assert names(drafters) == ["suffix", "static", "recurrent"] and not drafters.all[1].layers


def test_a_drafter_beside_the_policy_is_found_but_not_the_working_directorys(view, tmp_path, monkeypatch):
    policy = tiny_llama()
    policy.save_pretrained(tmp_path / "policy")
    save_head(RecurrentHead.for_policy(view), tmp_path / "policy" / "drafter")
    loaded = type(policy).from_pretrained(tmp_path / "policy")
    assert not build_drafters(AtlasConfig(), PolicyView(loaded)).is_new
    monkeypatch.chdir(tmp_path / "policy")
    assert os.path.exists("drafter/config.json") and build_drafters(AtlasConfig(), PolicyView(policy)).is_new


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retrain": "never", "drafters": ("static",)}, "drafters names static, but static_drafter is not given"),
        ({"retrain": "never", "drafters": ("suffix", "recurrent")}, "drafters names recurrent, but static_drafter"),
        ({"static_drafter": "./nowhere"}, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_named(view, options, words):
    with pytest.raises(ValueError, match=words):
        build_drafters(AtlasConfig(**options), view)


def test_no_compiler_costs_a_warning_unless_counts_were_asked_for(view, monkeypatch, caplog):
    monkeypatch.setattr(SuffixDrafter, "unavailable_reason", staticmethod(lambda: "no g++"))
    assert names(build_drafters(AtlasConfig(), view)) == ["static", "recurrent"]
    assert "no g++" in caplog.text
    with pytest.raises(ValueError, match="no g\\+\\+"):
        build_drafters(AtlasConfig(drafters=("suffix",)), view)


def test_arms_are_each_by_itself_and_each_neural_one_with_counts(view):
    assert arms_of(build_drafters(AtlasConfig(), view).all) == [
        ("suffix",),
        ("static",),
        ("recurrent",),
        ("static", "suffix"),
        ("recurrent", "suffix"),
    ]
