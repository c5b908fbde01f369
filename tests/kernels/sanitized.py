# SPDX-License-Identifier: Apache-2.0
"""Random shapes through kernels built with sanitizers; run by test_sanitizers.py under libasan.

Arguments: instruction-set level, number of random cases. Exits non-zero at the first bad access.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from tests.kernels.cases import Case, expected, make, run, tolerance
from vllm_eigen.checkpoint.codes import Code
from vllm_eigen.kernels.cpu.kernels import CpuKernels

FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (None, None, torch.float8_e4m3fn, torch.float8_e5m2)


def random_code(rng: random.Random) -> Code:
    """Any code of at most 200 directions."""
    return Code(
        eight=4 * rng.randint(0, 8),
        four=8 * rng.randint(1, 9),
        two=16 * rng.randint(0, 6),
        token_scale=rng.random() < 0.5,
        scale_floor=rng.choice([0.0, 1.0]),
    )


def random_case(seed: int) -> Case:
    """One small batch; ranks, block sizes and lengths off every round number."""
    rng = random.Random(seed)
    reconstruct = rng.random() < 0.5
    head_size = rng.choice([2, 7, 16, 33, 64])
    codes = (random_code(rng), random_code(rng)) if rng.random() < 0.4 else None
    return Case(
        num_kv_heads=rng.randint(1, 2),
        group=rng.randint(1, 2) if reconstruct else 1,
        queries_per_head=rng.choice([1, 2, 3, 7]),
        rank_k=codes[0].rank if codes else rng.randint(1, rng.choice([45, 256])),
        rank_v=codes[1].rank if codes else rng.randint(1, rng.choice([45, 256])),
        block_size=16 * rng.choice([1, 3, 8]),
        sequences=tuple(
            (rng.randint(0, 400), rng.choice([1, 1, rng.randint(1, 40)]))
            for _ in range(rng.randint(1, 3))
        ),
        dtype=rng.choice(TYPES),
        cache_dtype=None if codes else rng.choice(FP8),
        codes=codes,
        head_size=head_size,
        reconstruct=reconstruct,
        rotary_dim=2 * rng.randint(0, head_size // 2),
        rope_base=rng.choice([None, 1e4]),
        is_neox_style=rng.random() < 0.5,
        triangular=rng.random() < 0.5,
        offset=rng.random() < 0.5,
        alibi=rng.random() < 0.3,
        window=rng.choice([None, rng.randint(1, 200)]),
        soft_cap=rng.choice([None, 3.0]),
        seed=seed,
    )


def main(isa: str, count: int) -> None:
    """Compare `count` cases with float64, so that the accesses are the real ones."""
    kernels = CpuKernels(isa, FLAGS)
    for seed in range(count):
        case = random_case(seed)
        problem = make(case)
        found = run(kernels, problem).double().numpy()
        in_bytes = case.codes is not None and isa != "portable"
        rounds_keys = in_bytes or isa in ("amx", "avx512bf16")
        limit = tolerance(case, rounds_keys=rounds_keys, in_integers=True)
        np.testing.assert_allclose(found, expected(problem), atol=limit, err_msg=str(case))
    print("clean")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
