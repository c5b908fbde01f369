# SPDX-License-Identifier: Apache-2.0
"""A scheduler step as the GPU kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_eigen.kernels.interface import Plan


@dataclass(frozen=True, eq=False)
class GpuPlan(Plan):
    """A step with its upper bounds, in tokens; `split_size` keys make one split of decode.

    max_decode_query_len: of the sequences that are decoded; 0 where none is.
    """

    max_query_len: int
    max_decode_query_len: int
    max_seq_len: int
    split_size: int
