# SPDX-License-Identifier: Apache-2.0
"""What a serving benchmark measures: the two models, their pool, the requests, and the loads."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vllm_eigen.common.errors import InputError, UsageError

SideName = Literal["base", "eigen"]
SIDES: tuple[SideName, SideName] = ("base", "eigen")
DATASETS = ("random", "sharegpt", "custom")
CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        request_rate: requests a second, Poisson; None sends all at once.
        max_concurrency: requests the client keeps open at most; None for no limit.
    """

    request_rate: float | None = None
    max_concurrency: int | None = None

    def __str__(self) -> str:
        if self.request_rate is None:
            return f"{self.max_concurrency} users" if self.max_concurrency else "all at once"
        return f"{self.request_rate:g} requests/s"


@dataclass(frozen=True)
class Workload:
    """The requests of one run, the same for both servers.

    Attributes:
        dataset: as in vLLM's benchmark: `random`, `sharegpt` or `custom` (jsonl).
        dataset_path: its file; None for `random`.
        input_len, output_len: tokens a request; data sets other than `random` have their own
            prompts, and `output_len` 0 keeps their own output lengths.
        num_prompts: requests of a run.
        warmups: requests before the first run of a server, not counted.
        seed: of prompts and arrivals; each run of a repeat adds its own number, so that no prompt
            comes twice to one server.
    """

    dataset: str
    dataset_path: str | None
    input_len: int
    output_len: int
    num_prompts: int
    warmups: int
    seed: int


@dataclass(frozen=True)
class Side:
    """One of the two servers: started here for `model`, or running at `url`."""

    name: SideName
    model: str
    url: str | None = None


@dataclass(frozen=True)
class Settings:
    """A whole benchmark.

    Attributes:
        pool_bytes: KV bytes of each server; None for servers that run already.
        max_model_len, max_num_seqs: vLLM's flags of the same name; None leaves vLLM's default.
        server_options: further vLLM flags, for both.
        tokenizer: folder or hub id, for prompts and perplexity.
        text: held-out text for the perplexities; None for none.
        base_cache_dtype: the base's own cache type; None: that of the row.
    """

    sides: tuple[Side, Side]
    workload: Workload
    loads: tuple[Load, ...]
    repeats: int
    cache_dtypes: tuple[str, ...]
    pool_bytes: int | None
    max_model_len: int | None
    max_num_seqs: int | None
    server_options: tuple[str, ...]
    tokenizer: str
    text: Path | None
    base_cache_dtype: str | None = None

    def cache_dtype(self, side: Side, dtype: str) -> str:
        """What a side stores in rows of a cache type."""
        own = self.base_cache_dtype if side.name == "base" else None
        return own or dtype

    def identity(self) -> dict[str, Any]:
        """What must be equal for results to be of one table; JSON-ready.

        Loads, repeats and cache types may be added later: they are part of each row's own key.
        """
        return {
            "models": {side.name: _model_identity(side) for side in self.sides},
            "workload": asdict(
                replace(
                    self.workload,
                    dataset_path=self.workload.dataset_path and _digest(self.workload.dataset_path),
                )
            ),
            "pool_bytes": self.pool_bytes,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "server_options": list(self.server_options),
            "text": self.text and _digest(self.text),
            **({"base_cache_dtype": self.base_cache_dtype} if self.base_cache_dtype else {}),
        }


def parse_loads(rates: str | None, concurrencies: str | None) -> tuple[Load, ...]:
    """Loads of two comma-separated lists, e.g. `4,8,inf` and `8,32`; concurrencies come first.

    Raises:
        UsageError: a value is no number above zero, or both lists are empty.
    """
    loads = [
        Load(max_concurrency=int(_number(part, "--max-concurrency", whole=True)))
        for part in _parts(concurrencies)
    ]
    for part in _parts(rates):
        rate = _number(part, "--request-rate")
        loads.append(Load(request_rate=None if rate == float("inf") else rate))
    if not loads:
        raise UsageError("give a load: --max-concurrency 8,32 or --request-rate 4,inf")
    return tuple(dict.fromkeys(loads))


def parse_cache_dtypes(text: str) -> tuple[str, ...]:
    """Cache types of a comma-separated list.

    Raises:
        UsageError: a type is unknown.
    """
    found = _parts(text)
    for part in found:
        if part not in CACHE_DTYPES:
            raise UsageError(f"--kv-cache-dtype {part} is none of {', '.join(CACHE_DTYPES)}")
    if not found:
        raise UsageError("--kv-cache-dtype names no type; write for example auto,fp8")
    return tuple(dict.fromkeys(found))


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _number(text: str, option: str, whole: bool = False) -> float:
    try:
        value: float = int(text) if whole else float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        kind = "whole number" if whole else "number"
        raise UsageError(f"{option} {text} is no {kind} above zero")
    return value


def _model_identity(side: Side) -> dict[str, str]:
    """The model's name and, for a local folder, a digest of its configuration.

    An Eigen checkpoint's configuration has the time of its calibration in it.
    """
    if side.url is not None:
        return {"url": side.url}
    folder = Path(side.model)
    if not folder.is_dir():
        return {"name": side.model}
    return {"name": folder.resolve().name, "config": _digest(folder / "config.json")}


def _digest(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
