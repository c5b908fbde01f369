"""Decoding in vLLM's engine at short and long contexts: base against Eigen, end to end.

`python -m benchmarks.engine_decode --output FILE.json` builds random models of a few layers at the
width of a served one (quality is not the question here), compresses them to random bases in the
form that calibration gives them, starts base and Eigen engines side by side
and lets them take turns on the same prompts, which the prefix cache holds. A table and a plot are
written beside the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.pairs import Ratio, by_turns
from calibration.interrupt import terminate_as_interrupt
from calibration.progress import Reporter
from server.process import can_compile
from vllm_eigen import provenance
from vllm_eigen.checkpoint import LayerRanks
from vllm_eigen.errors import EigenError
from vllm_eigen.families import KeyMode
from vllm_eigen.files import atomic_file

if TYPE_CHECKING:
    from calibration.methods.base import LayerBases

CONTEXTS = (128, 2048, 8192)
HEAD_SIZE = 128
VOCABULARY = 4096
MARGIN = 512
"""Positions beyond the longest prompt, for answers and the last block."""


@dataclass(frozen=True)
class Model:
    """One compressed model. `rank_k` and `rank_v` are every layer's; the base has `HEAD_SIZE`."""

    family: str
    kv_heads: int
    key_mode: KeyMode
    rank_k: int
    rank_v: int

    @property
    def kv_ratio(self) -> float:
        """Bytes kept."""
        return (self.rank_k + self.rank_v) / (2 * HEAD_SIZE)


MODELS = (
    Model("opt", 16, "folded", 77, 77),
    Model("llama", 16, "pre-rope", 77, 77),
    Model("llama", 16, "pre-rope", 52, 102),
    Model("llama", 4, "pre-rope", 77, 77),
    Model("llama", 16, "post-rope", 96, 96),
)
"""Ratio 0.6, and 0.75 where keys after rotation ask for more; grouped queries in one row."""


@dataclass(frozen=True)
class Row:
    """A model at a context.

    Attributes:
        base, eigen: output tokens a second, medians.
        speedup, low, high: eigen / base, pair by pair: median and quartiles.
    """

    family: str
    heads: int
    kv_heads: int
    key_mode: str
    rank_k: int
    rank_v: int
    kv_ratio: float
    context: int
    batch: int
    base: float
    eigen: float
    speedup: float
    low: float
    high: float


def write_models(model: Model, args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Base and Eigen checkpoints."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

    from calibration.source import open_source
    from calibration.write import eigen_config, write_checkpoint

    heads = args.hidden // HEAD_SIZE
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max(args.contexts) + MARGIN,
    }
    config: Any = (
        OPTConfig(**shape, ffn_dim=4 * args.hidden, word_embed_proj_dim=args.hidden)
        if model.family == "opt"
        else LlamaConfig(
            **shape, num_key_value_heads=model.kv_heads, intermediate_size=11 * args.hidden // 4
        )
    )
    base, eigen = folder / "base", folder / "eigen"
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    build(config, dtype=getattr(torch, args.dtype)).save_pretrained(base)
    source = open_source(str(base))
    section = eigen_config(
        source,
        [LayerRanks(rank_k=model.rank_k, rank_v=model.rank_v)] * args.layers,
        key_mode=model.key_mode,
        method="random",
        head_group=1,
        provenance={},
    )
    write_checkpoint(source, section, [_random_bases(model)] * args.layers, eigen)
    return base, eigen


def _random_bases(model: Model) -> LayerBases:
    import torch

    from calibration.methods.base import LayerBases, orthogonal_basis
    from vllm_eigen.kernels.planes import latent_order

    noise = torch.randn(2, model.kv_heads, HEAD_SIZE, HEAD_SIZE, dtype=torch.float64)
    key, value = (orthogonal_basis(part @ part.mT) for part in noise)
    if model.key_mode == "pre-rope":
        key = replace(key, order=latent_order(HEAD_SIZE, HEAD_SIZE, heads=1))
    return LayerBases(key, value)


