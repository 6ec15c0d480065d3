"""Drafters guess the policy's next tokens. The engine verifies the guesses: a drafter can cost time, never change a token."""

from __future__ import annotations

import logging

from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.suffix import SuffixDrafter

logger = logging.getLogger(__name__)


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
