# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark: each server in turn, every load, paired repeats.

A repeat measures both models, one server after the other, and every other repeat starts with the
other model, so that a machine that slows down or speeds up favours neither. What is finished is on
disk at once; a server whose rows are all there is not started again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.lib.perplexity import served_perplexity
from vllm_eigen.benchmarks.serving.client import client_arguments, run_client
from vllm_eigen.benchmarks.serving.rows import Perplexity, Results, make_row
from vllm_eigen.benchmarks.serving.sampler import Sampler
from vllm_eigen.benchmarks.serving.servers import Servers
from vllm_eigen.benchmarks.serving.settings import Load, Settings, Side
from vllm_eigen.common.errors import InputError
from vllm_eigen.common.progress import Reporter

NUMBERS_A_REPEAT = 1000
"""Seeds kept for one repeat: its runs must not share prompts, nor with another repeat."""


class Runner:
    """One benchmark with its output folder and what is measured so far."""

    def __init__(
        self, settings: Settings, results: Results, folder: Path, reporter: Reporter
    ) -> None:
        self.settings, self.results = settings, results
        self.folder, self.reporter = folder, reporter
        self._tokens: list[int] | None = None

    def run(self) -> None:
        """Measure what is missing.

        Raises:
            EngineError: a server does not start or ends, or the client cannot do its work.
        """
        settings = self.settings
        steps = len(settings.cache_dtypes) * settings.repeats * 2 * len(settings.loads)
        self.reporter.stage("load", steps)
        with Servers(settings, self.folder, self.reporter.note) as servers:
            for dtype in settings.cache_dtypes:
                for repeat in range(1, settings.repeats + 1):
                    for side in settings.sides if repeat % 2 else settings.sides[::-1]:
                        self._run_server(servers, side, dtype, repeat)

    def _run_server(self, servers: Servers, side: Side, dtype: str, repeat: int) -> None:
        """Measure every missing row of one server; start it only if there is one."""
        missing = [
            load
            for load in self.settings.loads
            if self.results.row(side.name, dtype, load, repeat) is None
        ]
        self.reporter.step(len(self.settings.loads) - len(missing))
        if self.settings.text is not None and self.results.perplexity(side.name, dtype) is None:
            self._perplexity(side, dtype, servers.get(side, dtype))
        if missing:
            self._warm_up(servers.get(side, dtype))
        for load in missing:
            self._measure(side, dtype, load, repeat, servers.get(side, dtype))

    def _measure(self, side: Side, dtype: str, load: Load, repeat: int, endpoint: Endpoint) -> None:
        settings = self.settings
        number = repeat * NUMBERS_A_REPEAT + settings.loads.index(load)
        command = client_arguments(endpoint, settings.tokenizer, settings.workload, load, number)
        with Sampler(endpoint) as sampler:
            client = run_client(command, self.folder / "client.log")
        row = make_row(
            side.name, dtype, load, repeat, endpoint.kv_cache(), client, sampler.result()
        )
        self.results.rows.append(row)
        self.results.save(self.folder)
        self.reporter.step()
        failed = f", {row.failed} FAILED ({row.errors[0][0]})" if row.failed else ""
        self.reporter.note(
            f"{side.name}, cache {dtype}, repeat {repeat}, {load}: "
            f"{row.output_throughput:,.0f} tokens/s, {row.mean_running:.1f} sequences (at most "
            f"{row.peak_running}), {row.preemptions} preemptions{failed}"
        )

    def _warm_up(self, endpoint: Endpoint) -> None:
        """An uncounted run of prompts that do not come again."""
        workload = self.settings.workload
        if workload.warmups:
            few = replace(workload, num_prompts=workload.warmups)
            command = client_arguments(endpoint, self.settings.tokenizer, few, Load(), 0)
            run_client(command, self.folder / "client.log")

    def _perplexity(self, side: Side, dtype: str, endpoint: Endpoint) -> None:
        found = served_perplexity(
            endpoint.openai(),
            endpoint.model(),
            self._text_tokens(),
            int(endpoint.kv_cache()["max_model_len"]),
        )
        self.results.perplexities.append(
            Perplexity(side=side.name, kv_cache_dtype=dtype, perplexity=found)
        )
        self.results.save(self.folder)
        self.reporter.note(f"{side.name}, cache {dtype}: perplexity {found:.3f}")

    def _text_tokens(self) -> list[int]:
        """Tokens of the held-out text, read once."""
        if self._tokens is None:
            from transformers import AutoTokenizer

            path = self.settings.text
            if path is None:
                raise InputError("a perplexity needs a --text")
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"text {path} cannot be read: {error}") from error
            tokenizer = AutoTokenizer.from_pretrained(self.settings.tokenizer)
            self._tokens = list(tokenizer(text, verbose=False)["input_ids"])
        return self._tokens
