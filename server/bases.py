"""Serve a base model as it is with bases beside it: `--eigen-bases DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_eigen.checkpoint import serving_overrides
from vllm_eigen.errors import InputError, UsageError


def apply_bases(parsed: argparse.Namespace, model: str) -> None:
    """Turn `parsed.eigen_bases` into overrides of the base model's configuration.

    Raises:
        UsageError: the configuration is overridden by a function already.
        InputError: the base model's configuration cannot be read.
        CheckpointError: the bases are damaged or belong to a model of another shape.
    """
    if not parsed.eigen_bases:
        return
    if not isinstance(parsed.hf_overrides, dict):
        raise UsageError("--eigen-bases and a function as --hf-overrides exclude each other")
    overrides = serving_overrides(Path(parsed.eigen_bases), _base_config(model))
    parsed.hf_overrides = {**parsed.hf_overrides, **overrides}


def _base_config(model: str) -> dict[str, Any]:
    """A model's `config.json`, from its folder or from the hub (or its cache)."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the configuration of {model} cannot be read: {reason}") from error
    found: dict[str, Any] = config
    return found
