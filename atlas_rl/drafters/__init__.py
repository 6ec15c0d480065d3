"""Drafters guess the policy's next tokens. The engine verifies the guesses: a drafter can cost time, never change a token."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.suffix import SuffixDrafter

logger = logging.getLogger(__name__)


TEXTUAL = ("suffix",)
"""Drafters that look at tokens alone, and go together with a neural one."""


def arms_of(drafters: Sequence[Drafter]) -> list[tuple[str, ...]]:
    """Each drafter by itself, and each neural one together with the textual ones."""
    names = [drafter.name for drafter in drafters]
    textual = [name for name in names if name in TEXTUAL]
    together = [(name, *textual) for name in names if name not in TEXTUAL] if textual else []
    return [(name,) for name in names] + together


def build_drafter(config: AtlasConfig) -> Drafter | None:
    """The drafter that a config asks for; None for plain decoding.

    Raises:
        ValueError: it names a drafter that cannot run on this machine.
    """
    if not config.drafter_names:
        return None
    reason = SuffixDrafter.unavailable_reason()
    if reason is not None and config.drafters == "auto":
        logger.warning("decoding without drafts: the suffix drafter needs a C++ compiler (set CXX): %s", reason)
        return None
    return SuffixDrafter()
