# SPDX-License-Identifier: Apache-2.0
"""Checks of a checkpoint folder: its configuration, its files, and every attention tensor's shape.

Of the projections only the headers are read, of bases and offsets also the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_eigen.checkpoint.config import (
    BASES_CONFIG_FILE,
    BASES_FILE,
    BasesConfig,
    EigenConfig,
    first_problem,
    parse_config,
    read_config,
)
from vllm_eigen.checkpoint.families import Family, family_of
from vllm_eigen.checkpoint.shapes import tensor_shapes
from vllm_eigen.checkpoint.stored import StoredTensor, stored_tensors
from vllm_eigen.common.errors import CheckpointError


def validate(folder: Path) -> EigenConfig:
    """Check a whole checkpoint: config, shard files, every attention tensor's shape, and that
    bases and offsets are finite.

    Raises:
        CheckpointError, UnsupportedModelError: what is wrong, in which file or tensor.
    """
    folder = Path(folder)
    config, eigen = read_config(folder)
    family = family_of(config)
    hidden_size = family.geometry(config).hidden_size
    stored = stored_tensors(folder)
    _check_tensors(folder, eigen, family, hidden_size, stored)
    if config.get("tie_word_embeddings") is False and "lm_head.weight" not in stored:
        raise CheckpointError(
            f"{folder}: tensor lm_head.weight is missing and config.json has "
            "tie_word_embeddings=false; calibrate again"
        )
    return eigen


def serving_overrides(folder: Path, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """What to override in a base model's `config.json` so that it is served with these bases.

    Args:
        folder: a bases-only checkpoint.
        base_config: the base model's `config.json`.

    Raises:
        CheckpointError: the bases are damaged or belong to a model of another shape.
    """
    path = Path(folder) / BASES_CONFIG_FILE
    try:
        found = BasesConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; make bases with `vllm-eigen calibrate "
            "--bases-only`"
        ) from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error
    family = family_of(base_config)
    if found.architecture != family.architecture:
        raise CheckpointError(
            f"{path}: the bases are for {found.architecture} ({found.base}), the model is "
            f"{family.architecture}"
        )
    section = {**found.eigen, "bases": str((Path(folder) / BASES_FILE).resolve())}
    overrides = {"architectures": [family.eigen_architecture], "eigen": section}
    eigen = parse_config({**base_config, **overrides}, str(path))
    _check_tensors(
        folder, eigen, family, family.geometry(base_config).hidden_size, stored_tensors(folder)
    )
    return overrides


def _check_tensors(
    folder: Path,
    eigen: EigenConfig,
    family: Family,
    hidden_size: int,
    stored: Mapping[str, StoredTensor],
) -> None:
    """Every tensor the format fixes is stored in the shape the ranks ask for, and those that it
    adds to the model's hold numbers."""
    for name, expected in tensor_shapes(eigen, family, hidden_size):
        found = stored.get(name) or stored.get(name.removeprefix("model."))
        if found is None:
            raise CheckpointError(f"{folder}: tensor {name} is missing; calibrate again")
        if found.shape != expected:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(found.shape)}, the ranks in config.json "
                f"ask for {list(expected)}; calibrate again"
            )
        if not name.endswith(".weight") and not found.is_finite():
            raise CheckpointError(
                f"{folder}: tensor {name} ({found.dtype}) holds values that are not finite "
                "numbers; calibrate again"
            )
