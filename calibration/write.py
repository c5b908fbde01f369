"""Write the Eigen checkpoint: folded weights, configuration, tokenizer, model card; all or nothing.

Last step of a calibration. Tensors stream from the base model's files to the new ones in the
base's own type, one at a time, into shards of bounded size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from calibration.card import model_card
from calibration.fold import fold, keep_apart, read_attention
from calibration.methods.base import LayerBases
from calibration.source import Source
from vllm_eigen import checkpoint
from vllm_eigen.checkpoint import FORMAT_VERSION, EigenConfig, LayerRanks
from vllm_eigen.errors import OutputError
from vllm_eigen.families import KeyMode
from vllm_eigen.files import atomic_directory

SHARD_BYTES = 2 << 30
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
) -> EigenConfig:
    """The `eigen` section for a base model and its ranks."""
    untouched = key_mode == "post-rope" or source.family.untouched(source.config)
    return EigenConfig(
        format_version=FORMAT_VERSION,
        key_mode=key_mode,
        projections="untouched" if untouched else "folded",
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
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Write and validate the checkpoint, then move it into place.

    Args:
        bases: one per layer, truncated here to the ranks in `eigen`.
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
        (folder / "README.md").write_text(model_card(source, eigen), encoding="utf-8")
        try:
            _write_shards(folder, _tensors(source, eigen, bases), shard_bytes, step)
        except SafetensorError as error:
            reason = str(error).splitlines()[0]
            raise OutputError(
                f"cannot write {output}: {reason}; free space or choose another place"
            ) from error
        checkpoint.validate(folder)


def _tensors(
    source: Source, eigen: EigenConfig, bases: Sequence[LayerBases]
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the checkpoint: folded attention first, then the base's others."""
    weights, family = source.weights, source.family
    replaced: set[str] = set()
    for index, ranks in enumerate(eigen.layers):
        path = family.attention_path(index)
        dtype = weights.get(f"{path}.{family.o_proj}.weight").dtype
        maps = bases[index].key.at(ranks.rank_k), bases[index].value.at(ranks.rank_v)
        if eigen.projections == "untouched":
            changed = keep_apart(*maps, eigen.head_size)
        else:
            attention = read_attention(weights, path, family, source.geometry)
            changed = fold(attention, *maps, family, eigen.key_mode)
            if family.qkv_proj:
                replaced.add(f"{path}.{family.qkv_proj}.weight")
        for name, tensor in changed.items():
            replaced.add(f"{path}.{name}")
            yield f"{path}.{name}", tensor.to(dtype)
    for name in weights:
        if name not in replaced:
            yield name, weights.get(name)


def _write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    shard_bytes: int,
    step: Callable[[], None],
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        path = folder / f"part-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        step()
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    files: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        files.update(dict.fromkeys(names, file))
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
