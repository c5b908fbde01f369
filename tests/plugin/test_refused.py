# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused before anything is loaded, in a line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_eigen.checkpoint.config import EigenConfig, LayerRanks
from vllm_eigen.checkpoint.families import family_of
from vllm_eigen.checkpoint.modes import Projections
from vllm_eigen.common.errors import EigenError, UnsupportedModelError, UsageError

MPT = {"architectures": ["MptForCausalLM"], "d_model": 64, "n_heads": 4, "n_layers": 2}


def _mpt(**changes: Any) -> Callable[[], Any]:
    config = {**MPT, **changes}
    return lambda: family_of(config).geometry(config)


def _ranks(heads: int, kv_heads: int, tp_size: int, **changes: Any) -> Callable[[], Any]:
    from vllm_eigen.plugin.models import check_supported

    layers = (LayerRanks(rank_k=1, rank_v=1),)
    shape = {"head_group": 1, "projections": Projections.FOLDED, "layers": layers, **changes}
    eigen = EigenConfig.model_construct(num_heads=heads, num_kv_heads=kv_heads, **shape)
    parallel = SimpleNamespace(tensor_parallel_size=tp_size)
    cache = SimpleNamespace(cache_dtype="auto")
    config: Any = SimpleNamespace(lora_config=None, parallel_config=parallel, cache_config=cache)
    return lambda: check_supported(eigen, config)


def _refused(name: str, call: Callable[[], Any], error: type[EigenError], message: str) -> Any:
    return pytest.param(call, error, message, id=name, marks=pytest.mark.refused(name))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        _refused(
            "an architecture without a description",
            lambda: family_of({"architectures": ["GPT2LMHeadModel"]}),
            UnsupportedModelError,
            "GPT2LMHeadModel is not supported; supported: Llama",
        ),
        _refused(
            "MPT with norms of queries and keys",
            _mpt(attn_config={"qk_ln": True}),
            UnsupportedModelError,
            "attn_config.qk_ln=true is not supported; supported: false",
        ),
        _refused(
            "MPT without ALiBi",
            _mpt(attn_config={"alibi": False}),
            UnsupportedModelError,
            "attn_config.alibi=false is not supported; supported: true",
        ),
        _refused(
            "MPT with biases",
            _mpt(no_bias=False),
            UnsupportedModelError,
            "no_bias=false is not supported; supported: true",
        ),
        _refused(
            "MPT with a feed-forward width other than 4",
            _mpt(expansion_ratio=2),
            UnsupportedModelError,
            "expansion_ratio=2 is not supported; supported: 4",
        ),
        _refused(
            "query heads that ranks cannot share",
            _ranks(6, 2, 4),
            UsageError,
            "6 query heads cannot be split over 4 ranks",
        ),
        _refused(
            "KV heads that ranks cannot share",
            _ranks(12, 3, 4),
            UsageError,
            "3 KV heads cannot be split over 4 ranks",
        ),
        _refused(
            "bases-only with groups of KV heads that ranks cannot share",
            _ranks(4, 4, 4, head_group=2, projections=Projections.UNTOUCHED),
            UsageError,
            "2 latent heads of 2 KV heads cannot be split over 4 ranks",
        ),
    ],
)
def test_refused(call: Callable[[], Any], error: type[EigenError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
