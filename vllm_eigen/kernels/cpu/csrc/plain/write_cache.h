// SPDX-License-Identifier: Apache-2.0
// New latents into their blocks, in the block's own order and type.
#pragma once

#include "../args.h"
#include "../element.h"
#include "block.h"

namespace vllm_eigen {

template <class E>
void write_cache(const WriteArgs& a) {
  using Storage = typename E::Storage;
  const LayerArgs& layer = *a.layer;
  const int block_size = static_cast<int>(a.cache.block_size);
  const int rank_k = static_cast<int>(layer.rank_k), rank_v = static_cast<int>(layer.rank_v);
  const BlockLayout<E> layout{block_size, rank_k, rank_v};
  const Type type = static_cast<Type>(a.type);
  const float k_scale = static_cast<float>(layer.k_scale);
  const float v_scale = static_cast<float>(layer.v_scale);

  // W numbers of a row become W stored ones; `at` says where each goes.
  const auto scatter = [&](const void* from, int64_t base, int size, float scale, auto&& at,
                           Storage* block) {
    for (int d = 0; d < size; d += W) {
      const int n = size - d < W ? size - d : W;
      Storage stored[W];
      E::narrow(widen_first(type, from, base + d, n) / scale, stored);
      for (int i = 0; i < n; ++i) block[at(d + i)] = stored[i];
    }
  };

#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.num_tokens >= 32)
  for (int64_t i = 0; i < a.num_tokens; ++i) {
    const int64_t slot = a.slots[i];
    if (slot < 0) continue;
    const int token = static_cast<int>(slot % block_size);
    for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
      Storage* block = static_cast<Storage*>(a.cache.data) + slot / block_size * a.cache.block_stride
                       + h * a.cache.head_stride;
      scatter(a.key, i * a.key_token_stride + h * a.key_head_stride, rank_k, k_scale,
              [&](int d) { return layout.key_at(d, token); }, block);
      scatter(a.value, i * a.value_token_stride + h * a.value_head_stride, rank_v, v_scale,
              [&](int d) { return layout.value_at(d, token); }, block);
    }
  }
}

}  // namespace vllm_eigen
