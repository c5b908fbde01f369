# SPDX-License-Identifier: Apache-2.0
"""`vllm-eigen bench gpu-model`: what the Triton kernels should take on an H100, without one.

The kernels are compiled for compute capability 9.0; `bandwidth.py` has the model. The rows are
points of `bench gpu`, whose measurement stands against them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_eigen.benchmarks.kernels.gpu.bandwidth import Geometry
    from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint

HELP = "predict the Triton kernels' time on an H100 from what they compile to"
CAPABILITY = 90
COMPILED_CONTEXT = 128
"""Tokens of the tensors that kernels are compiled with, which nothing reads."""
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    from vllm_eigen.benchmarks.lib.arguments import add_output

    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Compile, predict, print, write.

    Raises:
        InputError: the earlier result is none of this command.
    """
    from vllm_eigen.benchmarks.kernels.gpu.bandwidth import H100
    from vllm_eigen.benchmarks.kernels.gpu.grid import timed
    from vllm_eigen.benchmarks.lib.arguments import require
    from vllm_eigen.benchmarks.lib.results import (
        collect_provenance,
        read_json,
        write_json,
        write_text,
    )
    from vllm_eigen.common.errors import InputError

    output = args.earlier
    if output is not None:
        try:
            text = _markdown(read_json(output))
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no result of gpu-model: {error!r}") from error
    else:
        require(args, "output")
        output = args.output
        rows = [predicted(point) for point in timed(quick=False) if point.kv_heads < point.heads]
        document = {"provenance": collect_provenance(), "gpu": asdict(H100), "rows": rows}
        write_json(output, document)
        text = _markdown(document)
    write_text(output.with_suffix(".md"), text)
    print(text)
    return 0


def predicted(point: GpuPoint) -> Row:
    """One point: what was compiled, what it does, and how long that should take."""
    from vllm_eigen.benchmarks.kernels.gpu import bandwidth
    from vllm_eigen.benchmarks.kernels.gpu.measure import named

    kernel, launched = compiled(point)
    work = (
        bandwidth.decode_work(point, launched)
        if point.phase == "decode"
        else bandwidth.prefill_work(point, launched)
    )
    found = bandwidth.predict(kernel, work)
    full = bandwidth.full_milliseconds(point)
    return named(point) | {
        "kernel": asdict(kernel),
        "work": asdict(work),
        "prediction": asdict(found),
        "gbs": work.num_bytes / found.milliseconds / 1e6,
        "full_milliseconds": full,
        "speedup": full / found.milliseconds,
    }


def compiled(point: GpuPoint) -> tuple[Any, Geometry]:
    """The point's attention kernel, compiled, and how it is launched."""
    import torch

    from vllm_eigen.benchmarks.kernels.gpu.bandwidth import Geometry
    from vllm_eigen.benchmarks.kernels.gpu.compiled import compiling
    from vllm_eigen.benchmarks.kernels.gpu.points import BLOCK_SIZE, make
    from vllm_eigen.kernels.gpu.kernels import GpuKernels

    is_decode = point.phase == "decode"
    small = make(replace(point, context=COMPILED_CONTEXT, batch=2), "cpu")
    with compiling(CAPABILITY) as found:
        kernels = GpuKernels()
        layer = kernels.prepare(small.layer)
        width = -(-point.context // BLOCK_SIZE)
        step = replace(
            small.step,
            block_table=torch.zeros(2, width, dtype=torch.int32),
            max_seq_len=point.context,
            max_query_len=1 if is_decode else COMPILED_CONTEXT,
        )
        plan = kernels.plan(step, small.layer.plan_geometry(BLOCK_SIZE))
        layer.attend(small.query, small.cache, small.output, plan)
    tile = layer.decode if is_decode else layer.prefill
    shape = layer.shape
    heads = layer.decode_heads if is_decode else shape.heads_per_reconstructed
    [kernel] = [one for one in found if one.name == point.phase]
    return kernel, Geometry(
        numbers_k=shape.numbers_k,
        numbers_v=shape.numbers_v,
        columns=shape.columns,
        heads_per_tile=heads,
        bases_per_tile=heads // shape.heads_per_reconstructed,
        block_m=tile.block_m,
        block_n=tile.block_n,
        stages=max(1, (tile.num_stages - 1) // 2),
        split_size=plan.split_size,
        partial_width=layer.sizes.padding.value if not layer.spec.is_coded else layer.spec.rank_v,
    )


def _markdown(document: Row) -> str:
    """The table of a result."""
    from vllm_eigen.benchmarks.kernels.gpu.bandwidth import H100
    from vllm_eigen.benchmarks.kernels.gpu.report import what
    from vllm_eigen.benchmarks.lib.markdown import table

    headings = ["cache", "step", "registers", "spilled", "shared KiB", "loop", "programs/SM"]
    headings += ["bound by"]
    headings += ["ms", "GB/s", "full bf16, ms", "x"]
    cells = [
        [
            what(row),
            f"{row['phase']} {row['batch']} x {row['context']}",
            row["kernel"]["registers"],
            row["kernel"]["stack_bytes"],
            f"{row['kernel']['shared_bytes'] / 1024:.0f}",
            row["kernel"]["loop_instructions"],
            row["prediction"]["resident"],
            row["prediction"]["bound"],
            f"{row['prediction']['milliseconds']:.3f}",
            f"{row['gbs']:.0f}",
            f"{row['full_milliseconds']:.3f}",
            f"{row['speedup']:.2f}",
        ]
        for row in document["rows"]
    ]
    version = document["provenance"]["packages"]["triton"]
    lines = [
        f"# The Triton kernels on one {H100.name}, predicted",
        "",
        "32 query and 8 KV heads of 128, queries of bfloat16. Registers, spilled bytes of a thread "
        f"and shared memory are those of the code that Triton {version} compiles for compute "
        "capability 9.0; times are "
        "those of a model of memory, matrix units, issued instructions and occupancy, and no GPU "
        "has run them. Full heads are read at 92 % of the memory's rate, or multiplied at 75 % of "
        "the matrix units'. "
        "Made by `vllm-eigen bench gpu-model`; `make gpu-check` measures the same points.",
        "",
        *table(headings, cells, right_from=2),
    ]
    return "\n".join(lines) + "\n"
