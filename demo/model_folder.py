"""The Hugging Face folder `demo.train` writes: weights, tokenizer, model card, log and provenance.

The folder appears complete or not at all, so a killed training leaves the previous checkpoint. What
is written names packages, versions and the processor, and no path or host of the machine.
"""

import copy
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import STDLIB, TRAINING_SOURCES, source_root
from vllm_eigen.files import atomic_directory

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Demo model

A small Llama for trying out low-rank KV caches on a laptop: {parameters:,} parameters,
{layers} layers, {heads} query and {kv_heads} key/value heads of {head_size}, {positions:,}
positions, a byte-level BPE of {vocabulary:,} tokens, bfloat16. It writes English in the style of
Python documentation; it knows nothing, follows no instructions, and is meant for demonstrations
and tests only.

Trained by

    {command}

on the documentation strings of Python packages (`demo/corpus.py`; packages, versions and licences
are in `provenance.json`), which are not shipped with it. Modules are split by name: the held-out
text comes from modules never trained on.

| | |
|---|---|
| tokens trained on | {tokens:,} |
| held-out perplexity per token, windows of 512 | {perplexity_512:.2f} |
| held-out perplexity per token, windows of 2,048 | {perplexity_2048:.2f} |
| hardware | {hardware} |

Two runs differ slightly: the schedule follows the clock, and other package versions carry slightly
other texts. The course of the training is in `training_log.jsonl`.
"""


def save(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    log: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """Replace `folder` by one with the model in bfloat16 and everything that belongs to it."""
    config = model.config
    half = copy.deepcopy(model).bfloat16()
    half.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        positions=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        command=provenance["command"],
        tokens=provenance["tokens_seen"] + provenance.get("earlier_run", {}).get("tokens_seen", 0),
        perplexity_512=provenance["heldout"]["perplexity_windows_512"],
        perplexity_2048=provenance["heldout"]["perplexity_windows_2048"],
        hardware=provenance["hardware"],
    )
    with atomic_directory(folder, overwrite=True) as work:
        half.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        (work / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (work / "README.md").write_text(card)


def load(folder: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM, dict[str, Any]]:
    """Tokenizer, float32 model and provenance of a folder written by `save`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    provenance: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return tokenizer, model.train(), provenance


def environment() -> dict[str, Any]:
    """Versions, hardware, date and text sources, for the provenance of a training."""
    libraries = ("torch", "transformers", "tokenizers")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{_processor()}, {torch.get_num_threads()} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), **versions},
        "text_sources": [_source(name) for name in TRAINING_SOURCES if source_root(name)],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _source(name: str) -> dict[str, str]:
    """Package, version and licence as the package itself declares them."""
    if name == STDLIB:
        version, licence = platform.python_version(), "PSF-2.0"
        return {"package": "Python standard library", "version": version, "licence": licence}
    package = importlib.metadata.packages_distributions().get(name, [name])[0]
    metadata = importlib.metadata.metadata(package)
    classifiers = metadata.get_all("Classifier") or []
    declared = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License")]
    written = (metadata["License-Expression"] or metadata["License"] or "").strip()
    licence = written if written and "\n" not in written else ", ".join(declared)
    return {"package": package, "version": metadata["Version"], "licence": licence or "unknown"}
