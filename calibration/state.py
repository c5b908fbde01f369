# SPDX-License-Identifier: Apache-2.0
"""What a calibration has finished so far, on disk, so that `--resume` continues from it.

One folder per set of inputs in the user's cache, named by their digest: nothing is ever resumed
with another model, text or option. Each layer's result is one file, written atomically after the
layer; the provenance is fixed at the start. A resumed run therefore ends byte-identical.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_eigen.calibration.cache import cache_folder
from vllm_eigen.calibration.layer_result import ErrorCurve, LayerResult
from vllm_eigen.calibration.methods.basis import Basis, LayerBases
from vllm_eigen.common.files import atomic_file

_VERSION = 4


class State:
    """Finished layers of one calibration.

    Args:
        folder: where they are kept; None keeps nothing, so that nothing is found again.
        provenance: the record to publish, unless an earlier run left its own.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.provenance: dict[str, Any] = self.read_json("provenance") or dict(provenance or {})
        self.write_json("provenance", self.provenance)

    @classmethod
    def open(
        cls, inputs: Mapping[str, Any], *, resume: bool, provenance: Mapping[str, Any]
    ) -> State:
        """The state of a calibration in the user's cache.

        Args:
            inputs: everything the result depends on, JSON-ready.
            resume: keep what an earlier run with the same inputs left; otherwise start over.
            provenance: see the class.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        text = json.dumps({"version": _VERSION, **inputs}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        folder = cache_folder() / "calibration" / digest
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        return cls(folder, provenance)

    def load_layer(self, layer: int) -> LayerResult | None:
        """A finished layer, or None."""
        tensors, record = self.read_tensors(_name(layer)), self.read_json(_name(layer))
        if tensors is None or record is None:
            return None
        return _result(tensors, record)

    def save_layer(self, layer: int, result: LayerResult) -> LayerResult:
        """Keep a finished layer; returns it as `load_layer` will.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        tensors = {
            f"{part}.{name}": tensor
            for part, basis in (("key", result.bases.key), ("value", result.bases.value))
            for name, tensor in basis.tensors().items()
        }
        record = {"errors": None if result.errors is None else asdict(result.errors)}
        self.write_json(_name(layer), record)
        return _result(self.write_tensors(_name(layer), tensors), record)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors kept by an interrupted run, or None."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as stored:
                # Cloned: the last bit of a product depends on how its factors lie in memory.
                return {
                    name: stored.get_tensor(name).clone()
                    for name in stored.keys()  # noqa: SIM118 - not a mapping
                }
        except (OSError, SafetensorError):
            return None

    def write_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Keep tensors; returns them as `read_tensors` will.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        from safetensors.torch import save_file

        kept = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
        if self.folder is not None:
            with atomic_file(self.folder / f"{name}.safetensors") as path:
                save_file(kept, path)
        return kept

    def read_json(self, name: str) -> Any:
        """A JSON value kept by an interrupted run, or None."""
        if self.folder is None:
            return None
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Keep a JSON value.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        if self.folder is None:
            return
        with atomic_file(self.folder / f"{name}.json") as path:
            path.write_text(json.dumps(value), encoding="utf-8")

    def discard(self) -> None:
        """Remove the state, once the result is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _name(layer: int) -> str:
    return f"layer-{layer:04d}"


def _result(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> LayerResult:
    bases = [
        Basis(**{name: tensors[f"{part}.{name}"] for name in Basis.__dataclass_fields__})
        for part in ("key", "value")
    ]
    errors = record["errors"]
    if errors is not None:
        errors = ErrorCurve(tuple(errors["thresholds"]), tuple(errors["errors"]))
    return LayerResult(LayerBases(*bases), errors)
