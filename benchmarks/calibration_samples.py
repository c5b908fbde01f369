"""Quality against the number of calibration windows, on trained models; part of `calibration`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calibration.methods import DEFAULT, get_method
from calibration.progress import Reporter
from calibration.source import open_source
from calibration.stream import pick_device
from calibration.sweep import Recipe, Sweep
from calibration.text import all_windows, read_files, sample_windows

RATIO = 0.6
SAMPLES = (32, 128, 512)
METHODS = ("paper", DEFAULT)


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
    """Rows of all models, by the arguments of `benchmarks.calibration`.

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
    recipe = Recipe(method, source.family.key_modes[0], 1, get_method(method).refit)
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
        for point in sweep.over_samples(RATIO, SAMPLES)
    ]
