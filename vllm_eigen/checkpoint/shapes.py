# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the attention tensors that the Eigen checkpoint format fixes.

With `num_latent_heads = num_kv_heads / head_group`, a layer with `projections` = `folded` holds

    q_proj     [num_heads * rank_k, hidden]              no-rope
               [num_heads * head_size, hidden]           pre-rope (the base model's)
    k_proj     [num_latent_heads * rank_k, hidden]
    v_proj     [num_latent_heads * rank_v, hidden]
    o_proj     [hidden, num_heads * rank_v]
    key_basis  [num_kv_heads, rank_k, head_size]         pre-rope only: k_hat = k' key_basis

Biases follow their projection. Everything else is the base model's.

Keys that pass a norm or RoPE (post-rope mode) before they are cached leave no projection to fold
their basis into: with `values-folded` q_proj and k_proj are the base model's, and the first two of
the tensors below stand beside them. Where values pass a clip too, or the base weights are to stay
as they are, `projections` is `untouched`: q/k/v/o_proj are the base model's, and a layer adds all
four

    key_encoder    [num_latent_heads, head_group * head_size, rank_k]   k' = k key_encoder
    key_basis      [num_kv_heads, rank_k, head_size]                    k_hat = k' key_basis
    value_encoder  [num_latent_heads, head_group * head_size, rank_v]   v' = v value_encoder
    value_basis    [num_kv_heads, rank_v, head_size]                    o = o' value_basis

A `bases.safetensors` holds these four tensors a layer and nothing else.

With `key_offset`, k' = (k - o) E for an offset o of each KV head. The bias of a folded k_proj
holds it, (b - o) E, and so k_proj has a bias where the base model's has none. Otherwise, and for
what reads the cache:

    key_encoder_bias    [num_latent_heads, rank_k]    k' = k key_encoder + key_encoder_bias
    key_offset          [num_kv_heads, head_size]     k_hat = k' key_basis + key_offset (pre-rope)

Without RoPE, or behind it, q . o is the same for all keys and drops out of the softmax (which a
soft cap or a sink would not allow; no family has them in these key modes).

With `value_offset`, v' = (v - o) E. A row of the softmax sums to 1, so o is added to what is read:
the bias of a folded o_proj holds it, which then exists as that of v_proj does. Untouched:

    value_encoder_bias  [num_latent_heads, rank_v]    v' = v value_encoder + value_encoder_bias
    value_offset        [num_kv_heads, head_size]     o = o' value_basis + value_offset

The steps of coded latents (`codes`) are multiplied into these tensors: encoders and their biases
are divided by a direction's step, bases and q_proj multiplied.

Calibration rotates the latents of a pre-rope layer so that key_basis is triangular over the RoPE
pairs, fastest pair first; kernels skip its zeros (`kernels/rope.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_eigen.checkpoint.config import EigenConfig, LayerRanks
from vllm_eigen.checkpoint.families import Family

KEY_ENCODER = "key_encoder"
KEY_BASIS = "key_basis"
VALUE_ENCODER = "value_encoder"
VALUE_BASIS = "value_basis"
KEY_ENCODER_BIAS = "key_encoder_bias"
KEY_OFFSET = "key_offset"
VALUE_ENCODER_BIAS = "value_encoder_bias"
VALUE_OFFSET = "value_offset"

BESIDE = (
    KEY_ENCODER,
    KEY_BASIS,
    VALUE_ENCODER,
    VALUE_BASIS,
    KEY_ENCODER_BIAS,
    KEY_OFFSET,
    VALUE_ENCODER_BIAS,
    VALUE_OFFSET,
)
"""Names of all tensors that may stand beside the projections."""


def tensor_shapes(
    eigen: EigenConfig, family: Family, hidden_size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every attention tensor the format fixes, by compressed layer."""
    latent_heads = eigen.num_latent_heads
    for index, ranks in zip(eigen.layer_indices, eigen.layers, strict=True):
        path = family.attention_path(index)
        if eigen.projections.folds_values:
            query_size, key_size = projected_sizes(eigen, ranks)
            yield f"{path}.{family.q_proj}.weight", (eigen.num_heads * query_size, hidden_size)
            yield f"{path}.{family.k_proj}.weight", (latent_heads * key_size, hidden_size)
            yield f"{path}.{family.v_proj}.weight", (latent_heads * ranks.rank_v, hidden_size)
            yield f"{path}.{family.o_proj}.weight", (hidden_size, eigen.num_heads * ranks.rank_v)
        for name in needed_biases(eigen, family):
            sizes = {family.k_proj: ranks.rank_k, family.v_proj: ranks.rank_v}
            size = latent_heads * sizes[name] if name in sizes else hidden_size
            yield f"{path}.{name}.bias", (size,)
        for name, shape in basis_shapes(eigen, ranks).items():
            yield f"{path}.{name}", shape


def projected_sizes(eigen: EigenConfig, ranks: LayerRanks) -> tuple[int, int]:
    """What a layer's projections make of the hidden state, not being untouched.

    Returns:
        The width of a query head, and of the keys of a latent head.
    """
    if not eigen.projections.folds_keys:
        return eigen.head_size, eigen.head_group * eigen.head_size
    return eigen.head_size if eigen.key_mode.has_rope else ranks.rank_k, ranks.rank_k


def needed_biases(eigen: EigenConfig, family: Family) -> tuple[str, ...]:
    """Projections that have a bias whether the base model's have one or not: it holds an offset."""
    names: tuple[str, ...] = ()
    if eigen.key_offset and eigen.projections.folds_keys:
        names += (family.k_proj,)
    if eigen.value_offset and eigen.projections.folds_values:
        names += (family.v_proj, family.o_proj)
    return names


def basis_shapes(eigen: EigenConfig, ranks: LayerRanks) -> dict[str, tuple[int, ...]]:
    """Shapes of the bases and offsets that stand beside a layer's projections, by name."""
    full = eigen.head_group * eigen.head_size
    shapes: dict[str, tuple[int, ...]] = {}
    if not eigen.projections.folds_keys:
        shapes[KEY_ENCODER] = eigen.num_latent_heads, full, ranks.rank_k
    if not eigen.projections.folds_keys or eigen.key_mode.reconstructs_keys:
        shapes[KEY_BASIS] = eigen.num_kv_heads, ranks.rank_k, eigen.head_size
    if not eigen.projections.folds_values:
        shapes[VALUE_ENCODER] = eigen.num_latent_heads, full, ranks.rank_v
        shapes[VALUE_BASIS] = eigen.num_kv_heads, ranks.rank_v, eigen.head_size
    if eigen.key_offset and not eigen.projections.folds_keys:
        shapes[KEY_ENCODER_BIAS] = eigen.num_latent_heads, ranks.rank_k
    if eigen.key_offset and eigen.key_mode.reconstructs_keys:
        shapes[KEY_OFFSET] = eigen.num_kv_heads, eigen.head_size
    if eigen.value_offset and not eigen.projections.folds_values:
        shapes[VALUE_ENCODER_BIAS] = eigen.num_latent_heads, ranks.rank_v
        shapes[VALUE_OFFSET] = eigen.num_kv_heads, eigen.head_size
    return shapes
