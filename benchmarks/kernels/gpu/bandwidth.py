# SPDX-License-Identifier: Apache-2.0
"""What a kernel should take on a GPU: bytes, products and occupancy, from the compiled code.

A call lasts as long as the slowest of three: memory, at the rate that the bytes in flight sustain
(Little's law) and at most what copies reach; the matrix units; and the issue of instructions, one a
cycle and scheduler, which unpacking codes takes many of. Waves that do not fill the GPU count
whole. Nothing was fitted to a measurement: the model is there to be contradicted by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_eigen.benchmarks.kernels.gpu.compiled import CompiledKernel
from vllm_eigen.benchmarks.kernels.gpu.points import GpuPoint, cached_bytes


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU; rates a second, sizes of one multiprocessor.

    reached: share of the memory's rate that copies reach. latency: seconds of a load from memory.
    wgmma, mma: dense bfloat16 operations. issued: instructions of warps. launch: seconds of a
    kernel in a replayed graph.
    """

    name: str
    multiprocessors: int
    memory: float
    reached: float
    latency: float
    wgmma: float
    mma: float
    issued: float
    launch: float
    registers: int = 65_536
    shared_bytes: int = 233_472
    threads: int = 2048
    programs: int = 32


H100 = Gpu(
    name="H100 SXM",
    multiprocessors=132,
    memory=3.35e12,
    reached=0.92,
    latency=650e-9,
    wgmma=989e12,
    mma=620e12,
    issued=132 * 4 * 1.755e9,
    launch=2.5e-6,
)
_SHARED_PER_PROGRAM = 1024
"""Bytes that the driver keeps of each program's shared memory."""


@dataclass(frozen=True)
class Work:
    """Of one kernel: programs, bytes read and written, operations of the matrix units, bytes that a
    program has in flight, and passes through the loop over keys of all programs together."""

    programs: int
    num_bytes: float
    operations: float
    in_flight: float
    passes: float


@dataclass(frozen=True)
class Prediction:
    """Of one kernel.

    Attributes:
        resident: programs on a multiprocessor at once.
        rounds: of programs over all multiprocessors; the last takes as long as a full one.
        milliseconds: of a call.
        bound: what takes the most time.
    """

    resident: int
    rounds: float
    milliseconds: float
    bound: str


def predict(kernel: CompiledKernel, work: Work, gpu: Gpu = H100) -> Prediction:
    """The time of one call of a compiled kernel."""
    resident = residents(kernel, gpu)
    slots = resident * gpu.multiprocessors
    rounds = work.programs / slots
    # The last round takes as long as a full one.
    idle = math.ceil(rounds) / rounds
    active = min(work.programs, slots)
    rates = {
        "memory": gpu.memory * gpu.reached,
        "latency": active * work.in_flight / gpu.latency,
    }
    slower = min(rates, key=lambda name: rates[name])
    peak = gpu.wgmma if kernel.wgmma else gpu.mma
    share = min(1.0, active / gpu.multiprocessors)
    tail = idle if rounds > 1 else 1.0
    instructions = work.passes * kernel.loop_instructions * kernel.threads / 32
    seconds = {
        slower: work.num_bytes / rates[slower],
        "matrix units": work.operations / (peak * share) * tail,
        "issue": instructions / (gpu.issued * share) * tail,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    if seconds[bound] < gpu.launch:
        bound = "launch"
    return Prediction(resident, rounds, 1e3 * (gpu.launch + max(seconds.values())), bound)


def residents(kernel: CompiledKernel, gpu: Gpu = H100) -> int:
    """Programs that a multiprocessor holds at once."""
    # Registers are given to warps in portions of 256.
    registers = 256 * -(-32 * kernel.registers // 256) * kernel.threads // 32
    return min(
        gpu.programs,
        gpu.threads // kernel.threads,
        gpu.registers // registers,
        gpu.shared_bytes // (kernel.shared_bytes + _SHARED_PER_PROGRAM),
    )


@dataclass(frozen=True)
class Geometry:
    """How a prepared layer is launched; see `kernels.gpu.tiles`.

    numbers_k, numbers_v: padded operands of a token. columns: padded width of a reconstructed key.
    heads_per_tile: query heads of a program. stages: tiles in flight.
    """

    numbers_k: int
    numbers_v: int
    columns: int
    heads_per_tile: int
    bases_per_tile: int
    block_m: int
    block_n: int
    stages: int
    split_size: int
    partial_width: int


def decode_work(point: GpuPoint, launched: Geometry) -> Work:
    """One query a sequence, in splits."""
    splits = -(-point.context // launched.split_size)
    tiles = point.heads // launched.heads_per_tile
    read = cached_bytes(point)
    token_bytes = read / (point.batch * point.context * point.kv_heads)
    # Each key head's programs read the latents once; tiles that share a latent find it in cache.
    rows = point.batch * point.heads
    partials = 4 * rows * splits * (launched.partial_width + 2) if splits > 1 else 0
    return Work(
        programs=point.batch * tiles * splits,
        num_bytes=read + partials + 2 * rows * sum(point.ranks),
        operations=point.batch * tiles * point.context * _per_key(launched),
        in_flight=launched.stages * launched.block_n * token_bytes,
        passes=point.batch * tiles * point.context / launched.block_n,
    )


def prefill_work(point: GpuPoint, launched: Geometry) -> Work:
    """A prompt attends to itself; half of the keys are masked."""
    queries = launched.block_m // launched.heads_per_tile
    blocks = -(-point.context // queries)
    tiles = point.heads // launched.heads_per_tile
    programs = point.batch * tiles * blocks
    keys = sum(min(point.context, (i + 1) * queries) for i in range(blocks))
    token_bytes = cached_bytes(point) / (point.batch * point.context * point.kv_heads)
    rows = point.batch * point.context * point.heads
    return Work(
        programs=programs,
        # Latents are read from the L2 cache again and again, from memory once.
        num_bytes=cached_bytes(point) + 2 * rows * sum(point.ranks),
        operations=point.batch * tiles * keys * _per_key(launched),
        in_flight=launched.stages * launched.block_n * token_bytes,
        passes=point.batch * tiles * keys / launched.block_n,
    )


def _per_key(launched: Geometry) -> float:
    """Operations of a program on one key."""
    scored = launched.columns or launched.numbers_k
    made = launched.bases_per_tile * launched.numbers_k * launched.columns
    rows = launched.block_m * (launched.bases_per_tile * scored if launched.columns else scored)
    return 2.0 * (rows + launched.block_m * launched.numbers_v + made)


def full_milliseconds(point: GpuPoint, gpu: Gpu = H100) -> float:
    """What reading (decode) or multiplying (prompt) full heads of 16 bits takes at best."""
    elements = point.batch * point.context * point.kv_heads * 2 * point.head_size
    read = 2 * elements / (gpu.memory * gpu.reached)
    pairs = point.batch * point.queries * (point.context - (point.queries - 1) / 2)
    # FlashAttention 3 reaches about three quarters of the matrix units in prompts.
    multiplied = 4 * pairs * point.heads * point.head_size / (0.75 * gpu.wgmma)
    return 1e3 * (gpu.launch + max(read, multiplied))
