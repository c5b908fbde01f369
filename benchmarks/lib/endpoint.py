# SPDX-License-Identifier: Apache-2.0
"""A running `vllm-eigen serve`, as the benchmark talks to it."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from vllm_eigen.common.errors import EngineError


class Endpoint:
    """A server by URL. The key in `OPENAI_API_KEY`, if any, goes with every request."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.key = os.environ.get("OPENAI_API_KEY", "")

    def get(self, path: str, timeout: float = 10.0) -> str:
        """Body of a GET request.

        Raises:
            EngineError: no answer, or one of an error.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            request = urllib.request.Request(f"{self.url}{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            raise EngineError(f"{self.url}{path} answers {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EngineError(f"no server answers at {self.url}{path}: {reason}") from error

    def model(self) -> str:
        """Name of the first model served."""
        return str(json.loads(self.get("/v1/models"))["data"][0]["id"])

    def kv_cache(self) -> dict[str, Any]:
        """`/v1/kv_cache`.

        Raises:
            EngineError: the server has no such route.
        """
        try:
            found: dict[str, Any] = json.loads(self.get("/v1/kv_cache"))
        except EngineError as error:
            if " answers 404" not in str(error):
                raise
            raise EngineError(
                f"{self.url} has no /v1/kv_cache; start it with `vllm-eigen serve MODEL`"
            ) from error
        return found

    def counters(self) -> dict[str, int]:
        """vLLM's counters since the start of the server, from `/metrics`."""
        from prometheus_client.parser import text_string_to_metric_families

        from vllm_eigen.server.stats.engine_metrics import METRIC_NAMES, sum_families

        # Its histograms are most of the answer, and none of ours.
        stems = tuple(name.removesuffix("_total") for name in METRIC_NAMES)
        lines = [
            line
            for line in self.get("/metrics").splitlines()
            if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(stems)
        ]
        metrics = sum_families(text_string_to_metric_families("\n".join(lines) + "\n"))
        return {
            "preemptions": metrics.preemptions,
            "prefix_hits": metrics.prefix_hits,
            "prompt_tokens": metrics.prompt_tokens,
            "generation_tokens": metrics.generation_tokens,
        }

    def openai(self) -> Any:
        """An `openai` client of this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", timeout=300.0)
