"""Measurements: speed against what a user would otherwise run, and the laws at full size."""

import re

ARM_NAMES = (
    "hf_generate",
    "hf_continuous_batching",
    "hf_prompt_lookup",
    "vllm",
    "vllm_ngram",
    "vllm_suffix",
    "atlas_plain",
    "atlas_static",
    "atlas_adaptive",
    "atlas_suffix",
    "atlas",
)
FIXED_ARM = re.compile(r"(suffix|recurrent|static)@([1-9][0-9]?)")
"""Arms with one drafter and one lookahead at every step, as in static@4: what the controller is measured against."""
FAILED = "failed in "
"""How the reason begins for which an arm is left out that broke down while it was measured."""


def is_arm(name: str) -> bool:
    return name in ARM_NAMES or FIXED_ARM.fullmatch(name) is not None


def is_engine(name: str) -> bool:
    """Whether an arm is ours; the others are peers."""
    return name.startswith("atlas") or FIXED_ARM.fullmatch(name) is not None
