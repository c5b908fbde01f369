# SPDX-License-Identifier: Apache-2.0
"""The calibration from text to checkpoint.

    text -> statistics -> bases -> ranks -> refit -> fp8 scales -> folded checkpoint
    text -> gradients  -> bases -> bits                         -> folded checkpoint

Latents of 16 bits: one pass over the layers makes the bases; then ranks are allocated, and a second
pass refits the output projections to them (`calibrator`). Coded latents: `coded_calibrator`. The
result is measured on held-out windows and written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vllm_eigen.calibration.cache import record_base_folder
from vllm_eigen.calibration.calibrator import Calibrator
from vllm_eigen.calibration.coded_calibrator import CodedCalibrator
from vllm_eigen.calibration.export.scales import fit_scales
from vllm_eigen.calibration.export.write import eigen_config, write_bases, write_checkpoint
from vllm_eigen.calibration.held_out import HeldOut
from vllm_eigen.calibration.job import Job, Recipe, recipe_of
from vllm_eigen.calibration.methods.basis import LayerBases
from vllm_eigen.calibration.model.activations import MEMORY_LIMIT
from vllm_eigen.calibration.model.device import pick_device
from vllm_eigen.calibration.model.layerwise import LayerwiseModel
from vllm_eigen.calibration.model.source import Source, open_source
from vllm_eigen.calibration.model.text import Corpus, Windows, sample_windows
from vllm_eigen.calibration.options import HELD_OUT, Options
from vllm_eigen.calibration.state import State
from vllm_eigen.calibration.truncated import TruncatedModel
from vllm_eigen.checkpoint.config import EigenConfig
from vllm_eigen.common.progress import Reporter

_UNKNOWN_WARNING = 0.02


def calibrate(options: Options, reporter: Reporter) -> EigenConfig:
    """Make an Eigen checkpoint; returns its configuration.

    Raises:
        UsageError, InputError, OutputError: in one line what is wrong; nothing is written then.
    """
    options.check()
    device = pick_device(options.device)
    source = open_source(options.model, revision=options.revision)
    recipe = recipe_of(options, source)
    corpus = options.corpus()
    windows = _windows(options, source, corpus, reporter)
    job = Job(
        model=LayerwiseModel(source, device, eager=recipe.needs_probabilities),
        recipe=recipe,
        tokens=windows.chosen,
        state=_state(options, source, recipe, windows.chosen, device),
        reporter=reporter,
        memory_limit=MEMORY_LIMIT if options.memory_limit is None else options.memory_limit,
    )
    compressed, record, details = _coded(job, options) if recipe.coded else _ranks(job, options)
    measured: dict[str, Any] = {}
    if len(windows.held_out):
        reporter.stage("measuring", 2 * job.model.num_layers)
        held_out = HeldOut(job.model, windows.held_out, reporter.step)
        measured = asdict(held_out.quality(compressed, step=reporter.step))
    eigen = eigen_config(
        source,
        compressed.ranks,
        key_mode=recipe.key_mode,
        method=recipe.method.name,
        head_group=recipe.head_group,
        bases_only=options.bases_only,
        key_offset=recipe.coded,
        provenance={
            **job.state.provenance,
            "base": source.record(),
            "calibration": {
                "text": corpus.name,
                "samples": len(job.tokens),
                "seq_len": job.tokens.shape[1],
                "seed": options.seed,
                **record,
                "refit": recipe.refit,
            },
            "measured": measured,
        },
    )
    reporter.stage("writing", len(source.weights))
    write = write_bases if options.bases_only else write_checkpoint
    write(
        compressed.model.source,
        eigen,
        compressed.bases,
        options.output,
        details=details,
        overwrite=options.overwrite,
        step=reporter.step,
    )
    record_base_folder(source.fingerprint, source.folder)
    job.state.discard()
    return eigen


def _coded(job: Job, options: Options) -> tuple[TruncatedModel, dict[str, Any], dict[str, Any]]:
    """The model with coded latents, how widths were chosen, and what reports draw on."""
    calibrator = CodedCalibrator(job)
    allocation = calibrator.allocate(options.target)
    return calibrator.compress(allocation.ranks), allocation.record(), {}


def _ranks(job: Job, options: Options) -> tuple[TruncatedModel, dict[str, Any], dict[str, Any]]:
    """The same with latents of 16 bits, some dropped; with scales for an fp8 cache."""
    calibrator = Calibrator(job, options.target)
    allocation = calibrator.allocate(options.target)
    compressed = calibrator.compress(allocation.ranks)
    job.reporter.stage("scaling", job.model.num_layers)
    compressed = fit_scales(compressed, job.tokens, job.reporter.step)
    curves = allocation.loss_curves
    details = {
        "spectrum": [_spectrum(item) for item in calibrator.bases],
        "loss_curves": None if curves is None else [asdict(item) for item in curves],
    }
    return compressed, allocation.record(), details


def _state(
    options: Options, source: Source, recipe: Recipe, tokens: torch.Tensor, device: torch.device
) -> State:
    inputs = {
        "base": source.fingerprint,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "method": recipe.method.name,
        "key_mode": recipe.key_mode,
        "head_group": recipe.head_group,
        "error_budget": options.target.error_budget,
        "full": options.target.full_rank,
        "device": str(device),
    }
    return State.open(inputs, resume=options.resume, provenance=options.provenance)


def _spectrum(bases: LayerBases) -> dict[str, Sequence[float]]:
    """Singular values by rank, averaged over heads, relative to the largest."""
    result: dict[str, Sequence[float]] = {}
    for part, basis in (("key", bases.key), ("value", bases.value)):
        mean = basis.energy.sqrt().mean(0)
        scale = float(mean.max()) or 1.0
        result[part] = [float(f"{value / scale:.4g}") for value in mean.tolist()]
    return result


def _windows(options: Options, source: Source, corpus: Corpus, reporter: Reporter) -> Windows:
    windows = sample_windows(
        corpus,
        source.tokenizer(),
        samples=options.samples,
        length=min(options.length, source.max_positions),
        seed=options.seed,
        vocab_size=source.vocab_size,
        held_out=HELD_OUT,
    )
    if len(windows.chosen) < options.samples:
        reporter.note(
            f"note: the text gives {windows.available} windows, "
            f"calibrating on {len(windows.chosen)} instead of {options.samples}"
        )
    if windows.unknown > _UNKNOWN_WARNING:
        reporter.note(
            f"note: {windows.unknown:.0%} of the tokens are unknown to the tokenizer; "
            "is the text of the model's kind?"
        )
    return windows
