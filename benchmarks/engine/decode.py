# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench engine-decode`: decoding in vLLM's engine at short and long contexts.

Random models are written as base and Eigen checkpoints (`decode_models`), two engines are started
side by side, and they take turns on the same prompts, which the prefix cache holds. The JSON, a
table and a plot (`decode_report`) are written together.
"""

from __future__ import annotations

import argparse
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vllm_eigen.common.errors import UsageError

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.engine.decode_models import Model, Settings
    from vllm_eigen.benchmarks.engine.decode_report import Row
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.plugin.offline_engine import OfflineEngine

HELP = "decode speed in vLLM's engine by context length, base against Eigen"
CONTEXTS = (128, 2048, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from vllm_eigen.benchmarks.lib.arguments import add_output

    parser.add_argument(
        "--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="output tokens (%(default)s)")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[7], help="one number, or one for each context"
    )
    parser.add_argument("--layers", type=int, default=4, help="of the model (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for CPUs without bfloat16 arithmetic (%(default)s)",
    )
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 2048 (2048)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each engine (all cores)")
    parser.add_argument("--pool-mib", type=int, default=2048, help="KV pool of either engine")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write.

    Raises:
        UsageError: options are missing or contradict each other.
    """
    from vllm_eigen.benchmarks.engine.decode_models import MODELS
    from vllm_eigen.benchmarks.engine.decode_report import from_json, to_json, write_tables
    from vllm_eigen.benchmarks.lib.arguments import require
    from vllm_eigen.benchmarks.lib.results import collect_provenance, read_json, write_json
    from vllm_eigen.benchmarks.lib.servers import set_environment
    from vllm_eigen.common.progress import Reporter
    from vllm_eigen.common.signals import terminate_as_interrupt

    if args.earlier is not None:
        print(write_tables(args.earlier, *from_json(read_json(args.earlier))))
        return 0
    require(args, "output")
    settings = settings_of(args)
    set_environment(
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(settings.threads),
    )
    rows: list[Row] = []
    with terminate_as_interrupt(), Reporter() as reporter:
        for model in MODELS:
            title = f"{model.family} {model.kv_heads} KV heads, {model.key_mode}"
            reporter.stage(title, 2 * sum(pairs + 1 for pairs in settings.pairs))
            rows += measure(model, settings, reporter)
    write_json(args.output, {**collect_provenance(), **to_json(settings, rows)})
    print(write_tables(args.output, settings, rows))
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """Checked settings of the command line.

    Raises:
        UsageError: numbers do not fit together.
    """
    from vllm_eigen.benchmarks.engine.decode_models import HEAD_SIZE, MODELS, Settings

    pairs = args.pairs * len(args.contexts) if len(args.pairs) == 1 else args.pairs
    if len(pairs) != len(args.contexts) or min(pairs) < 2:
        raise UsageError("--pairs takes one number above one, or as many as --contexts")
    width = HEAD_SIZE * max(model.kv_heads for model in MODELS)
    if args.hidden < 1 or args.hidden % width:
        raise UsageError(f"--hidden {args.hidden} is no multiple of {width}, the KV heads' width")
    return Settings(
        layers=args.layers,
        hidden=args.hidden,
        dtype=args.dtype,
        contexts=tuple(args.contexts),
        pairs=tuple(pairs),
        batch=args.batch,
        tokens=args.tokens,
        threads=args.threads or os.cpu_count() or 1,
        pool_mib=args.pool_mib,
    )


def measure(model: Model, settings: Settings, reporter: Reporter) -> list[Row]:
    """One row a context."""
    import numpy as np

    from vllm_eigen.benchmarks.engine.decode_models import VOCABULARY, write_models
    from vllm_eigen.benchmarks.engine.decode_report import Row
    from vllm_eigen.benchmarks.lib.pairs import alternate, ratios
    from vllm_eigen.benchmarks.lib.spread import Spread

    generator = np.random.default_rng(0)
    rows = []
    with TemporaryDirectory() as work:
        base, eigen = write_models(model, settings, Path(work))
        with engine(base, settings) as one, engine(eigen, settings) as other:
            for context, pairs in zip(settings.contexts, settings.pairs, strict=True):
                prompts = generator.integers(3, VOCABULARY, (settings.batch, context)).tolist()

                def speed(side: int, prompts: list[list[int]] = prompts) -> float:
                    return decode_speed((one, other)[side], prompts, settings.tokens)

                # The first pair fills the prefix cache.
                speeds = alternate(speed, pairs, 1, reporter.step)
                found = Spread.quartiles(ratios(*speeds))
                rows.append(
                    Row(
                        **asdict(model),
                        heads=settings.heads,
                        kv_ratio=round(model.kv_ratio, 4),
                        context=context,
                        batch=settings.batch,
                        base=statistics.median(speeds[0]),
                        eigen=statistics.median(speeds[1]),
                        speedup=found.median,
                        low=found.low,
                        high=found.high,
                    )
                )
    return rows


def engine(folder: Path, settings: Settings) -> OfflineEngine:
    """A vLLM engine in a process of its own."""
    from vllm_eigen.plugin.offline_engine import OfflineEngine
    from vllm_eigen.server.launch.process import can_compile

    return OfflineEngine(
        folder,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        kv_cache_memory_bytes=settings.pool_mib << 20,
        enable_prefix_caching=True,
        disable_log_stats=False,
        enforce_eager=not can_compile(),
    )


def decode_speed(llm: OfflineEngine, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens a second of all sequences together, each after its first."""
    outputs = llm.generate(
        prompts, temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    stats = [output.metrics for output in outputs]
    return float(sum((tokens - 1) / (stat.last_token_ts - stat.first_token_ts) for stat in stats))
