"""Hypothesis strategies over everything the kernels promise to handle."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .cases import Case

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = QUERY_DTYPES,
    rebuild: bool | None = None,
) -> Case:
    """A batch of one to four unequal sequences, decoding or with chunks of prompt."""
    rebuilt = draw(st.booleans()) if rebuild is None else rebuild
    head_size = draw(st.sampled_from([1, 2, 7, 16, 64, 80, 128]))
    rotary_dim = 2 * draw(st.integers(0, head_size // 2))
    fp8 = draw(st.sampled_from((None, None, *FP8)))
    scales = st.sampled_from([0.05, 1.0, 2.0]) if fp8 else st.just(1.0)
    # A latent beside the middle of two fp8 values may be rounded to either.
    sizes = st.just(0) if fp8 else st.sampled_from([0, 0, 5, 33, 64, 128, 200])
    ranks = st.one_of(st.integers(1, 40), st.sampled_from([64, 77, 128, 129, 250, 256]))
    sequence = st.tuples(st.integers(0, 700), st.one_of(st.just(1), st.integers(1, 60)))
    return Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 2)) if rebuilt else 1,
        queries_per_head=draw(st.integers(1, 5)),
        rank_k=draw(ranks),
        rank_v=draw(ranks),
        block_size=16 * draw(st.sampled_from([1, 2, 3, 8, 20])),
        sequences=tuple(draw(st.lists(sequence, min_size=1, max_size=4))),
        dtype=draw(st.sampled_from(dtypes)),
        cache_dtype=fp8,
        head_size=head_size,
        rebuild=rebuilt,
        rotary_dim=rotary_dim,
        rope_base=draw(st.sampled_from([None, 100.0, 10_000.0, 500_000.0])),
        is_neox_style=draw(st.booleans()),
        staircase=draw(st.booleans()),
        offset=rebuilt and draw(st.booleans()),
        alibi=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 300))),
        soft_cap=draw(st.sampled_from([None, None, 3.0])),
        k_scale=draw(scales),
        v_scale=draw(scales),
        encoded_size=draw(sizes),
        encodes_values=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
