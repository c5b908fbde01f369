# SPDX-License-Identifier: Apache-2.0
"""Push a checkpoint to the Hugging Face hub, its card with licence, base model and metrics.

Whatever the hub or the licence could refuse is asked for first, so that `calibrate --push` fails
before hours of work and not after.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eigen.checkpoint.config import BASES_CONFIG_FILE, CONFIG_FILE
from vllm_eigen.checkpoint.validate import validate
from vllm_eigen.common.errors import CheckpointError, UsageError
from vllm_eigen.common.hub import LOGIN, hub_error, is_hub_id, is_offline

CARD_FILE = "README.md"
_LICENCE_FIELDS = ("license", "license_name", "license_link")
_METRICS = {
    "eigen_perplexity": ("perplexity", "perplexity"),
    "base_perplexity": ("perplexity", "perplexity of the base model"),
    "top1_agreement": ("accuracy", "top-1 agreement with the base model"),
    "kl_per_token": ("kl-divergence", "KL divergence from the base model, nats a token"),
}
"""By field of the provenance: the hub's type of metric, and its name."""


@dataclass(frozen=True)
class Destination:
    """A repository that this account may write, and the licence under which to publish.

    Attributes:
        repository: OWNER/NAME.
        licence: fields of the card: `license`, and for `other` its name and link.
        private: whether a repository that is made is private.
    """

    repository: str
    licence: Mapping[str, str]
    private: bool


def destination(
    repository: str,
    *,
    base: str,
    commit: str | None = None,
    licence: str | None = None,
    private: bool = False,
    folder: Path | None = None,
) -> Destination:
    """Check account, name and licence; nothing is written.

    Args:
        base: name of the base model, whose licence counts if it is a hub id.
        commit: of the base model.
        licence: the hub's identifier, e.g. `apache-2.0`; else that of the checkpoint's own card,
            else the base model's.
        folder: the checkpoint, if it is made.

    Raises:
        UsageError: the name is none, or the licence is not known.
        InputError: the hub is not to be used, or does not know this account.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not is_hub_id(repository) or "/" not in repository:
        raise UsageError(f"{repository!r} is no name of a hub repository; give OWNER/NAME")
    if is_offline():
        raise UsageError("HF_HUB_OFFLINE is set; unset it to push to the hub")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UsageError(f"no account of the Hugging Face hub is known here; {LOGIN}") from error
    except Exception as error:
        raise hub_error(error, repository) from error
    fields = {"license": licence} if licence else _licence(base, commit, folder)
    if not fields.get("license"):
        raise UsageError(f"the licence of {base or 'the base model'} is not known; give --license")
    return Destination(repository, fields, private)


def push(folder: Path, to: Destination) -> str:
    """Upload a checkpoint, its card first; returns the repository's address.

    Raises:
        CheckpointError: it is damaged.
        InputError: the hub refuses.
    """
    from huggingface_hub import HfApi

    card = hub_card(folder, to)
    api = HfApi()
    try:
        url = api.create_repo(to.repository, private=to.private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD_FILE,
            repo_id=to.repository,
            commit_message="Model card",
        )
        api.upload_folder(
            repo_id=to.repository,
            folder_path=folder,
            ignore_patterns=[CARD_FILE],
            commit_message="Eigen checkpoint",
        )
    except Exception as error:
        raise hub_error(error, to.repository) from error
    return str(url)


def base_of(folder: Path) -> tuple[str, str | None]:
    """Name of a checkpoint's base model, and its commit if it is from the hub.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    base = _provenance(folder).get("base") or {}
    return str(base.get("name", "")), base.get("commit")


def hub_card(folder: Path, to: Destination) -> str:
    """The checkpoint's card with what the hub reads: licence, base model and metrics.

    Raises:
        CheckpointError: the checkpoint is damaged or has no card.
    """
    from huggingface_hub import EvalResult, ModelCard

    provenance = _provenance(folder)
    try:
        card = ModelCard.load(folder / CARD_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CARD_FILE} cannot be read: {error}") from error
    for name in _LICENCE_FIELDS:
        if name in to.licence:
            setattr(card.data, name, to.licence[name])
    base, _ = base_of(folder)
    if "/" in base:
        card.data.base_model = base
    card.data.pipeline_tag = "text-generation"
    measured: Mapping[str, Any] = provenance.get("measured") or {}
    text = str((provenance.get("calibration") or {}).get("text", "text"))
    card.data.model_name = to.repository
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{text}, held-out windows",
            metric_type=kind,
            metric_name=name,
            metric_value=float(measured[field]),
        )
        for field, (kind, name) in _METRICS.items()
        if field in measured
    ] or None
    # Of the folder that it was made in.
    card.text = card.text.replace("vllm-eigen serve DIR", f"vllm-eigen serve {to.repository}")
    return str(card)


def _licence(base: str, commit: str | None, folder: Path | None) -> dict[str, str]:
    """Licence fields of the checkpoint's own card, or of the base model's on the hub."""
    from huggingface_hub import HfApi, ModelCard

    if folder is not None and (folder / CARD_FILE).is_file():
        found = _fields(ModelCard.load(folder / CARD_FILE).data)
        if found:
            return found
    if "/" not in base or not is_hub_id(base):
        return {}
    try:
        return _fields(HfApi().model_info(base, revision=commit).card_data)
    except Exception as error:
        raise hub_error(error, base, commit) from error


def _fields(data: Any) -> dict[str, str]:
    values = {name: getattr(data, name, None) for name in _LICENCE_FIELDS}
    return {name: str(value) for name, value in values.items() if value}


def _provenance(folder: Path) -> dict[str, Any]:
    """How the checkpoint was made; that of bases alone stands in a file of its own."""
    if (folder / CONFIG_FILE).is_file():
        return validate(folder).provenance
    path = folder / BASES_CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["eigen"].get("provenance", {})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no Eigen checkpoint ({CONFIG_FILE} or {BASES_CONFIG_FILE})"
        ) from error
    return dict(found)
