# SPDX-License-Identifier: Apache-2.0
"""Serve a base model as it is with bases beside it: `--eigen-bases DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_eigen.checkpoint.config import check_cache_dtype, parse_config
from vllm_eigen.checkpoint.validate import serving_overrides
from vllm_eigen.common.errors import UsageError
from vllm_eigen.server.launch.model_files import read_config


def apply_bases(parsed: argparse.Namespace, model: str) -> None:
    """Turn `parsed.eigen_bases` into overrides of the base model's configuration.

    Raises:
        UsageError: the configuration is overridden by a function already, or the cache type does
            not fit the bases.
        InputError: the base model's configuration cannot be read.
        CheckpointError: the bases are damaged or belong to a model of another shape.
    """
    if not parsed.eigen_bases:
        return
    if not isinstance(parsed.hf_overrides, dict):
        raise UsageError("--eigen-bases and a function as --hf-overrides exclude each other")
    config = read_config(model)
    overrides = serving_overrides(Path(parsed.eigen_bases), config)
    check_cache_dtype(parse_config({**config, **overrides}), parsed.kv_cache_dtype)
    parsed.hf_overrides = {**parsed.hf_overrides, **overrides}
