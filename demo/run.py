"""`make demo`: calibrate the shipped model, serve base and Eigen on the same KV bytes, compare.

Everything shown is measured on the two running servers, through the `openai` client; the text is
collected from docstrings on this machine. Intermediate files go to `.demo/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.decoding import tokens_per_second
from benchmarks.perplexity import served_perplexity
from server import process
from vllm_eigen.errors import EigenError, EngineError

ROOT = Path(__file__).resolve().parent
WORK = ROOT.parent / ".demo"
PROMPTS = (
    "Return a new array of",
    "This module provides a",
    "Raise an exception if the",
)
STARTUP_SECONDS = 300.0
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Measured:
    """One column of the final table."""

    cache: dict[str, Any]
    full_length: int
    perplexity: float
    tokens_per_second: float
    completions: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.split("\n")[0])
    parser.add_argument("--kv-ratio", type=float, default=0.6, help="KV bytes kept (default 0.6)")
    parser.add_argument("--pool-mib", type=int, default=32, help="KV pool of each server, MiB")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    # Nothing below needs the network; without these every load asks the hub first.
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    console = Console()
    began = time.monotonic()
    try:
        console.rule("1/3  calibrate")
        eigen = calibrate(args.kv_ratio, WORK / "eigen")
        columns = {
            "base": measure(console, "base", ROOT / "model", args.pool_mib),
            "eigen": measure(console, "eigen", eigen, args.pool_mib),
        }
    except EigenError as error:
        console.print(f"[red]demo: {error}[/]")
        return error.exit_code
    show(console, columns["base"], columns["eigen"])
    console.print(f"Took {time.monotonic() - began:.0f} s. Checkpoint: {_relative(eigen)}")
    return 0


def calibrate(kv_ratio: float, output: Path) -> Path:
    """Collect text, then compress the shipped model with the real command; returns the folder.

    The texts, `calibration.txt` and `heldout.txt`, are written beside it.
    """
    from demo import corpus
    from vllm_eigen import cli

    for split in ("calibration", "heldout"):
        corpus.write(split, output.parent / f"{split}.txt", max_bytes=400_000)
    status = cli.main(
        [
            "calibrate",
            str(ROOT / "model"),
            "--output",
            str(output),
            "--kv-ratio",
            str(kv_ratio),
            "--text",
            str(output.parent / "calibration.txt"),
            # A sixth of the text in short windows: seconds instead of a minute, and as good here.
            *("--samples", "40", "--seq-len", "256", "--overwrite"),
        ]
    )
    if status:
        raise EngineError("calibration failed, see above")
    return output


def measure(console: Console, name: str, model: Path, pool_mib: int) -> Measured:
    """Serve a model, and ask it for everything the table shows."""
    from openai import OpenAI

    console.rule(f"{'2/3' if name == 'base' else '3/3'}  serve {name}")
    options = ["--kv-cache-memory-bytes", str(pool_mib << 20), "--served-model-name", name]
    if not process.can_compile():
        console.print("torch's compiler cannot work below a path with spaces: running eagerly")
        options.append("--enforce-eager")
    log = WORK / f"{name}.log"
    with process.start(model, *options, log=log) as server, console.status("") as status:
        began = time.monotonic()
        server.wait_ready(
            STARTUP_SECONDS,
            lambda: status.update(f"starting vLLM ... {time.monotonic() - began:.0f} s"),
        )
        console.print(f"vLLM is ready after {time.monotonic() - began:.0f} s")
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=REQUEST_SECONDS)
        full_length = int(server.get("/v1/models")["data"][0]["max_model_len"])
        completions = tuple(
            str(_complete(client, name, prompt).choices[0].text) for prompt in PROMPTS
        )
        perplexity = served_perplexity(
            client,
            name,
            _heldout_tokens(),
            full_length,
            step=lambda done, total: status.update(f"perplexity, window {done} of {total}"),
        )
        speed = decode_speed(client, name, status.update)
        return Measured(server.get("/v1/kv_cache"), full_length, perplexity, speed, completions)


def decode_speed(
    client: Any, name: str, say: Callable[[str], None], users: int = 8, repeats: int = 7
) -> float:
    """Tokens a second, all users together, 128 tokens each; median of repeats after a warm-up."""
    say(f"decoding with {users} users")
    speeds = [
        tokens_per_second(client, name, PROMPTS, users=users, tokens=128)
        for _ in range(1 + repeats)
    ]
    return statistics.median(speeds[1:])


def show(console: Console, base: Measured, eigen: Measured) -> None:
    """Print the table and the completions side by side."""
    table = Table(title="Same KV-cache pool, same prompts")
    for heading in ("", "base", "eigen", "eigen / base"):
        table.add_column(heading, justify="left" if not heading else "right")
    pairs = (
        ("KV pool, MiB", _pool, "{:.1f}"),
        ("KV bytes a token", lambda m: m.cache["bytes_per_token"], "{:,.0f}"),
        ("tokens the pool holds", lambda m: m.cache["tokens"]["capacity"], "{:,.0f}"),
        (f"sequences of {base.full_length:,} tokens", _sequences, "{:.2f}"),
        ("perplexity, held-out text", lambda m: m.perplexity, "{:.3f}"),
        ("decode tokens/s, 8 users", lambda m: m.tokens_per_second, "{:,.0f}"),
    )
    for label, figure, form in pairs:
        one, other = float(figure(base)), float(figure(eigen))
        table.add_row(label, form.format(one), form.format(other), f"{other / one:.3f}")
    console.print(table)
    texts = Table(title="Completions, greedy", show_lines=True)
    for heading in ("prompt", "base", "eigen"):
        texts.add_column(heading, ratio=1)
    for prompt, one_text, other_text in zip(
        PROMPTS, base.completions, eigen.completions, strict=True
    ):
        texts.add_row(prompt, one_text.strip(), other_text.strip())
    console.print(texts)


def _heldout_tokens() -> list[int]:
    from transformers import AutoTokenizer

    text = (WORK / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    return list(tokenizer(text, verbose=False)["input_ids"])


def _pool(measured: Measured) -> float:
    return float(measured.cache["pool_bytes"]) / 2**20


def _sequences(measured: Measured) -> float:
    return float(measured.cache["tokens"]["capacity"]) / measured.full_length


def _complete(client: Any, name: str, prompt: str) -> Any:
    return client.completions.create(model=name, prompt=prompt, max_tokens=32, temperature=0)


def _relative(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
