# SPDX-License-Identifier: Apache-2.0
"""GGUF files as Hugging Face folders.

Weights are read layer by layer from safetensors everywhere else, so a GGUF file is dequantized once
by transformers and kept as a folder in the user's cache. What quantization took from the weights
stays lost: the converted model is the base that a compressed one is compared with.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_eigen.calibration.cache import cache_folder
from vllm_eigen.common.errors import InputError, UsageError, first_line
from vllm_eigen.common.files import atomic_directory

_NEEDED = ("gguf", "accelerate")
"""Packages with which transformers reads GGUF files."""


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the one in a folder without `config.json`.

    Raises:
        InputError: such a folder holds several.
    """
    if model.suffix.lower() == ".gguf" and model.is_file():
        return model
    if not model.is_dir() or (model / "config.json").exists():
        return None
    files = sorted(model.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(f"{model} holds {len(files)} GGUF files; pass one, e.g. {files[0].name}")
    return files[0] if files else None


def cached_folder(file: Path) -> Path:
    """The model of a GGUF file as a folder in the user's cache, converted on first use.

    A file of another path, size or time of change is another model.

    Raises:
        UsageError, InputError, OutputError: as `convert`.
    """
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if not (folder / "config.json").is_file():
        convert(file, folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder: weights in bfloat16, tokenizer, chat template.

    The whole model is in memory meanwhile. The folder appears complete or not at all.

    Raises:
        UsageError: a package that transformers needs for it is not installed.
        InputError: transformers cannot read the file.
        OutputError: the folder exists or cannot be written.
    """
    for package in _NEEDED:
        if find_spec(package) is None:
            raise UsageError(
                f"{file}: a GGUF file needs the package {package}; "
                "install vllm-eigen[calibrate], or pass a Hugging Face folder"
            )
    # transformers draws progress bars on standard error.
    with (
        atomic_directory(folder) as work,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            tokenizer, model = _read(file)
        except Exception as error:
            raise InputError(
                f"{file}: transformers cannot read this GGUF file ({first_line(error)}); "
                "pass the model as a Hugging Face folder"
            ) from error
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


def _read(file: Path) -> tuple[Any, Any]:
    """Tokenizer and dequantized model, which is told apart from a quantized one no more."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        **where,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = ""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **where)
    if (adds := _adds_bos(file)) is not None:
        tokenizer.add_bos_token = adds
    return tokenizer, model


def _adds_bos(file: Path) -> bool | None:
    """Whether texts begin with the beginning-of-text token; None where the file does not say.

    transformers does not read this field.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return None if field is None else bool(field.contents())
