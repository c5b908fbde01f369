# SPDX-License-Identifier: Apache-2.0
"""The base model on disk: configuration, tokenizer, and weights by name.

First step of the flow. Tensors are read one at a time, so that a model larger than memory can be
read layer by layer, from safetensors or from the older `.bin` shards. A GGUF file is first
converted to safetensors (`gguf`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_eigen.calibration.model.gguf import cached_folder, find_gguf
from vllm_eigen.checkpoint.families import Experts, Family, Geometry, family_of
from vllm_eigen.common.errors import InputError, UsageError, first_line
from vllm_eigen.common.hub import hub_error, is_hub_id

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*")
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
"""Kinds of RoPE scaling whose frequencies change past the original length."""
_EXPERT = re.compile(r"(?P<mlp>.+)\.experts\.(?P<expert>\d+)\.\w+\.weight")


@dataclass(frozen=True)
class Source:
    """A base model.

    Attributes:
        name: hub id, or the folder's own name; safe to publish.
        folder: where its files are.
        config: its `config.json`.
        changed: tensors that replace stored ones of the same name, such as refitted projections.
        commit: of a hub model.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    family: Family
    geometry: Geometry
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    commit: str | None = None

    @cached_property
    def weights(self) -> Weights:
        """Its tensors, as they are stored."""
        return Weights(self.folder, self.family, self.changed)

    @cached_property
    def tensors(self) -> ModelTensors:
        """Its tensors, as transformers' model has them."""
        return ModelTensors(self.weights, self.family)

    @cached_property
    def fingerprint(self) -> str:
        """A short digest of the configuration and the weight files' names and sizes."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for path in _weight_files(self.folder):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def record(self) -> dict[str, str]:
        """What tells the model from others, for a checkpoint's provenance."""
        found = {"name": self.name, "fingerprint": self.fingerprint}
        return found if self.commit is None else {**found, "commit": self.commit}

    @property
    def max_positions(self) -> int:
        """Longest window the model takes, in tokens."""
        found = self.config.get("max_position_embeddings") or self.config.get("max_seq_len")
        return int(found or 2048)

    @property
    def rotary_positions(self) -> int:
        """Positions over which RoPE has the frequencies that it has in a short window."""
        scaling = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        scaling = scaling.get("full_attention", scaling)  # a table for each kind of layer
        if str(scaling.get("rope_type") or scaling.get("type")) not in _LENGTH_DEPENDENT:
            return self.max_positions
        original = "original_max_position_embeddings"
        found = scaling.get(original) or self.config.get(original) or self.max_positions
        return min(int(found), self.max_positions)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose cache stays as it is."""
        compressed = self.family.compressed_layers(self.config)
        return tuple(i for i in range(self.geometry.num_layers) if i not in compressed)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config["vocab_size"])

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: the folder has none that transformers can load.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            raise InputError(
                f"{self.folder}: no usable tokenizer ({first_line(error)}); "
                "copy tokenizer.json and tokenizer_config.json there"
            ) from error


def open_source(model: str, *, revision: str | None = None, with_weights: bool = True) -> Source:
    """Find a model by path or hub id and read its configuration.

    A GGUF file, or a folder that holds one, is converted on first use. Without weights only
    configuration and tokenizer are downloaded.

    Args:
        revision: of a hub model: branch, tag or commit; its main branch by default.

    Raises:
        InputError: it does not exist, cannot be downloaded, or its configuration is damaged.
        UsageError: a revision of a model that is on disk.
        UnsupportedModelError: its architecture has no description.
    """
    folder = Path(model)
    name = folder.resolve().name if folder.is_dir() else model
    commit = None
    if revision is not None and folder.exists():
        raise UsageError(f"--revision {revision} is of a hub model; {model} is on disk")
    if (file := find_gguf(folder)) is not None:
        folder, name = cached_folder(file), file.stem
    elif not folder.is_dir():
        folder = _download(model, revision, with_weights)
        commit = folder.name  # huggingface_hub calls a snapshot by its commit
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder} has no readable config.json ({error.strerror}); pass a Hugging Face folder"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object")
    if "eigen" in config:
        raise InputError(f"{folder} is an Eigen checkpoint already; pass its base model")
    family = family_of(config)
    if config.get("quantization_config"):
        raise InputError(f"{folder}: the weights are quantized; pass the unquantized model")
    return Source(name, folder, config, family, family.geometry(config), commit=commit)


class Weights:
    """Tensors of a checkpoint by name, read one at a time."""

    def __init__(
        self, folder: Path, family: Family, changed: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._folder = folder
        self._changed = changed or {}
        self._prefix = family.decoder.split(".")[0] + "."
        self._files: dict[str, tuple[Path, str]] = {}
        for path in _weight_files(folder):
            for stored in _names_in(path):
                if not stored.endswith("rotary_emb.inv_freq"):
                    self._files[self._canonical(stored)] = (path, stored)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type unless it was changed.

        Raises:
            InputError: it is missing, unreadable, or holds NaN or infinity.
        """
        if name in self._changed:
            return self._changed[name]
        if name not in self._files:
            raise InputError(
                f"{self._folder}: tensor {name} is missing; a shard may be absent, "
                "download the model again"
            )
        path, stored = self._files[name]
        tensor = _read(path, stored)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{path}: tensor {stored} holds NaN or infinity; the model is damaged, "
                "download or train it again"
            )
        return tensor

    def _canonical(self, stored: str) -> str:
        """Some checkpoints were saved from the inner model, without its outer name."""
        if stored.startswith((self._prefix, "lm_head.")):
            return stored
        return self._prefix + stored


