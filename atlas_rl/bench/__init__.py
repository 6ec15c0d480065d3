"""Measurements: speed against what a user would otherwise run, and the laws at full size."""

ARM_NAMES = ("hf_generate", "hf_continuous_batching", "vllm", "atlas_plain", "atlas_suffix", "atlas")
