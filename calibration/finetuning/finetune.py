# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a checkpoint, and write it in the same format with the same ranks.

    checkpoint -> CompressedModel -> train LoRA deltas and bases -> merge -> checkpoint

The result is measured as it was saved, rounding included. If it is no better, nothing is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_eigen.calibration.export.scales import TOKENS, Peak
from vllm_eigen.calibration.finetuning.adapt import adapt
from vllm_eigen.calibration.finetuning.train import BATCH_TOKENS, Losses, Training, mean_loss, train
from vllm_eigen.calibration.model.compressed import CompressedModel, load_reference
from vllm_eigen.calibration.model.source import Source
from vllm_eigen.calibration.model.text import Corpus, Windows, sample_windows
from vllm_eigen.checkpoint.config import CONFIG_FILE, EigenConfig, LayerRanks, read_config
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import InputError, OutputError, UsageError
from vllm_eigen.common.files import atomic_directory
from vllm_eigen.common.progress import Reporter

HELD_OUT = 32
"""Windows kept from training, to measure the loss on."""


def finetune(
    folder: Path,
    corpus: Corpus,
    output: Path,
    training: Training,
    *,
    length: int,
    device: torch.device,
    provenance: dict[str, Any],
    reporter: Reporter,
    overwrite: bool = False,
) -> Losses:
    """Train the checkpoint in `folder` and write it to `output`, which may be `folder` itself.

    Args:
        length: tokens a window, cut to what the model takes.
        provenance: the record of this process.

    Returns:
        The held-out loss while training; last, with the last step again, that of what was saved.

    Raises:
        UsageError: the checkpoint has coded latents or offsets.
        CheckpointError, InputError: the checkpoint or the text cannot be used.
        OutputError: training did not help, `output` exists, or the disk refuses; nothing is
            written then.
    """
    model = CompressedModel(folder, device)
    if model.eigen.coded or model.eigen.key_offset or model.eigen.value_offset:
        raise UsageError(
            f"{folder} has coded latents or offsets, which fine-tuning does not train; fine-tune "
            "a checkpoint of 16-bit latents"
        )
    windows = _windows(folder, model, corpus, training, length)
    parameters = adapt(model.model, model.layers, training.seed)
    losses = train(model.model, parameters, windows, training, reporter)
    before = losses[0][1]
    if not any(loss < before for _, loss in losses):
        raise _no_better(folder, before, losses[-1][1])
    ranks = _scaled(model, windows.chosen)
    tensors = model.tensors()
    del model, parameters
    record = {
        **provenance,
        "text": corpus.name,
        "windows": len(windows.chosen),
        "seq_len": windows.chosen.shape[1],
        "held_out_windows": len(windows.held_out),
        "seed": training.seed,
        "learning_rate": training.learning_rate,
        "losses": [item for item in losses if math.isfinite(item[1])],
    }
    with atomic_directory(output, overwrite=overwrite) as work:
        _write_tensors(folder, work, tensors)
        config, eigen = read_config(folder)
        _write_config(work, config, eigen, ranks, record)
        validate(work)
        after = mean_loss(load_reference(work, device), windows.held_out)
        if not after < before:
            raise _no_better(folder, before, after)
        record |= {"base_loss": before, "loss": after}
        _write_config(work, config, eigen, ranks, record)
        _describe(work, before, after, record)
    return [*losses, (losses[-1][0], after)]


def _windows(
    folder: Path, model: CompressedModel, corpus: Corpus, training: Training, length: int
) -> Windows:
    config, _ = read_config(folder)
    source = Source(folder.name, folder, config, model.family, model.family.geometry(config))
    length = min(length, source.max_positions)
    found = sample_windows(
        corpus,
        source.tokenizer(),
        samples=training.steps * max(1, BATCH_TOKENS // length),
        length=length,
        seed=training.seed,
        vocab_size=source.vocab_size,
        held_out=HELD_OUT,
    )
    if not len(found.held_out):
        raise InputError(
            f"text {corpus.name} gives {found.available} windows of {length} tokens, none is left "
            "to be held out; pass more text or a smaller --seq-len"
        )
    return found


def _scaled(model: CompressedModel, windows: torch.Tensor) -> list[LayerRanks]:
    """The ranks with fp8 scales for the trained latents."""
    peaks = [Peak() for _ in model.layers]
    for layer, peak in zip(model.layers, peaks, strict=True):
        layer.cache = peak
    mean_loss(model.model, windows[: max(1, TOKENS // windows.shape[1])])
    pairs = zip(peaks, model.eigen.layers, strict=True)
    return [peak.scaled(ranks, model.eigen.key_mode) for peak, ranks in pairs]


def _write_tensors(folder: Path, work: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the checkpoint, with trained tensors instead of those of their names, in their type."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            merged = {
                name: tensors.get(name, stored).to(stored.dtype).contiguous()
                for name, stored in load_file(path).items()
            }
            save_file(merged, work / path.name, metadata={"format": "pt"})
        elif path.is_file():
            shutil.copyfile(path, work / path.name)


def _write_config(
    work: Path,
    config: Mapping[str, Any],
    eigen: EigenConfig,
    ranks: list[LayerRanks],
    record: Mapping[str, Any],
) -> None:
    # Calibration measured the checkpoint before training.
    kept = {name: value for name, value in eigen.provenance.items() if name != "measured"}
    provenance = {**kept, "finetune": dict(record)}
    changed = eigen.model_copy(update={"layers": tuple(ranks), "provenance": provenance})
    content = {**config, "eigen": changed.model_dump(mode="json")}
    (work / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _describe(work: Path, before: float, after: float, record: Mapping[str, Any]) -> None:
    """Add a section to the model card."""
    with (work / "README.md").open("a", encoding="utf-8") as card:
        card.write(
            "\n## Fine-tuned\n\nNumbers above, if any, are those of the checkpoint before. On "
            f"{record['held_out_windows']} held-out windows of the fine-tuning text, offline in "
            f"float32, perplexity went from {math.exp(before):.4f} to {math.exp(after):.4f}.\n\n"
            f"- text: {record['text']}\n- steps: {record['losses'][-1][0]}\n"
            f"- command: `{record.get('command', '')}`\n"
        )


def _no_better(folder: Path, before: float, after: float) -> OutputError:
    return OutputError(
        f"{folder}: fine-tuning does not help, held-out loss {before:.5f} -> {after:.5f}; nothing "
        "is saved, pass more text, more --steps or a smaller --learning-rate"
    )
