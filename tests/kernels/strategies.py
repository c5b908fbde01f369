# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies over everything the kernels promise to handle."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.kernels.cases import Case
from vllm_eigen.checkpoint.codes import Code

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def codes(draw: st.DrawFn) -> Code:
    """Any code of at most 256 directions."""
    counts = (draw(st.integers(0, most)) for most in (10, 10, 5))
    eight, four, two = (count * unit for count, unit in zip(counts, (4, 8, 16), strict=True))
    return Code(
        eight=eight if four or two else max(eight, 4),
        four=four,
        two=two,
        token_scale=draw(st.booleans()) and bool(eight or four or not two),
        scale_floor=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = QUERY_DTYPES,
    reconstruct: bool | None = None,
    coded: bool = False,
) -> Case:
    """A batch of one to four unequal sequences, decoding or with chunks of prompt."""
    reconstructed = draw(st.booleans()) if reconstruct is None else reconstruct
    head_size = draw(st.sampled_from([1, 2, 7, 16, 64, 80, 128]))
    rotary_dim = 2 * draw(st.integers(0, head_size // 2))
    of_key, of_value = (draw(codes()), draw(codes())) if coded else (None, None)
    fp8 = None if coded else draw(st.sampled_from((None, None, *FP8)))
    scales = st.sampled_from([0.05, 1.0, 2.0]) if fp8 else st.just(1.0)
    # A latent beside the middle of two fp8 values or codes may be rounded to either.
    sizes = st.just(0) if fp8 or coded else st.sampled_from([0, 0, 5, 33, 64, 128, 200])
    ranks = st.one_of(st.integers(1, 40), st.sampled_from([64, 77, 128, 129, 250, 256]))
    sequence = st.tuples(st.integers(0, 700), st.one_of(st.just(1), st.integers(1, 60)))
    return Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 2)) if reconstructed else 1,
        queries_per_head=draw(st.integers(1, 5)),
        rank_k=of_key.rank if of_key else draw(ranks),
        rank_v=of_value.rank if of_value else draw(ranks),
        block_size=16 * draw(st.sampled_from([1, 2, 3, 8, 20])),
        sequences=tuple(draw(st.lists(sequence, min_size=1, max_size=4))),
        dtype=draw(st.sampled_from(dtypes)),
        cache_dtype=fp8,
        head_size=head_size,
        reconstruct=reconstructed,
        rotary_dim=rotary_dim,
        rope_base=draw(st.sampled_from([None, 100.0, 10_000.0, 500_000.0])),
        is_neox_style=draw(st.booleans()),
        triangular=draw(st.booleans()),
        offset=reconstructed and draw(st.booleans()),
        alibi=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 300))),
        soft_cap=draw(st.sampled_from([None, None, 3.0])),
        k_scale=draw(scales),
        v_scale=draw(scales),
        encoded_size=draw(sizes),
        projects_values=draw(st.booleans()),
        codes=(of_key, of_value) if of_key and of_value else None,
        seed=draw(st.integers(0, 2**20)),
    )
