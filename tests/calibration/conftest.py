# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the calibration's tests: a tiny model, a text, a command."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibration.tiny import WORDS, build_model, save_model


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    monkeypatch.setenv("EIGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
    torch.set_num_threads(1)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Thirty random documents of 40 words."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=40)) for _ in range(30)]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Build and save a tiny model; returns its folder."""

    def make(kind: str = "llama", name: str = "model", **changes: Any) -> Path:
        return save_model(build_model(kind, **changes), tmp_path / name)

    return make


@pytest.fixture
def command(capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Run a subcommand as the console script would: exit status, standard output and error."""
    from vllm_eigen.common.errors import EigenError

    def run(name: str, *arguments: Any) -> tuple[int, str, str]:
        import argparse
        import importlib

        module = importlib.import_module(f"vllm_eigen.calibration.commands.{name}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        try:
            status = module.run(parser.parse_args([str(item) for item in arguments]))
            message = ""
        except EigenError as error:
            status, message = error.exit_code, str(error)
        captured = capsys.readouterr()
        return status, captured.out, captured.err + message

    return run