class ModelTensors:
    """A checkpoint's tensors by the names of transformers' model, which fuses a layer's experts.

    Checkpoints have the matrices of each expert apart, and what is written keeps them so. The fused
    tensors are made when they are asked for.
    """

    def __init__(self, weights: Weights, family: Family) -> None:
        self._weights = weights
        self._stored: dict[str, str] = {}
        self._fused: dict[str, list[list[str]]] = {}
        for name in weights:
            if family.experts is None:
                self._stored[name] = name
            elif (found := _EXPERT.fullmatch(name)) is None:
                self._stored[family.experts.model_name(name)] = name
            else:
                self._add_experts(found["mlp"], int(found["expert"]) + 1, family.experts)

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._fused

    def __iter__(self) -> Iterator[str]:
        yield from self._stored
        yield from self._fused

    def get(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            InputError: it is missing or damaged.
        """
        if name not in self._fused:
            return self._weights.get(self._stored.get(name, name))
        experts = self._fused[name]
        first = self._joined(experts[0])
        fused = first.new_empty(len(experts), *first.shape)
        for expert, parts in zip(fused, experts, strict=True):
            expert.copy_(self._joined(parts))
        return fused

    def _joined(self, parts: list[str]) -> torch.Tensor:
        """Matrices below each other."""
        return torch.cat([self._weights.get(part) for part in parts])

    def _add_experts(self, mlp: str, count: int, experts: Experts) -> None:
        """Note that the MLP at a path has at least so many experts."""
        for name, projections in (
            ("gate_up_proj", (experts.gate, experts.up)),
            ("down_proj", (experts.down,)),
        ):
            found = self._fused.setdefault(f"{experts.model_name(mlp)}.experts.{name}", [])
            for expert in range(len(found), count):
                path = f"{mlp}.experts.{expert}"
                found.append([f"{path}.{projection}.weight" for projection in projections])


def _download(model: str, revision: str | None, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    if not is_hub_id(model) or Path(model).exists():
        raise InputError(
            f"model {model!r} is neither a folder nor a model of the Hugging Face hub; check the "
            "name"
        )
    patterns = [name for name in _PATTERNS if with_weights or name != "*.safetensors"]
    older = [*_PATTERNS, "pytorch*.bin"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        if with_weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=older))
    except Exception as error:
        raise hub_error(error, model, revision) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / pattern
        if not index.exists():
            continue
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is damaged: {error}") from error
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise InputError(
                f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)} are); "
                "download the model again"
            )
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder} holds no model.safetensors or pytorch_model.bin")
    return files


def _names_in(path: Path) -> list[str]:
    try:
        if path.suffix == ".bin":
            return [name for name, value in _load_bin(path).items() if torch.is_tensor(value)]
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except Exception as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); download it again") from error


def _read(path: Path, stored: str) -> torch.Tensor:
    try:
        if path.suffix == ".bin":
            tensor: torch.Tensor = _load_bin(path)[stored]
            return tensor.clone()
        from safetensors import safe_open

        # Opened anew each time: a lasting map of the file would count as resident memory.
        with safe_open(path, framework="pt") as tensors:
            found: torch.Tensor = tensors.get_tensor(stored)
            return found.clone()  # aligned in memory as torch does it
    except Exception as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); download it again") from error


def _load_bin(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return loaded
