"""For all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Triton's interpreter runs kernels on CPU tensors; its own library too is defined, for good, when something first imports it
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from atlas_rl import AtlasRolloutGenerator
from atlas_rl.tasks import policy_path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
torch.set_num_threads(1)  # spinning threads on a shared machine cost more than they give


@pytest.fixture(scope="session")
def shipped_policy() -> PreTrainedModel:
    """The policy that `atlas-rl train` starts from, in float32."""
    return AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """Folder of a tiny random policy with a tokenizer."""
    from recipes import save_tiny_policy

    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def atlas():
    """A generator that is detached in the end: a trainer's callback stays attached after training."""
    generator = AtlasRolloutGenerator()
    yield generator
    generator.detach()
