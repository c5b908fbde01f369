"""Write the Eigen checkpoint: folded weights, configuration, tokenizer, model card; all or nothing.

Last step of a calibration. Tensors stream from the base model's files to the new ones in the
base's own type, one at a time, into shards of bounded size.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calibration.card import model_card
from calibration.fold import fold_keys, fold_values, keep_keys, keep_values, read_attention
from calibration.methods.base import LayerBases
from calibration.source import Source
from calibration.tensorfile import TensorFile
from vllm_eigen import checkpoint
from vllm_eigen.checkpoint import (
    BASES_CONFIG_FILE,
    BASES_FILE,
    FORMAT_VERSION,
    BasesConfig,
    EigenConfig,
    LayerRanks,
    foldable,
    tensor_shapes,
)
from vllm_eigen.families import KeyMode
from vllm_eigen.files import atomic_directory

SHARD_BYTES = 4 << 30
DETAILS_FILE = "calibration.json"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", "*.safetensors", "*.bin", "provenance.json")


def eigen_config(
    source: Source,
    ranks: Sequence[LayerRanks],
    *,
    key_mode: KeyMode,
    method: str,
    head_group: int,
    provenance: dict[str, Any],
    bases_only: bool = False,
) -> EigenConfig:
    """The `eigen` section for a base model and its ranks."""
    most = foldable(source.family, source.config, key_mode)
    return EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=key_mode,
        projections="untouched" if bases_only else most,
        method=method,
        num_heads=source.geometry.num_heads,
        num_kv_heads=source.geometry.num_kv_heads,
        head_size=source.geometry.head_size,
        head_group=head_group,
        layers=tuple(ranks),
        provenance=provenance,
    )


def write_checkpoint(
    source: Source,
    eigen: EigenConfig,
    bases: Sequence[LayerBases],
    output: Path,
    *,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Write and validate the checkpoint, then move it into place.

    Args:
        bases: one per layer, truncated here to the ranks in `eigen`.
        details: what reports draw on, kept beside the weights as `calibration.json`.
        shard_bytes: most bytes in one weight file.
        step: called once per tensor written.

    Raises:
        OutputError: `output` exists and `overwrite` is false, or the disk refuses.
        InputError: a base tensor is damaged.
    """
    with atomic_directory(output, overwrite=overwrite) as folder:
        copy_files(source.folder, folder)
        config = {
            **source.config,
            "architectures": [source.family.eigen_architecture],
            "eigen": eigen.model_dump(mode="json"),
        }
        _write_json(folder / "config.json", config)
        _describe(folder, source, eigen, details)
        names = [name for name, _ in tensor_shapes(eigen, source.family, 1)]
        names += [*source.weights, *(f"{name}.bias" for name in names)]
        _write_shards(folder, _tensors(source, eigen, bases), names, shard_bytes, step)
        checkpoint.validate(folder)


def write_bases(
    source: Source,
    eigen: EigenConfig,
    bases: Sequence[LayerBases],
    output: Path,
    *,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Write a bases-only checkpoint, to be served over the untouched base model.

    Takes and raises what `write_checkpoint` does.
    """
    with atomic_directory(output, overwrite=overwrite) as folder:
        described = BasesConfig(
            architecture=source.family.architecture,
            base=source.name,
            eigen=eigen.model_dump(mode="json", exclude_none=True),
        )
        _write_json(folder / BASES_CONFIG_FILE, described.model_dump(mode="json"))
        _describe(folder, source, eigen, details)
        names = [name for name, _ in tensor_shapes(eigen, source.family, 1)]
        with TensorFile(folder / BASES_FILE, names) as file:
            for index in range(len(eigen.layers)):
                for name, tensor in _attention(source, eigen, bases, index).items():
                    file.add(name, tensor)
                    step()
        checkpoint.serving_overrides(folder, source.config)


def _describe(
    folder: Path, source: Source, eigen: EigenConfig, details: Mapping[str, Any] | None
) -> None:
    """Model card, and what reports draw on."""
    if details is not None:
        (folder / DETAILS_FILE).write_text(json.dumps(details) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(source, eigen), encoding="utf-8")


def _attention(
    source: Source, eigen: EigenConfig, bases: Sequence[LayerBases], index: int
) -> dict[str, torch.Tensor]:
    """A layer's new attention tensors by full name, in the base's own type."""
    family, ranks = source.family, eigen.layers[index]
    path = family.attention_path(index)
    dtype = source.weights.get(f"{path}.{family.qkv_proj or family.q_proj}.weight").dtype
    key, value = bases[index].key.at(ranks.rank_k), bases[index].value.at(ranks.rank_v)
    if eigen.projections == "untouched":
        made = keep_keys(key, eigen.head_size) | keep_values(value, eigen.head_size)
    else:
        attention = read_attention(source.weights, path, family, source.geometry)
        made = fold_values(attention, value, family)
        if eigen.projections == "folded":
            made |= fold_keys(attention, key, family, eigen.key_mode)
        else:
            made |= keep_keys(key, eigen.head_size)
    return {f"{path}.{name}": tensor.to(dtype) for name, tensor in made.items()}


def _tensors(
    source: Source, eigen: EigenConfig, bases: Sequence[LayerBases]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the checkpoint: folded attention first, then the base's others."""
    family = source.family
    replaced: set[str] = set()
    dtype = torch.float32
    for index in range(len(eigen.layers)):
        made = _attention(source, eigen, bases, index)
        dtype = next(iter(made.values())).dtype
        replaced.update(made)
        if family.qkv_proj and eigen.projections == "folded":
            replaced.add(f"{family.attention_path(index)}.{family.qkv_proj}.weight")
        yield from made.items()
    for name in source.weights:
        if name not in replaced:
            tensor = source.weights.get(name)
            yield name, tensor.to(dtype) if name in source.changed else tensor


def _write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    names: list[str],
    shard_bytes: int,
    step: Callable[[], None],
) -> None:
    shards: list[list[str]] = [[]]
    total = 0
    with contextlib.ExitStack() as stack:
        shard = stack.enter_context(TensorFile(folder / "part-0", names))
        for name, tensor in tensors:
            if shards[-1] and shard.size + tensor.nbytes > shard_bytes:
                stack.pop_all().close()
                shard = stack.enter_context(TensorFile(folder / f"part-{len(shards)}", names))
                shards.append([])
            shard.add(name, tensor)
            shards[-1].append(name)
            total += tensor.nbytes
            step()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    files: dict[str, str] = {}
    for number, held in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        files.update(dict.fromkeys(held, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def copy_files(base: Path, folder: Path) -> None:
    """Tokenizer, generation settings and licence of the base model."""
    for pattern in _COPIED:
        for path in sorted(base.glob(pattern)):
            if path.is_file() and not any(path.match(other) for other in _NOT_COPIED):
                shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
