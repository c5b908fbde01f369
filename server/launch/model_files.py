# SPDX-License-Identifier: Apache-2.0
"""A model's `config.json` and the size of its weight files, from a folder or the hub.

No weights are loaded; from the hub only the JSON files are fetched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_eigen.checkpoint.config import CONFIG_FILE
from vllm_eigen.common.errors import InputError, UsageError
from vllm_eigen.common.hub import hub_error, is_hub_id, is_offline

INDEX_FILE = "model.safetensors.index.json"


def is_local(model: str) -> bool:
    """Whether `model` is a folder, or can only mean one (hub ids have at most one slash).

    Raises:
        InputError: it means a folder that does not exist.
    """
    if Path(model).is_dir():
        return True
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"model folder {model} does not exist")
    return False


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The model's `config.json`.

    Args:
        model: folder or hub id.
        revision: of a hub model: branch, tag or commit.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
        UsageError: a revision of a folder.
    """
    if not is_local(model):
        return _read_json(_fetch(model, CONFIG_FILE, revision))
    if revision is not None:
        raise UsageError(f"--revision {revision} is of a hub model; {model} is a folder")
    return _read_json(Path(model) / CONFIG_FILE)


def weight_bytes(model: str, revision: str | None = None) -> int | None:
    """Bytes of the safetensors files, if the files or their index tell.

    Raises:
        InputError: there is no such model.
    """
    if not is_local(model):
        try:
            return _total_size(_read_json(_fetch(model, INDEX_FILE, revision)))
        except InputError:
            return None
    folder = Path(model)
    if (folder / INDEX_FILE).is_file():
        return _total_size(_read_json(folder / INDEX_FILE))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _total_size(index: dict[str, Any]) -> int | None:
    """`total_size` of a safetensors index."""
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(size) if isinstance(size, int | float) else None


def check_hub(model: str, revision: str | None, token: str | bool | None) -> None:
    """Refuse a hub model that cannot be had, before vLLM tries; what else it may lack is vLLM's.

    Args:
        revision, token: as vLLM's `--revision` and `--hf-token`.

    Raises:
        InputError: it is gated, absent or not cached, or has no such revision.
    """
    if not is_hub_id(model) or is_local(model) or os.environ.get("VLLM_USE_MODELSCOPE"):
        return
    from huggingface_hub import constants, hf_hub_download

    if (
        is_offline()
        and Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}").is_dir()
    ):
        return
    try:
        hf_hub_download(model, CONFIG_FILE, revision=revision, token=token)
    except Exception as error:
        if not _is_no_such_file(error):
            raise hub_error(error, model, revision) from error


def _fetch(model: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except Exception as error:
        if _is_no_such_file(error):
            raise InputError(f"{model!r} of the Hugging Face hub has no {name}") from error
        raise hub_error(error, model, revision) from error


def _is_no_such_file(error: Exception) -> bool:
    """Whether the hub has the repository, and no such file in it."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object")
    return content
