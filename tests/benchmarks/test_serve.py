# SPDX-License-Identifier: Apache-2.0
"""`bench serve`: options, tables, resume, and whole runs with vLLM's client on fake servers."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import small_llama
from tests.benchmarks.fake_server import BLOCK, Fake, serving
from vllm_eigen import cli
from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.benchmarks.serving import serve
from vllm_eigen.benchmarks.serving.rows import Perplexity, Results, Row
from vllm_eigen.benchmarks.serving.servers import Servers
from vllm_eigen.benchmarks.serving.settings import Load, parse_cache_dtypes, parse_loads
from vllm_eigen.benchmarks.serving.table import OUTPUT, cells, markdown, ratio, spread
from vllm_eigen.common.errors import EngineError, UsageError
from vllm_eigen.plugin.vllm_version import vllm_version

LATENCY = {f"{metric}_p{p}": 1.0 for metric in ("ttft", "tpot", "itl") for p in (50, 90, 99)}


def row(side: str, repeat: int, speed: float, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "side": side, "kv_cache_dtype": "auto", "request_rate": None, "max_concurrency": 8,
        "repeat": repeat, "pool_bytes": 2**20, "bytes_per_token": 10, "capacity_tokens": 100,
        "completed": 9, "failed": 0, "errors": [], "duration": 1.0, "output_tokens": 90,
        "generation_tokens": 90, "request_throughput": 9.0, "output_throughput": speed,
        "peak_running": 4, "mean_running": 3.5, "peak_waiting": 1, "peak_tokens": 50,
        "peak_use": 0.5, "preemptions": 0, "prefix_hits": 0, "samples": 5, "missed": 0,
        "latency": LATENCY,
    }  # fmt: skip
    return Row.model_validate(values | changes)


def test_loads_are_read_from_lists() -> None:
    assert parse_loads("0.5,inf", "8, 32") == (
        Load(max_concurrency=8), Load(max_concurrency=32), Load(0.5), Load(),
    )  # fmt: skip
    assert parse_cache_dtypes("auto,fp8,auto") == ("auto", "fp8")
    for rates, users in (("0", None), ("nan", None), (None, "1.5"), (None, None), ("x", None)):
        with pytest.raises(UsageError):
            parse_loads(rates, users)
    with pytest.raises(UsageError, match="int3"):
        parse_cache_dtypes("int3")


def test_ratios_are_paired_before_the_median() -> None:
    load = Load(max_concurrency=8)
    base, eigen = (100.0, 200.0, 400.0), (150.0, 320.0, 560.0)
    rows = [row("base", n, speed) for n, speed in enumerate(base, 1)]
    rows += [row("eigen", n, speed) for n, speed in enumerate(eigen, 1)]
    results = Results(settings={}, rows=rows)
    found = ratio(results, OUTPUT, "auto", load)
    # Repeat by repeat 1.5, 1.6, 1.4; the ratio of the medians would be 1.6.
    assert found is not None
    assert (found.median, found.low, found.high) == (1.5, 1.4, 1.6)
    middle = spread(results, OUTPUT, "base", "auto", load)
    assert middle is not None
    assert middle.text("{:.0f}") == "200 (100 to 400)"
    # A repeat without its partner is left out.
    alone = Results(settings={}, rows=[*rows, row("base", 4, 1.0)])
    assert ratio(alone, OUTPUT, "auto", load) == found


def test_the_table_shows_failures_and_perplexities() -> None:
    workload = {"dataset": "random", "input_len": 1, "output_len": 2, "num_prompts": 9}
    settings = {
        "models": {"base": {"name": "m"}, "eigen": {"name": "e"}}, "workload": workload,
        "max_model_len": None, "max_num_seqs": None,
    }  # fmt: skip
    results = Results(
        settings=settings,
        rows=[row("base", 1, 100.0), row("eigen", 1, 150.0, failed=2, errors=[("Boom", 2)])],
        perplexities=[
            Perplexity(side="base", kv_cache_dtype="auto", perplexity=10.0),
            Perplexity(side="eigen", kv_cache_dtype="auto", perplexity=10.5),
        ],
    )
    lines = {line[0]: line[1:] for line in cells(results, "auto", Load(max_concurrency=8))}
    assert lines["output tokens/s"] == ("100", "150", "1.50")
    assert lines["requests FAILED"] == ("0", "2", "-")
    assert lines["perplexity, as served"] == ("10.000", "10.500", "1.0500")
    assert "- eigen: 2 x Boom" in markdown(results)


def test_counters_are_read_and_a_stranger_is_refused() -> None:
    with serving(Fake()) as fake:
        fake.generated = 41
        endpoint = Endpoint(fake.url)
        assert endpoint.counters()["generation_tokens"] == 41
        assert endpoint.model() == "fake"
        with pytest.raises(EngineError, match="404"):
            endpoint.get("/nothing")
    with pytest.raises(EngineError, match="no server answers"):
        endpoint.kv_cache()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--base", "m"],
        ["--base", "m", "--eigen", "e"],
        ["--base", "m", "--base-url", "http://127.0.0.1:9"],
        ["--base", "m", "--eigen", "e", "--kv-cache-memory-bytes", "lots"],
        ["--base", "m", "--eigen", "e", "--kv-cache-memory-bytes", "1MiB", "--dataset", "custom"],
        ["--base", "m", "--eigen", "e", "--kv-cache-memory-bytes", "1MiB", "--text", "nowhere.txt"],
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    output = tmp_path / "out"
    where = ["--max-concurrency", "2", "--output", str(output)]
    assert cli.main(["bench", "serve", *arguments, *where]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not output.exists()


@pytest.fixture
def fakes() -> Iterator[tuple[Fake, Fake]]:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    slow, fast = Fake(slots=2, logprob=-1.0), Fake(slots=4, bytes_per_token=50, logprob=-1.1)
    with serving(slow) as base, serving(fast) as eigen:
        yield base, eigen


def command(fakes: tuple[Fake, Fake], folder: Path, *more: str) -> list[str]:
    if not (folder / "model").exists():
        small_llama.write(folder / "model")
    text = folder / "text.txt"
    text.write_text("A line of held-out text. " * 500, encoding="utf-8")
    return [
        "bench", "serve", "--base", str(folder / "model"), "--base-url", fakes[0].url,
        "--eigen-url", fakes[1].url, "--max-concurrency", "8", "--num-prompts", "16",
        "--input-len", "8", "--output-len", "40", "--warmups", "2", "--repeats", "2",
        "--text", str(text), "--output", str(folder / "out"), "--output-json",
        str(folder / "all.json"), *more,
    ]  # fmt: skip


def test_a_run_measures_both_and_resumes(fakes: tuple[Fake, Fake], tmp_path: Path) -> None:
    assert cli.main(command(fakes, tmp_path)) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    rows = found["rows"]
    assert [(item["repeat"], item["side"]) for item in rows] == [
        (1, "base"), (1, "eigen"), (2, "eigen"), (2, "base"),
    ]  # fmt: skip
    for item in rows:
        assert (item["completed"], item["failed"]) == (16, 0)
        assert item["output_tokens"] == item["generation_tokens"] == 16 * 40
        # A peak is the highest of the samples taken: it may miss the moment of the fourth.
        most = 2 if item["side"] == "base" else 4
        assert 1 <= item["peak_running"] <= most
        assert item["peak_tokens"] == item["peak_running"] * BLOCK
        assert item["preemptions"] == 0
    [summary] = found["summary"]
    assert 1.0 < summary["peak_running_ratio"]["median"] <= 2.0
    # A busy machine slows either side, so the ratio is held against the rows, not against a speed.
    speed = {(item["repeat"], item["side"]): item["output_throughput"] for item in rows}
    ratios = [speed[repeat, "eigen"] / speed[repeat, "base"] for repeat in (1, 2)]
    assert summary["output_throughput_ratio"]["median"] == pytest.approx(statistics.median(ratios))
    assert {item["side"]: round(item["perplexity"], 3) for item in found["perplexities"]} == {
        "base": 2.718, "eigen": 3.004,
    }  # fmt: skip
    out = tmp_path / "out"
    table = (out / "results.md").read_text()
    assert "## 8 users, cache auto, 2 repeats" in table
    for name in ("TTFT", "TPOT", "ITL"):
        assert all(f"| {name} p{percentile}, ms |" in table for percentile in (50, 90, 99))
    assert summary["tpot_p50_ratio"] is not None
    assert (out / "concurrency.png").stat().st_size > 1000
    with (out / "results.csv").open() as file:
        assert [line["side"] for line in csv.DictReader(file)] == [item["side"] for item in rows]

    # The tables alone, from the one file.
    assert cli.main(["bench", "serve", "--from", str(tmp_path / "all.json")]) == 0
    assert (tmp_path / "all.md").read_text() == table
    assert (tmp_path / "all.csv").read_bytes() == (out / "results.csv").read_bytes()

    # Again: nothing is sent. With one more load: only that is.
    before = [fake.completions for fake in fakes]
    assert cli.main(command(fakes, tmp_path)) == 0
    assert [fake.completions for fake in fakes] == before
    assert cli.main(command(fakes, tmp_path, "--request-rate", "200", "--warmups", "2")) == 0
    assert [fake.completions for fake in fakes] == [count + 2 * (16 + 2) for count in before]
    # Other settings do not mix with these.
    assert cli.main(command(fakes, tmp_path, "--output-len", "9")) == 1


def test_failed_requests_are_counted_and_end_in_status_1(
    fakes: tuple[Fake, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes[1].fail_every = 4
    assert cli.main(command(fakes, tmp_path, "--repeats", "1", "--warmups", "0")) == 1
    found = json.loads((tmp_path / "all.json").read_text())
    counts = {item["side"]: (item["completed"], item["failed"]) for item in found["rows"]}
    assert counts["base"] == (16, 0)
    assert sum(counts["eigen"]) == 16
    assert counts["eigen"][1] in (3, 4, 5)
    assert "requests failed" in capsys.readouterr().out


def test_the_base_has_a_cache_type_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def running(model: str, *options: str, **_: Any) -> Iterator[Any]:
        started.append((model, options[options.index("--kv-cache-dtype") + 1]))
        yield SimpleNamespace(url="http://127.0.0.1:1")

    monkeypatch.setattr("vllm_eigen.benchmarks.serving.servers.running", running)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    fixed = ["--base", "b", "--eigen", "e", "--kv-cache-memory-bytes", "1MiB"]
    fixed += ["--max-concurrency", "8", "--kv-cache-dtype", "auto", "--preset", "quick"]
    identities = []
    for more in ([], ["--base-kv-cache-dtype", "fp8"]):
        args = parser.parse_args([*fixed, *more])
        for name, value in (serve.USUAL | serve.QUICK).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        settings = serve.settings_of(args)
        identities.append(json.dumps(settings.identity()))
        with Servers(settings, tmp_path, lambda _: None) as servers:
            for side in settings.sides:
                servers.get(side, "auto")
    assert started == [("b", "auto"), ("e", "auto"), ("b", "fp8"), ("e", "auto")]
    assert identities[0] != identities[1]
