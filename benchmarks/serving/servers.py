# SPDX-License-Identifier: Apache-2.0
"""Starts the two servers of a benchmark in turn, with the same flags and the same KV bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.lib.servers import running
from vllm_eigen.benchmarks.serving.settings import Settings, Side
from vllm_eigen.server.launch.process import ServerProcess, can_compile

SERVED_NAME = "bench"
# vLLM closes an idle connection after 5 s, perhaps just as the client uses it again.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}


class Servers:
    """At most one server at a time; it runs on until another is asked for. A context manager."""

    def __init__(self, settings: Settings, logs: Path, note: Callable[[str], None]) -> None:
        self._settings, self._logs, self._note = settings, logs, note
        self._stack = contextlib.ExitStack()
        self._running: tuple[Side, str] | None = None
        self._server: ServerProcess | None = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def get(self, side: Side, dtype: str) -> Endpoint:
        """The server of that side and cache type, ready.

        Raises:
            EngineError: it does not start; names its log.
        """
        if side.url is not None:
            return Endpoint(side.url)
        if self._server is None or self._running != (side, dtype):
            self._stack.close()
            self._server = None
            self._note(f"{side.name}, cache {dtype}: starting vLLM ...")
            log = self._logs / f"{side.name}-{dtype}.log"
            self._server = self._stack.enter_context(
                running(side.model, *self._options(side, dtype), log=log, environment=ENVIRONMENT)
            )
            self._running = (side, dtype)
        return Endpoint(self._server.url)

    def _options(self, side: Side, dtype: str) -> list[str]:
        """vLLM's flags, the same for both sides but for the base's own cache type."""
        settings = self._settings
        dtype = settings.cache_dtype(side, dtype)
        found = ["--served-model-name", SERVED_NAME, "--kv-cache-dtype", dtype]
        for flag, value in (
            ("--kv-cache-memory-bytes", settings.pool_bytes),
            ("--max-model-len", settings.max_model_len),
            ("--max-num-seqs", settings.max_num_seqs),
        ):
            if value is not None:
                found += [flag, str(value)]
        # torch's compiler cannot work below a path with spaces.
        if not can_compile():
            found.append("--enforce-eager")
        return [*found, *settings.server_options]
