"""Quality of an Eigen checkpoint against its base on a text and on tasks.

By default offline: the stored weights are unfolded to the base architecture (`unfold`) and run in
plain transformers, in float32, on the same windows as the base, so the difference is the
compression and its rounding alone. Or as served: both models in vLLM, one after the other
(`served`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from calibration.lowrank import LowRankModel
from calibration.metrics import Comparison, Quality
from calibration.progress import Reporter
from calibration.scales import fp8_cache
from calibration.scoring import Scorer, transformers_scorer
from calibration.source import Source, open_source
from calibration.state import recall_base
from calibration.tasks import Accuracy
from calibration.taskset import TaskSet
from calibration.text import Corpus, all_windows
from calibration.unfold import load_base, load_reference
from vllm_eigen.checkpoint import EigenConfig, read_config
from vllm_eigen.errors import InputError

CacheType = Literal["auto", "fp8"]
"""Element type of the checkpoint's cache: the model's own, or float8_e4m3."""
EngineName = Literal["transformers", "vllm"]
WINDOW = 2048
"""Tokens a window, as in the paper, unless the model takes fewer."""


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and accuracy of base and compressed model by task.

    Attributes:
        window: tokens of a window of the text.
        notes: what could not be measured, and why.
    """

    quality: Quality
    eigen: EigenConfig
    tasks: dict[str, tuple[Accuracy, Accuracy]]
    window: int
    notes: tuple[str, ...] = ()


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
    tasks: TaskSet | None = None,
    kv_cache_dtype: CacheType = "auto",
    engine: EngineName = "transformers",
) -> Evaluation:
    """Compare the checkpoint in `folder` with its base over the whole corpus and on tasks.

    Args:
        device: where transformers runs; vLLM runs where it was built for.
        kv_cache_dtype: `fp8` gives the checkpoint such a cache, simulated in transformers; the
            base's keys and values are never rounded.

    Raises:
        CheckpointError, InputError: the checkpoint, its base or the text cannot be used.
        EngineError: vLLM cannot serve one of the models.
    """
    _, eigen = read_config(folder)
    source = find_base(folder, eigen, base)
    # vLLM makes room for a token to generate, even where none is asked for.
    longest = source.max_positions - (engine == "vllm")
    tokens = all_windows(
        corpus,
        source.tokenizer(),
        length=min(WINDOW, longest),
        vocab_size=source.vocab_size,
        limit=max_tokens,
    )
    asked = TaskSet() if tasks is None else tasks
    if engine == "vllm":
        return _served(folder, source, eigen, tokens, asked, longest, kv_cache_dtype, reporter)
    return _offline(folder, source, eigen, tokens, asked, device, kv_cache_dtype, reporter)


def _offline(
    folder: Path,
    source: Source,
    eigen: EigenConfig,
    tokens: torch.Tensor,
    tasks: TaskSet,
    device: torch.device,
    kv_cache_dtype: CacheType,
    reporter: Reporter,
) -> Evaluation:
    reporter.stage("loading", 2)
    load = load_reference if kv_cache_dtype == "auto" else load_with_fp8_cache
    compressed = load(folder, device)
    reporter.step()
    original = load_base(source, device)
    reporter.step()
    reporter.stage("evaluating", len(tokens))
    comparison = Comparison()
    for window in torch.split(tokens, 1):
        comparison.add(_logits(original, window), _logits(compressed, window), window)
        reporter.step()
    scores = [
        _accuracy(name, tasks, transformers_scorer(model), source, source.max_positions, reporter)
        for name, model in (("base tasks", original), ("eigen tasks", compressed))
    ]
    return Evaluation(comparison.result(), eigen, _pair(*scores), tokens.shape[1])


def _served(
    folder: Path,
    source: Source,
    eigen: EigenConfig,
    tokens: torch.Tensor,
    tasks: TaskSet,
    longest: int,
    kv_cache_dtype: CacheType,
    reporter: Reporter,
) -> Evaluation:
    from calibration.served import WHOLE_ENTRIES, BaseRecord, Engine

    notes: tuple[str, ...] = ()
    vocab_size: int | None = source.vocab_size
    if tokens.shape[1] * source.vocab_size > WHOLE_ENTRIES:
        vocab_size = None
        notes = (
            f"KL is not measured: it needs the whole vocabulary of {source.vocab_size:,} at each "
            "token, more than vLLM can hand over; use --engine transformers",
        )
    length = longest if tasks.questions else tokens.shape[1]
    size: dict[str, Any] = {
        "length": length,
        "token_bytes": 4 * eigen.uncompressed_elements_per_token,
    }
    reporter.stage("start base", 1)
    with Engine(source.folder, **size) as engine:
        reporter.stage("base", len(tokens))
        record = BaseRecord(engine, tokens, vocab_size, reporter)
        before = _accuracy("base tasks", tasks, engine.scorer(), source, longest, reporter)
    reporter.stage("start eigen", 1)
    with Engine(folder, **size, kv_cache_dtype=kv_cache_dtype) as engine:
        reporter.stage("eigen", len(tokens))
        quality = record.compare(engine, reporter)
        after = _accuracy("eigen tasks", tasks, engine.scorer(), source, longest, reporter)
    return Evaluation(quality, eigen, _pair(before, after), tokens.shape[1], notes)


def _accuracy(
    stage: str, tasks: TaskSet, scorer: Scorer, source: Source, longest: int, reporter: Reporter
) -> dict[str, Accuracy]:
    if not tasks.questions:
        return {}
    reporter.stage(stage, tasks.questions)
    return tasks.accuracy(scorer, source.tokenizer(), longest, reporter.step)


def _pair(
    base: dict[str, Accuracy], eigen: dict[str, Accuracy]
) -> dict[str, tuple[Accuracy, Accuracy]]:
    return {name: (accuracy, eigen[name]) for name, accuracy in base.items()}


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