@contextlib.contextmanager
def engine(folder: Path, args: argparse.Namespace) -> Iterator[Any]:
    """A vLLM engine in a process of its own."""
    from vllm import LLM

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=max(args.contexts) + MARGIN,
        kv_cache_memory_bytes=args.pool_mib << 20,
        enable_prefix_caching=True,
        disable_log_stats=False,
        enforce_eager=not can_compile(),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def decode_speed(llm: Any, prompts: list[list[int]], tokens: int) -> float:
    """Output tokens a second of all sequences together, each after its first."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    stats = [result.metrics for result in llm.generate(inputs, params, use_tqdm=False)]
    return float(sum((tokens - 1) / (stat.last_token_ts - stat.first_token_ts) for stat in stats))


def measure(model: Model, args: argparse.Namespace, reporter: Reporter) -> list[Row]:
    """One row a context."""
    import numpy as np

    generator = np.random.default_rng(0)
    rows = []
    with TemporaryDirectory() as work:
        base, eigen = write_models(model, args, Path(work))
        with engine(base, args) as one, engine(eigen, args) as other:
            for context, pairs in zip(args.contexts, args.pairs, strict=True):
                prompts = generator.integers(3, VOCABULARY, (args.batch, context)).tolist()

                def speed(side: int, prompts: list[list[int]] = prompts) -> float:
                    return decode_speed((one, other)[side], prompts, args.tokens)

                # The first pair fills the prefix cache.
                speeds = by_turns(speed, pairs, 1, reporter.step)
                ratio = Ratio.of(*speeds)
                rows.append(
                    Row(
                        **asdict(model),
                        heads=args.hidden // HEAD_SIZE,
                        kv_ratio=round(model.kv_ratio, 4),
                        context=context,
                        batch=args.batch,
                        base=statistics.median(speeds[0]),
                        eigen=statistics.median(speeds[1]),
                        speedup=ratio.median,
                        low=ratio.low,
                        high=ratio.high,
                    )
                )
    return rows


def markdown(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The table."""
    lines = [
        "# Decoding in the engine, base against Eigen",
        "",
        f"Random models of {args.layers} layers, hidden size {args.hidden}, heads of {HEAD_SIZE}, "
        f"{args.dtype}; {args.batch} sequences, {args.threads} threads. Output tokens a second of "
        "both engines, and their ratio pair by pair: median and quartiles. Made by `python -m "
        "benchmarks.engine_decode`; command, versions and machine are in the JSON beside it.",
        "",
        "| model | heads / KV heads | keys | ranks K, V | KV ratio | context | base | Eigen "
        "| Eigen / base |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.heads} / {row.kv_heads} | {row.key_mode} | {row.rank_k}, "
        f"{row.rank_v} | {row.kv_ratio:.2f} | {row.context:,} | {row.base:,.1f} | {row.eigen:,.1f} "
        f"| {row.speedup:.2f} ({row.low:.2f} to {row.high:.2f}) |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed-up against context, one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = f"{row.family} {row.heads}/{row.kv_heads}, {row.key_mode} {row.rank_k}+{row.rank_v}"
        lines.setdefault(name, []).append(row)
    for name, mine in lines.items():
        axis.errorbar(
            [row.context for row in mine],
            [row.speedup for row in mine],
            yerr=[
                [row.speedup - row.low for row in mine],
                [row.high - row.speedup for row in mine],
            ],
            fmt="o-",
            capsize=3,
            label=name,
        )
    axis.axhline(1, color="gray", linewidth=1)
    contexts = sorted({row.context for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.set(xlabel="context, tokens", ylabel="output tokens a second, Eigen / base")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_decode", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batch", type=int, default=4, help="sequences (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="output tokens (%(default)s)")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[7], help="one number, or one for each context"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for CPUs without bfloat16 arithmetic (%(default)s)",
    )
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 128 (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--pool-mib", type=int, default=2048, help="KV pool of either engine")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    if len(args.pairs) == 1:
        args.pairs = args.pairs * len(args.contexts)
    if len(args.pairs) != len(args.contexts):
        parser.error("--pairs takes one number, or as many as --contexts")
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(args.threads),
    )
    rows: list[Row] = []
    with terminate_as_interrupt(), Reporter() as reporter:
        try:
            for model in MODELS:
                title = f"{model.family} {model.kv_heads} KV heads, {model.key_mode}"
                reporter.stage(title, 2 * sum(pairs + 1 for pairs in args.pairs))
                rows += measure(model, args, reporter)
        except EigenError as error:
            reporter.note(f"benchmarks.engine_decode: {error}")
            return error.exit_code
    record: dict[str, Any] = {
        **provenance.collect(sys.argv if argv is None else argv),
        "rows": [asdict(row) for row in rows],
    }
    with atomic_file(args.output) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with atomic_file(args.output.with_suffix(".md")) as path:
        path.write_text(markdown(rows, args), encoding="utf-8")
    plot(args.output.with_suffix(".png"), rows)
    print(markdown(rows, args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
