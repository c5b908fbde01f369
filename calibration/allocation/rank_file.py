# SPDX-License-Identifier: Apache-2.0
"""Explicit ranks, read from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.checkpoint.config import LayerRanks
from vllm_eigen.common.errors import InputError


def read_ranks(path: Path, bases: Sequence[LayerBases]) -> list[LayerRanks]:
    """Explicit ranks from a JSON file: a list of [rank_k, rank_v], first layer first.

    Raises:
        InputError: the file is missing or damaged, or does not fit the model.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        ranks = [LayerRanks(rank_k=key, rank_v=value) for key, value in pairs]
    except OSError as error:
        raise InputError(f"rank file {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise InputError(
            f"rank file {path} is not a JSON list of [rank_k, rank_v] pairs of at least 1"
        ) from error
    if len(ranks) != len(bases):
        raise InputError(f"rank file {path} has {len(ranks)} layers, the model {len(bases)}")
    for index, (item, layer) in enumerate(zip(bases, ranks, strict=True)):
        if layer.rank_k > item.key.full_rank or layer.rank_v > item.value.full_rank:
            raise InputError(
                f"rank file {path}, layer {index}: ranks ({layer.rank_k}, {layer.rank_v}) exceed "
                f"the full {item.key.full_rank}"
            )
    return ranks
