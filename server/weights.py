"""A model's `config.json` and the size of its weight files, local or on the hub, unloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_eigen.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def read_model(model: str) -> tuple[dict[str, Any], int | None]:
    """Configuration, and bytes of the safetensors files if a file or an index tells.

    Args:
        model: a folder, or a hub id; from the hub only the two JSON files are fetched.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """
    folder = Path(model)
    if folder.is_dir():
        config = _json(folder / CONFIG)
        index = folder / INDEX
        if index.is_file():
            return config, _total(_json(index))
        files = list(folder.glob("*.safetensors"))
        return config, sum(path.stat().st_size for path in files) or None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"model folder {model} does not exist")
    return _json(_from_hub(model, CONFIG)), _hub_total(model)


def _total(index: dict[str, Any]) -> int | None:
    """`total_size` of a safetensors index."""
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(size) if isinstance(size, int | float) else None


def _hub_total(model: str) -> int | None:
    try:
        return _total(_json(_from_hub(model, INDEX)))
    except InputError:
        return None


def _from_hub(model: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{name} of {model} cannot be had from the hub: {reason}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object")
    return found
