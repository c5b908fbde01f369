# SPDX-License-Identifier: Apache-2.0
"""Quality of an Eigen checkpoint against its base, on a text and on tasks.

Either offline in plain transformers (`offline`), or as vLLM serves both models (`served`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_eigen.calibration.cache import find_base_folder
from vllm_eigen.calibration.evaluation.inputs import Evaluation, Inputs
from vllm_eigen.calibration.evaluation.offline import evaluate_offline
from vllm_eigen.calibration.evaluation.served import evaluate_served
from vllm_eigen.calibration.evaluation.taskset import TaskSet
from vllm_eigen.calibration.model.source import Source, open_source
from vllm_eigen.calibration.model.text import Corpus, all_windows
from vllm_eigen.checkpoint.config import EigenConfig, check_cache_dtype, read_config
from vllm_eigen.common.errors import InputError
from vllm_eigen.common.progress import Reporter

WINDOW = 2048
"""Tokens a window, as in the paper, unless the model takes fewer."""


def find_base(folder: Path, eigen: EigenConfig, named: str | None) -> Source:
    """The base model: as named, or as the checkpoint's provenance records it.

    Raises:
        InputError: it is not on this machine and not on the hub, or is another model.
    """
    record = eigen.provenance.get("base") or {}
    name, fingerprint = str(record.get("name", "")), str(record.get("fingerprint", ""))
    if named is not None:
        source = open_source(named)
    elif (known := find_base_folder(fingerprint)) is not None:
        source = open_source(str(known))
    elif "/" in name:
        source = open_source(name, revision=record.get("commit"))
    else:
        raise InputError(
            f"{folder}: its base model {name or 'is not recorded'} is not known on this machine; "
            "pass --base MODEL"
        )
    if source.geometry.num_layers != eigen.num_layers or (
        source.geometry.head_size != eigen.head_size
    ):
        raise InputError(f"{source.folder} is not the base model of {folder}; pass its own --base")
    return source


def evaluate(
    folder: Path,
    corpus: Corpus,
    *,
    base: str | None,
    device: torch.device,
    reporter: Reporter,
    max_tokens: int | None = None,
    tasks: TaskSet | None = None,
    fp8_cache: bool = False,
    served: bool = False,
) -> Evaluation:
    """Compare the checkpoint in `folder` with its base over the whole corpus and on tasks.

    Args:
        device: where transformers runs; vLLM runs where it was built for.
        fp8_cache: give the checkpoint an fp8 cache, simulated in transformers; the base's keys
            and values are never rounded.
        served: run the models in vLLM instead of transformers.

    Raises:
        CheckpointError, InputError: the checkpoint, its base or the text cannot be used.
        UsageError: an fp8 cache for coded latents.
        EngineError: vLLM cannot serve one of the models.
    """
    _, eigen = read_config(folder)
    check_cache_dtype(eigen, "fp8" if fp8_cache else "auto")
    source = find_base(folder, eigen, base)
    # vLLM makes room for a token to generate, even where none is asked for.
    max_length = source.max_positions - served
    windows = all_windows(
        corpus,
        source.tokenizer(),
        length=min(WINDOW, max_length),
        vocab_size=source.vocab_size,
        limit=max_tokens,
    )
    asked = TaskSet() if tasks is None else tasks
    inputs = Inputs(folder, eigen, source, windows, asked, max_length, fp8_cache)
    return (
        evaluate_served(inputs, reporter) if served else evaluate_offline(inputs, device, reporter)
    )
