# SPDX-License-Identifier: Apache-2.0
"""Servers that a benchmark starts, and what it sets in the environment before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllm_eigen.server.launch.process import ServerProcess, start

STARTUP_SECONDS = 600.0
SERVE = ("vllm_eigen.cli", "serve")
VLLM_SERVE = ("vllm.entrypoints.openai.api_server", "--model")
"""vLLM's own server, to compare with."""


def set_environment(*models: str | Path, **forced: str) -> None:
    """Variables for vLLM and the libraries below it, which servers started later inherit.

    Args:
        models: if all are local folders, nothing asks the hub for them.
        forced: variables that the benchmark sets whatever they were; the others are defaults.
    """
    os.environ.update(forced)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if all(Path(model).is_dir() for model in models):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def running(
    model: str | Path,
    *options: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = SERVE,
) -> Iterator[ServerProcess]:
    """A server that answers, stopped when the block ends.

    Args:
        options: vLLM flags.
        log: receives the server's output.
        environment: variables added to this process's.
        program: module to run and what stands before the model.

    Raises:
        EngineError: it does not start; names its log.
    """
    with start(model, *options, log=log, environment=environment, program=program) as server:
        server.wait_ready(STARTUP_SECONDS)
        yield server
