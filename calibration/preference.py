# SPDX-License-Identifier: Apache-2.0
"""What a compressed model is to be best at, where its keys can be cached in several ways."""

from __future__ import annotations

from enum import StrEnum

from vllm_eigen.checkpoint.modes import KeyMode


class Preference(StrEnum):
    """MEMORY: the least loss for the bytes. SPEED: nothing to reconstruct when attention reads."""

    MEMORY = "memory"
    SPEED = "speed"

    def key_mode(self, modes: tuple[KeyMode, ...]) -> KeyMode:
        """Of the modes that a family has, its default first."""
        if self is Preference.SPEED:
            return next((mode for mode in modes if not mode.reconstructs_keys), modes[0])
        return modes[0]
