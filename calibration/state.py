"""What a calibration has finished so far, on disk, so that `--resume` takes it up again.

One folder per set of inputs in the user's cache, named by their digest: nothing is ever resumed
with another model, text or option. Each layer's result is one file, written atomically after the
layer; the provenance is fixed at the start. A resumed run therefore ends byte-identical.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.methods.base import Basis, LayerBases
from calibration.ranks import ErrorCurve
from vllm_eigen.errors import OutputError
from vllm_eigen.files import atomic_file

_VERSION = 3


@dataclass(frozen=True)
class LayerResult:
    """What the streaming pass found for one layer."""

    bases: LayerBases
    curve: ErrorCurve


class State:
    """Finished layers of one calibration.

    Args:
        inputs: everything the result depends on, JSON-ready.
        resume: keep what an earlier run with the same inputs left; otherwise start over.
        provenance: the record to publish, unless an earlier run left its own.

    Raises:
        OutputError: the cache folder cannot be written.
    """

    def __init__(
        self, inputs: Mapping[str, Any], *, resume: bool, provenance: dict[str, Any]
    ) -> None:
        text = json.dumps({"version": _VERSION, **inputs}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder = cache_folder() / "calibration" / digest
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.provenance: dict[str, Any] = self.recall("provenance") or provenance
        self.remember("provenance", self.provenance)

    def load(self, layer: int) -> LayerResult | None:
        """A finished layer, or None."""
        tensors, curve = self.recall_tensors(_name(layer)), self.recall(_name(layer))
        if tensors is None or curve is None:
            return None
        return _result(tensors, curve)

    def save(self, layer: int, result: LayerResult) -> LayerResult:
        """Keep a finished layer; returns it as `load` will.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        tensors = {
            f"{part}.{name}": tensor
            for part, basis in (("key", result.bases.key), ("value", result.bases.value))
            for name, tensor in basis.tensors().items()
        }
        curve = asdict(result.curve)
        self.remember(_name(layer), curve)
        return _result(self.remember_tensors(_name(layer), tensors), curve)

    def recall_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors kept by an interrupted run, or None."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / f"{name}.safetensors", framework="pt") as stored:
                # Cloned: the last bit of a product depends on how its factors lie in memory.
                return {
                    name: stored.get_tensor(name).clone()
                    for name in stored.keys()  # noqa: SIM118 - not a mapping
                }
        except (OSError, SafetensorError):
            return None

    def remember_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Keep tensors; returns them as `recall_tensors` will.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        from safetensors.torch import save_file

        kept = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
        with atomic_file(self.folder / f"{name}.safetensors") as path:
            save_file(kept, path)
        return kept

    def recall(self, name: str) -> Any:
        """A JSON value kept by an interrupted run, or None."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value.

        Raises:
            OutputError: the cache folder cannot be written.
        """
        with atomic_file(self.folder / f"{name}.json") as path:
            path.write_text(json.dumps(value), encoding="utf-8")

    def discard(self) -> None:
        """The result is written: the state has done its duty."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _name(layer: int) -> str:
    return f"layer-{layer:04d}"


def _result(tensors: dict[str, torch.Tensor], curve: dict[str, Any]) -> LayerResult:
    bases = [
        Basis(**{name: tensors[f"{part}.{name}"] for name in Basis.__dataclass_fields__})
        for part in ("key", "value")
    ]
    return LayerResult(
        LayerBases(*bases), ErrorCurve(tuple(curve["thresholds"]), tuple(curve["errors"]))
    )


def cache_folder() -> Path:
    """Where states live: `$VLLM_EIGEN_CACHE`, the user's cache, or the temporary folder.

    Raises:
        OutputError: none of them can be written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = os.environ.get("VLLM_EIGEN_CACHE")
    places = [Path(chosen)] if chosen else [Path(home) / "vllm-eigen", _temporary()]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OutputError(f"cannot write {places[0]}; set VLLM_EIGEN_CACHE to a writable folder")


def remember_base(fingerprint: str, folder: Path) -> None:
    """Note where a base model lies on this machine, so that no checkpoint has to say it."""
    with atomic_file(cache_folder() / "bases" / fingerprint) as path:
        path.write_text(str(folder.resolve()), encoding="utf-8")


def recall_base(fingerprint: str) -> Path | None:
    """Where the base model with this fingerprint was last seen on this machine, if it is there."""
    try:
        text = (cache_folder() / "bases" / fingerprint).read_text(encoding="utf-8")
    except OSError:
        return None
    return Path(text) if Path(text).is_dir() else None


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-eigen-{os.getuid()}"
