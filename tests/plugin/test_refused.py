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


def _geometry(architecture: str, **options: Any) -> Any:
    config = {"architectures": [architecture], **options}
    return family_of(config).geometry(config)


def _check_norms(architecture: str, tp_size: int) -> None:
    from vllm_eigen.plugin.validation import check_norms

    check_norms(family_of({"architectures": [architecture]}), tp_size)


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
            "GPT-OSS: attention sinks",
            lambda: family_of({"architectures": ["GptOssForCausalLM"]}),
            UnsupportedModelError,
            r"GptOssForCausalLM is not supported \(its attention has sinks, which the kernels do",
        ),
        _refused(
            "Qwen3-Next and Qwen3.5: state layers beside gated attention",
            lambda: family_of({"architectures": ["Qwen3NextForCausalLM"]}),
            UnsupportedModelError,
            r"Qwen3NextForCausalLM is not supported \(it has state layers beside its attention",
        ),
        _refused(
            "StableLM with norms of query and key heads",
            lambda: _geometry("StableLmForCausalLM", qk_layernorm=True),
            UnsupportedModelError,
            "qk_layernorm=true is not supported; supported: false",
        ),
        _refused(
            "StableLM with the MLP beside the attention",
            lambda: _geometry("StableLmForCausalLM", use_parallel_residual=True),
            UnsupportedModelError,
            "use_parallel_residual=true is not supported; supported: false",
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
            "norms of all heads together on several ranks",
            lambda: _check_norms("Olmo2ForCausalLM", 2),
            UsageError,
            "norms of Olmo2ForCausalLM are of all heads together and cannot be split over 2 ranks",
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
