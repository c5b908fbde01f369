# SPDX-License-Identifier: Apache-2.0
"""Results of a serving benchmark as stored: one row a run, kept as soon as it is measured.

`results.json` in the output folder is read again by a later run with the same settings, which then
measures only what is missing; `results.csv` has the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_eigen.benchmarks.lib.results import read_json, write_csv, write_text
from vllm_eigen.benchmarks.serving.client import ClientResult
from vllm_eigen.benchmarks.serving.sampler import ServerStats
from vllm_eigen.benchmarks.serving.settings import Load, Settings, SideName
from vllm_eigen.common.errors import InputError, OutputError

FILE = "results.json"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Stored):
    """One run of one load on one server."""

    side: SideName = Field(description="which model")
    kv_cache_dtype: str = Field(description="vLLM's --kv-cache-dtype")
    request_rate: float | None = Field(description="requests a second; null sends all at once")
    max_concurrency: int | None = Field(description="requests open at most; null for no limit")
    repeat: int = Field(ge=1, description="paired: base and Eigen of one repeat belong together")
    pool_bytes: int = Field(description="KV pool as allocated, bytes")
    bytes_per_token: int = Field(description="cached bytes a token")
    capacity_tokens: int = Field(description="tokens the pool holds")
    completed: int = Field(description="requests answered")
    failed: int = Field(description="requests that ended in an error")
    errors: list[tuple[str, int]] = Field(description="what they said, and how often")
    duration: float = Field(description="seconds")
    output_tokens: int = Field(description="tokens received by the client")
    generation_tokens: int = Field(description="tokens made, as the engine counts")
    request_throughput: float = Field(description="requests a second")
    output_throughput: float = Field(description="output tokens a second")
    peak_running: int = Field(description="most sequences computed at once")
    mean_running: float = Field(description="sequences computed at once, mean over the run")
    peak_waiting: int = Field(description="most requests queued in the server")
    peak_tokens: int = Field(description="most tokens held in used blocks")
    peak_use: float = Field(description="largest used share of the pool, 0 to 1")
    preemptions: int = Field(description="sequences put back for lack of blocks")
    prefix_hits: int = Field(description="prompt tokens found in the prefix cache")
    samples: int = Field(description="samples of the server while requests ran")
    missed: int = Field(description="samples the server did not answer")
    latency: dict[str, float] = Field(description="milliseconds by METRIC_pPERCENTILE")

    @property
    def load(self) -> Load:
        """How the requests arrived."""
        return Load(self.request_rate, self.max_concurrency)

    @property
    def key(self) -> tuple[str, str, Load, int]:
        """What makes a row unique."""
        return (self.side, self.kv_cache_dtype, self.load, self.repeat)


class Perplexity(_Stored):
    """Perplexity of one model with one cache type, as served."""

    side: SideName
    kv_cache_dtype: str
    perplexity: float


class Results(BaseModel):
    """All that is stored; grows while the benchmark runs."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(description="what all rows share")
    rows: list[Row] = []
    perplexities: list[Perplexity] = []
    runs: list[dict[str, Any]] = Field(default=[], description="provenance of every run")

    def row(self, side: str, dtype: str, load: Load, repeat: int) -> Row | None:
        """The finished row of that key."""
        key = (side, dtype, load, repeat)
        return next((row for row in self.rows if row.key == key), None)

    def perplexity(self, side: str, dtype: str) -> float | None:
        """The perplexity measured for that server."""
        for item in self.perplexities:
            if (item.side, item.kv_cache_dtype) == (side, dtype):
                return item.perplexity
        return None

    def save(self, folder: Path) -> None:
        """Write `results.json` and `results.csv`."""
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")
        write_rows(folder / "results.csv", self.rows)


def make_row(
    side: SideName,
    dtype: str,
    load: Load,
    repeat: int,
    cache: dict[str, Any],
    client: ClientResult,
    stats: ServerStats,
) -> Row:
    """Put together what the client and the sampler saw; `cache` is the answer of `/v1/kv_cache`."""
    return Row(
        side=side,
        kv_cache_dtype=dtype,
        request_rate=load.request_rate,
        max_concurrency=load.max_concurrency,
        repeat=repeat,
        pool_bytes=cache["pool_bytes"],
        bytes_per_token=cache["bytes_per_token"],
        capacity_tokens=cache["tokens"]["capacity"],
        **(vars(client) | {"errors": list(client.errors)}),
        **vars(stats),
    )


def load_results(folder: Path, settings: Settings, *, overwrite: bool = False) -> Results:
    """Results to go on with: those in `folder`, or none.

    Raises:
        OutputError: the folder holds results of other settings, or a damaged file.
    """
    identity = json.loads(json.dumps(settings.identity()))
    path = folder / FILE
    if overwrite or not path.exists():
        return Results(settings=identity)
    try:
        found = Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{path} is no result of this benchmark; choose another --output or pass --overwrite"
        ) from error
    if found.settings != identity:
        other = [name for name in identity if found.settings.get(name) != identity[name]]
        raise OutputError(
            f"{path} has results of other settings ({', '.join(other)}); choose another --output "
            "or pass --overwrite"
        )
    return found


def read_results(path: Path) -> Results:
    """Results of an earlier run, `results.json` or the file of `--output-json`.

    Raises:
        InputError: the file is neither.
    """
    document = read_json(path)
    document.pop("summary", None)
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path} is no result of the serving benchmark") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One line a row, latencies in columns of their own."""
    lines = []
    for row in rows:
        line = row.model_dump()
        line["errors"] = "; ".join(f"{count} x {text}" for text, count in line["errors"])
        lines.append(line | line.pop("latency"))
    write_csv(path, lines)
