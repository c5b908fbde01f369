"""Heal a checkpoint: train what compression damaged, and write the same format at the same ranks.

    checkpoint -> low-rank model -> deltas trained -> merged -> checkpoint

The result is measured as it was saved, rounding included, and is dropped if it is no better.
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

from calibration.adapt import adapt
from calibration.heal import BATCH_TOKENS, Losses, Training, heal, mean_loss
from calibration.lowrank import LowRankModel
from calibration.progress import Reporter
from calibration.scales import TOKENS, Peak
from calibration.source import Source
from calibration.text import Corpus, Windows, sample_windows
from calibration.unfold import load_reference
from vllm_eigen.checkpoint import CONFIG_FILE, EigenConfig, LayerRanks, read_config, validate
from vllm_eigen.errors import InputError, OutputError
from vllm_eigen.files import atomic_directory

HELD_OUT = 32
"""Windows kept from training."""


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
        The held-out loss while training, then as saved, under the last step.

    Raises:
        CheckpointError, InputError: the checkpoint or the text cannot be used.
        OutputError: training did not help, `output` exists, or the disk refuses; nothing is
            written then.
    """
    validate(folder)
    model = LowRankModel(folder, device)
    windows = _windows(folder, model, corpus, training, length)
    parameters = adapt(model.model, model.layers, training.seed)
    losses = heal(model.model, parameters, windows.chosen, windows.held_out, training, reporter)
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
    folder: Path, model: LowRankModel, corpus: Corpus, training: Training, length: int
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


def _scaled(model: LowRankModel, windows: torch.Tensor) -> list[LayerRanks]:
    """The ranks with the scales that suit the trained latents."""
    peaks = [Peak() for _ in model.layers]
    for layer, peak in zip(model.layers, peaks, strict=True):
        layer.cache = peak
    mean_loss(model.model, windows[: max(1, TOKENS // windows.shape[1])])
    return [peak.scaled(ranks) for peak, ranks in zip(peaks, model.eigen.layers, strict=True)]


def _write_tensors(folder: Path, work: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the checkpoint; trained tensors take the places of those of their name, in their type.

    Biases that the checkpoint does not have are zeros, and are left out.
    """
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
    # What calibration measured is not true of this checkpoint any more.
    kept = {name: value for name, value in eigen.provenance.items() if name != "measured"}
    provenance = {**kept, "finetune": dict(record)}
    changed = eigen.model_copy(update={"layers": tuple(ranks), "provenance": provenance})
    content = {**config, "eigen": changed.model_dump(mode="json")}
    (work / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _describe(work: Path, before: float, after: float, record: Mapping[str, Any]) -> None:
    """A section at the end of the model card."""
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
