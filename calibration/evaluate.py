"""Quality of an Eigen checkpoint against its base on a text, both in plain transformers.

Offline: the stored weights are unfolded to the base architecture (`unfold`) and run in float32 on
the same windows as the base, so the difference is the compression and its rounding alone. The
served model is measured through vLLM by the benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from calibration.lowrank import LowRankModel
from calibration.metrics import Comparison, Quality
from calibration.progress import Reporter
from calibration.scales import fp8_cache
from calibration.source import Source, open_source
from calibration.state import recall_base
from calibration.tasks import Accuracy, accuracy, read_questions
from calibration.text import Corpus, all_windows
from calibration.unfold import load_base, load_reference
from vllm_eigen.checkpoint import EigenConfig, read_config
from vllm_eigen.errors import InputError

CacheType = Literal["auto", "fp8"]
"""Element type of the simulated cache: the model's own, or float8_e4m3."""
WINDOW = 2048
"""Tokens a window, as in the paper, unless the model takes fewer."""


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and accuracy of base and compressed model by task."""

    quality: Quality
    eigen: EigenConfig
    tasks: dict[str, tuple[Accuracy, Accuracy]]


def find_base(folder: Path, eigen: EigenConfig, named: str | None) -> Source:
    """The base model: as named, or as the checkpoint's provenance records it.

    Raises:
        InputError: it is not on this machine and not on the hub, or is another model.
    """
    record = eigen.provenance.get("base") or {}
    name, fingerprint = str(record.get("name", "")), str(record.get("fingerprint", ""))
    if named is not None:
        source = open_source(named)
    elif (known := recall_base(fingerprint)) is not None:
        source = open_source(str(known))
    elif "/" in name:
        source = open_source(name)
    else:
        raise InputError(
            f"{folder}: its base model {name or 'is not recorded'} is not known on this machine; "
            "pass --base MODEL"
        )
    if source.geometry.num_layers != len(eigen.layers) or (
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
    tasks: Sequence[Path] = (),
    task_limit: int | None = None,
    kv_cache_dtype: CacheType = "auto",
) -> Evaluation:
    """Compare the checkpoint in `folder` with its base over the whole corpus and on tasks.

    Args:
        kv_cache_dtype: `fp8` rounds the checkpoint's latents as such a cache does; the base's
            keys and values are never rounded.
        tasks: jsonl files of questions (`calibration.tasks`).
        task_limit: most questions of each.

    Raises:
        CheckpointError, InputError: the checkpoint, its base or the text cannot be used.
    """
    _, eigen = read_config(folder)
    questions = {path.stem: read_questions(path, task_limit) for path in tasks}
    source = find_base(folder, eigen, base)
    reporter.stage("loading", 2)
    load = load_reference if kv_cache_dtype == "auto" else load_with_fp8_cache
    compressed = load(folder, device)
    reporter.step()
    original = load_base(source, device)
    reporter.step()
    tokens = all_windows(
        corpus,
        source.tokenizer(),
        length=min(WINDOW, source.max_positions),
        vocab_size=source.vocab_size,
        limit=max_tokens,
    )
    reporter.stage("evaluating", len(tokens))
    comparison = Comparison()
    for window in torch.split(tokens, 1):
        comparison.add(_logits(original, window), _logits(compressed, window), window)
        reporter.step()
    scores: dict[str, tuple[Accuracy, Accuracy]] = {}
    for name, items in questions.items():
        reporter.stage(name, 2 * len(items))
        options: dict[str, Any] = {"length": source.max_positions, "step": reporter.step}
        scores[name] = (
            accuracy(original, source.tokenizer(), items, **options),
            accuracy(compressed, source.tokenizer(), items, **options),
        )
    return Evaluation(comparison.result(), eigen, scores)


def load_with_fp8_cache(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The compressed model as a transformers model whose latents are rounded to float8_e4m3."""
    found = LowRankModel(folder, device)
    for layer, ranks in zip(found.layers, found.eigen.layers, strict=True):
        layer.cache = fp8_cache(ranks)
    return found.model


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(window.to(model.device), use_cache=False).logits
    return logits
