"""Arms: who drafts in a step."""

from __future__ import annotations

Arm = tuple[str, ...]
"""Names of drafters."""
PLAIN: Arm = ()


def arm_name(arm: Arm) -> str:
    """As logs have it."""
    return "+".join(arm) or "plain"
