# SPDX-License-Identifier: Apache-2.0
"""The two choices a checkpoint makes for all of its layers: what keys are cached, what is folded.

Code asks the predicates of these enumerations and does not compare their values.
"""

from __future__ import annotations

from enum import StrEnum


class KeyMode(StrEnum):
    """Where the key cache stands relative to the rotary embedding (RoPE).

    NO_ROPE: the model has none (OPT, MPT); k' = k U is cached and scored as it is.
    PRE_ROPE: k' = k U is cached before RoPE; attention reconstructs k_hat = k' key_basis and
        rotates it (paper, section 3.3).
    POST_ROPE: k' = RoPE(k) U is cached; queries are rotated and down-projected likewise.
    """

    NO_ROPE = "no-rope"
    PRE_ROPE = "pre-rope"
    POST_ROPE = "post-rope"

    @property
    def reconstructs_keys(self) -> bool:
        """Whether attention reconstructs full keys from the cache."""
        return self is KeyMode.PRE_ROPE

    @property
    def caches_rotated_keys(self) -> bool:
        """Whether keys are rotated before they are down-projected and cached."""
        return self is KeyMode.POST_ROPE

    @property
    def has_rope(self) -> bool:
        """Whether the model rotates its keys at all."""
        return self is not KeyMode.NO_ROPE

    @classmethod
    def _missing_(cls, value: object) -> KeyMode | None:
        # Format version 1 called it so.
        return cls.NO_ROPE if value == "folded" else None


class Projections(StrEnum):
    """Which bases are multiplied into the projections; the others are tensors beside them.

    FOLDED: all of them. VALUES_FOLDED: those of values and outputs. UNTOUCHED: none.
    """

    FOLDED = "folded"
    VALUES_FOLDED = "values-folded"
    UNTOUCHED = "untouched"

    @property
    def folds_keys(self) -> bool:
        """Whether the key projection makes latents."""
        return self is Projections.FOLDED

    @property
    def folds_values(self) -> bool:
        """Whether the value projection makes latents, and the output projection takes them."""
        return self is not Projections.UNTOUCHED

    def folds_more_than(self, other: Projections) -> bool:
        """Whether this folds something that `other` leaves beside the projections."""
        order = list(Projections)
        return order.index(self) < order.index(other)
