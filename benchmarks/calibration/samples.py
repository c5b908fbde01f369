# SPDX-License-Identifier: Apache-2.0
"""Quality against the number of calibration windows, on trained models: `bench calibration`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_eigen.calibration.job import Recipe
from vllm_eigen.calibration.methods import DEFAULT
from vllm_eigen.calibration.model.device import pick_device
from vllm_eigen.calibration.model.source import open_source
from vllm_eigen.calibration.model.text import all_windows, read_files, sample_windows
from vllm_eigen.calibration.reporting.sweep import Sweep
from vllm_eigen.common.progress import Reporter

SAMPLES = (32, 128, 512)
METHODS = {"paper": 0.6, DEFAULT: 0.27}
"""With the KV ratio that they are measured at."""


@dataclass(frozen=True)
class SampleRow:
    """One calibration.

    Attributes:
        samples: calibration windows of `length` tokens.
        increase: relative perplexity increase on the test windows, in percent.
        kl: KL(base || compressed) a token, in nats.
    """

    model: str
    method: str
    samples: int
    length: int
    kv_ratio: float
    base_perplexity: float
    increase: float
    kl: float
    tokens: int


def measure_samples(args: argparse.Namespace, reporter: Reporter) -> list[SampleRow]:
    """Rows of all models, by the arguments of `bench calibration`.

    Raises:
        InputError: a model or text cannot be used.
    """
    return [
        row
        for model in args.models
        for method in METHODS
        for row in _rows(model, method, args, reporter)
    ]


def _rows(
    model: str, method: str, args: argparse.Namespace, reporter: Reporter
) -> Sequence[SampleRow]:
    source = open_source(model)
    length = min(args.seq_len, source.max_positions)
    tokenizer, size = source.tokenizer(), source.vocab_size
    windows = sample_windows(
        read_files(args.text),
        tokenizer,
        samples=max(SAMPLES),
        length=length,
        seed=args.seed,
        vocab_size=size,
    )
    test = all_windows(
        read_files(args.test), tokenizer, length=length, vocab_size=size, limit=args.test_tokens
    )
    recipe = Recipe.resolve(source, method, head_group=1)
    reporter.note(f"{source.name}, {method}")
    device = pick_device("cpu")
    sweep = Sweep(source, recipe, replace(windows, held_out=test), device, reporter)
    return [
        SampleRow(
            model=source.name,
            method=method,
            samples=point.samples,
            length=length,
            kv_ratio=round(point.kv_ratio, 4),
            base_perplexity=round(point.quality.base_perplexity, 5),
            increase=round(100 * point.increase, 3),
            kl=round(point.quality.kl_per_token, 6),
            tokens=point.quality.tokens,
        )
        for point in sweep.over_samples(METHODS[method], SAMPLES)
    ]
