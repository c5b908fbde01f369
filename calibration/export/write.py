# SPDX-License-Identifier: Apache-2.0
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

from vllm_eigen.calibration.export.card import model_card
from vllm_eigen.calibration.export.tensorfile import TensorFile
from vllm_eigen.calibration.methods.basis import LayerBases, LayerMaps
from vllm_eigen.calibration.model.fold import compressed_tensors
from vllm_eigen.calibration.model.source import Source
from vllm_eigen.checkpoint.config import (
    BASES_CONFIG_FILE,
    BASES_FILE,
    FORMAT_VERSION,
    BasesConfig,
    EigenConfig,
    LayerRanks,
    foldable,
)
from vllm_eigen.checkpoint.modes import KeyMode, Projections
from vllm_eigen.checkpoint.shapes import tensor_shapes
from vllm_eigen.checkpoint.validate import serving_overrides, validate
from vllm_eigen.common.files import atomic_directory

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
    key_offset: bool = False,
    value_offset: bool = False,
) -> EigenConfig:
    """The `eigen` section for a base model and its ranks, with their codes if they are coded.

    Args:
        key_offset, value_offset: whether the layers' maps have offsets.
    """
    most = foldable(source.family, source.config, key_mode)
    return EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=key_mode,
        projections=Projections.UNTOUCHED if bases_only else most,
        method=method,
        num_heads=source.geometry.num_heads,
        num_kv_heads=source.geometry.num_kv_heads,
        head_size=source.geometry.head_size,
        head_group=head_group,
        layers=tuple(ranks),
        kept_layers=source.kept_layers,
        key_offset=key_offset,
        value_offset=value_offset,
        provenance=provenance,
    )


def write_checkpoint(
    source: Source,
    eigen: EigenConfig,
    bases: Sequence[LayerBases | LayerMaps],
    output: Path,
    *,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Write and validate the checkpoint, then move it into place.

    Args:
        bases: one per compressed layer: those of a method, truncated here to the ranks in `eigen`,
            or maps that have them already (coded latents: steps multiplied in, and offsets).
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
        validate(folder)


def write_bases(
    source: Source,
    eigen: EigenConfig,
    bases: Sequence[LayerBases | LayerMaps],
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
        serving_overrides(folder, source.config)


def _describe(
    folder: Path, source: Source, eigen: EigenConfig, details: Mapping[str, Any] | None
) -> None:
    """Model card, and what reports draw on."""
    if details is not None:
        (folder / DETAILS_FILE).write_text(json.dumps(details) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(source, eigen), encoding="utf-8")


def _attention(
    source: Source, eigen: EigenConfig, bases: Sequence[LayerBases | LayerMaps], index: int
) -> dict[str, torch.Tensor]:
    """New attention tensors of the `index`-th compressed layer by full name, in the base's type."""
    family, ranks = source.family, eigen.layers[index]
    path = family.attention_path(eigen.layer_indices[index])
    dtype = source.weights.get(f"{path}.{family.qkv_proj or family.q_proj}.weight").dtype
    maps = bases[index].at(ranks)
    made = compressed_tensors(source.weights, path, family, source.geometry, eigen, maps)
    return {f"{path}.{name}": tensor.to(dtype) for name, tensor in made.items()}


def _tensors(
    source: Source, eigen: EigenConfig, bases: Sequence[LayerBases | LayerMaps]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the checkpoint: folded attention first, then the base's others."""
    family = source.family
    replaced: set[str] = set()
    dtype = torch.float32
    for index in range(len(eigen.layers)):
        made = _attention(source, eigen, bases, index)
        dtype = next(iter(made.values())).dtype
        replaced.update(made)
        if family.qkv_proj and eigen.projections.folds_values:
            path = family.attention_path(eigen.layer_indices[index])
            replaced |= {f"{path}.{family.qkv_proj}.{kind}" for kind in ("weight", "bias")}
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
