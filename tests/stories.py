"""stories260K, a real pretrained decoder, only where ATLAS_TEST_DATA has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from atlas_rl.bench import stories


def data_folder(name: str) -> Path:
    """A folder of the extra test data, or a skip that says what is missing."""
    root = os.environ.get("ATLAS_TEST_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs ATLAS_TEST_DATA with {name}/ in it")
    return Path(root) / name


def load_stories260k(dtype: torch.dtype) -> LlamaForCausalLM:
    return stories.load_stories260k(data_folder("stories260K"), dtype)
