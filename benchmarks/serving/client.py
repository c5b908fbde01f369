# SPDX-License-Identifier: Apache-2.0
"""One load on one server, sent by vLLM's own benchmark client."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.serving.settings import Load, Workload
from vllm_eigen.common.errors import EngineError

LATENCIES = ("ttft", "tpot", "itl")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class ClientResult:
    """What the client saw in one run.

    Attributes:
        completed, failed: requests.
        errors: what failed requests said, and how often, most frequent first.
        duration: seconds.
        output_tokens: received.
        request_throughput, output_throughput: requests and output tokens a second.
        latency: milliseconds by `METRIC_pPERCENTILE`, e.g. `ttft_p50`: time to the first token,
            time a further token of a request, and time between tokens.
    """

    completed: int
    failed: int
    errors: tuple[tuple[str, int], ...]
    duration: float
    output_tokens: int
    request_throughput: float
    output_throughput: float
    latency: dict[str, float]


def client_arguments(
    endpoint: Endpoint, tokenizer: str, workload: Workload, load: Load, number: int
) -> list[str]:
    """The command line of vLLM's client for one run; `number` makes its prompts its own."""
    found = [
        *("--backend", "openai", "--base-url", endpoint.url, "--endpoint", "/v1/completions"),
        *("--model", tokenizer, "--served-model-name", endpoint.model()),
        *("--dataset-name", workload.dataset, "--num-prompts", str(workload.num_prompts)),
        *("--seed", str(workload.seed + number), "--temperature", "0", "--disable-tqdm"),
        *("--percentile-metrics", ",".join(LATENCIES), "--save-detailed"),
        *("--metric-percentiles", ",".join(str(item) for item in PERCENTILES)),
    ]
    if workload.dataset_path is not None:
        found += ["--dataset-path", workload.dataset_path]
    if workload.dataset == "random":
        found += ["--random-input-len", str(workload.input_len)]
    if workload.dataset == "custom":
        found += ["--skip-chat-template"]
    if workload.output_len:
        found += ["--output-len", str(workload.output_len)]
    if load.request_rate is not None:
        found += ["--request-rate", str(load.request_rate)]
    if load.max_concurrency is not None:
        found += ["--max-concurrency", str(load.max_concurrency)]
    return found


def run_client(command: Sequence[str], log: Path) -> ClientResult:
    """Run the client once; what it prints is added to `log`.

    Raises:
        EngineError: the client itself failed, e.g. for a data set it cannot read. Requests that
            fail are counted in the result instead.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of this process; see `servers`
    from vllm_eigen.server.launch.bench_client import run_bench_client

    with (
        log.open("a", encoding="utf-8") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        try:
            found = run_bench_client(command)
        except (Exception, SystemExit) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"vLLM's benchmark client failed: {reason}; see {log}") from error
    errors = Counter(text.strip().splitlines()[-1] for text in found["errors"] if text.strip())
    return ClientResult(
        completed=int(found["completed"]),
        failed=int(found["failed"]),
        errors=tuple(errors.most_common(3)),
        duration=float(found["duration"]),
        output_tokens=int(found["total_output_tokens"]),
        request_throughput=float(found["request_throughput"]),
        output_throughput=float(found["output_throughput"]),
        latency={
            f"{metric}_p{percentile}": float(found[f"p{percentile}_{metric}_ms"])
            for metric in LATENCIES
            for percentile in PERCENTILES
        },
    )
