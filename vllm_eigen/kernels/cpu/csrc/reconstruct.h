// SPDX-License-Identifier: Apache-2.0
// Cached low-rank keys of one KV chunk back to rotary keys of the full head size.
//
// k_hat = k' D + offset, rotated by the token's position, laid out as the K part of a block with
// `kKvChunk` tokens, so that scores do not care where their keys come from. The product costs
// rank_k * head_size multiplications a token: on a CPU without matrix units it, not memory,
// bounds attention in this mode.
#pragma once

#include "args.h"
#include "kv_chunk.h"

namespace vllm_eigen {

constexpr int kTableTokens = 16;  // tokens side by side in the table of cosines
constexpr int kPanelTokens = W == 16 ? 64 : 16;  // tokens whose latents are multiplied at once
constexpr int kPairsAtOnce = kAccumulators / (kPanelTokens / W) / 2;

// Where the values of consecutive tokens lie.
struct Values {
  const char* first;
  int64_t token_bytes;
};

// The latents of NV vectors of tokens as the product reads them, of type K. Numbers that are not multiplied
// as they are stored become floats in `panel` ([rank_k][NV * W]), once instead of once for every
// few pairs; there they also lie side by side, where rows of a block fall into few sets of L1.
template <class K, int NV, class E>
VLLM_EIGEN_INLINE KeyRun<K> staged(const KeyRun<E>& latents, int token, float* panel) {
  const auto* first = latents.first + static_cast<int64_t>(token) * E::pack;
  const auto* single = latents.single ? latents.single + token : nullptr;
  constexpr int tokens = NV * W;
  if constexpr (K::pack == 2) {
    return {first, single, latents.stride, latents.units, tokens};
  } else {
    const I high = I{} + static_cast<int32_t>(0xffff0000);
    float* row = panel;
    for (int u = 0; u < latents.units; ++u, row += E::pack * tokens) {
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
        const auto unit = E::load(first + u * latents.stride + v * W * E::pack);
        if constexpr (E::pack == 2) {
          store(row + v * W, unit << 16);
          store(row + tokens + v * W, unit & high);
        } else {
          store(row + v * W, unit);
        }
      }
    }
    if constexpr (E::pack == 2) {
      if (single) {
        VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
          store(row + v * W, E::load_single(single + v * W) << 16);
        row += tokens;
      }
    }
    return {panel, nullptr, tokens, static_cast<int>((row - panel) / tokens), tokens};
  }
}

// The cosine of a pair at `position`; those of later positions follow, up to a multiple of
// kTableTokens, sines kTableTokens behind.
VLLM_EIGEN_INLINE const float* cos_sin_at(const ReconstructArgs& a, int64_t position, int64_t pair) {
  return a.cos_sin + position % kTableTokens
         + (position / kTableTokens * a.rotary_pairs + pair) * 2 * kTableTokens;
}

// Of W tokens' latents.
template <class K>
VLLM_EIGEN_INLINE F factor_of(const KeyRun<K>& latents, int token, float k_scale) {
  if (!latents.scales) return splat(k_scale);
  return float_of_bf16(load<H>(static_cast<const char*>(latents.scales) + 2 * token));
}

// Rows [row, row + R) of the keys, two to a pair from `pair` on, before their rotation: of NV vectors
// of tokens, from latents of type M.
template <class M, int R, int NV>
VLLM_EIGEN_INLINE void unrotated(const ReconstructArgs& a, int64_t row, int pair, float k_scale,
                                 const KeyRun<M>& latents, F (&c)[R][NV]) {
  const int units = latents.units + (latents.single != nullptr);
  const uint32_t* rows = a.basis + row * units;
  const int depth = a.depth[pair + R / 2 - 1];
  multiply<M>(c, rows, units, latents.first, latents.stride, std::min(depth, latents.units));
  if (depth > latents.units) {
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const auto single = M::load_single(latents.single + v * W);
      VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r)
        c[r][v] = M::dot(c[r][v], single, M::broadcast(rows[r * units + units - 1]));
    }
  }
  VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r) {
    const F offset = splat(a.offset ? a.offset[row + r] : 0.0f);
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
      c[r][v] = fma(c[r][v], factor_of(latents, v * W, k_scale), offset);
  }
}

// x and y, a pair of the keys of W tokens from `position` on, rotated and stored.
template <class K>
VLLM_EIGEN_INLINE void store_rotated(const ReconstructArgs& a, F x, F y, int64_t position, int pair,
                                     typename K::Storage* keys, int64_t row_stride) {
  F rotated_x = x, rotated_y = y;
  if (pair < a.rotary_pairs) {
    const float* cos_sin = cos_sin_at(a, position, pair);
    const F cos = load<F>(cos_sin), sin = load<F>(cos_sin + kTableTokens);
    rotated_x = fma(x, cos, -(y * sin));
    rotated_y = fma(y, cos, x * sin);
  }
  K::store_pair(rotated_x, rotated_y, keys, row_stride);
}

// Pairs [pair, pair + P) of a head for NV vectors of tokens.
template <class K, int P, int NV, class M>
VLLM_EIGEN_INLINE void reconstruct_pairs(const ReconstructArgs& a, int head, float k_scale,
                                         const KeyRun<M>& latents, int64_t position, int pair,
                                         typename K::Storage* keys, int64_t row_stride) {
  F c[2 * P][NV] = {};
  unrotated(a, head * 2 * a.pairs + 2 * pair, pair, k_scale, latents, c);
  VLLM_EIGEN_UNROLL for (int p = 0; p < P; ++p) {
    auto* out = keys + (pair + p) * (2 / K::pack) * row_stride;
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
      store_rotated<K>(a, c[2 * p][v], c[2 * p + 1][v], position + v * W, pair + p,
                       out + v * W * K::pack, row_stride);
  }
}

// Whether latents of type M are multiplied on matrix units, by reconstruct_on_tiles.
template <class M>
constexpr bool kOnTiles = false;

template <class K, int NV, class M, class Fn>
void reconstruct_on_tiles(const ReconstructArgs& a, int head, int pairs, const KeyRun<M>& latents,
                          int64_t position, typename K::Storage* keys, int64_t row_stride,
                          int parts, Fn&& fetch);

// The first `pairs` pairs of a head for NV vectors of tokens. Between them fetch(0) .. fetch(parts -
// 1) are called.
template <class K, int NV, class M, class Fn>
VLLM_EIGEN_INLINE void reconstruct_panel(const ReconstructArgs& a, int head, int pairs, float k_scale,
                                         const KeyRun<M>& latents, int64_t position,
                                         typename K::Storage* keys, int64_t row_stride, int parts,
                                         Fn&& fetch) {
  if constexpr (kOnTiles<M>) {
    reconstruct_on_tiles<K, NV>(a, head, pairs, latents, position, keys, row_stride, parts, fetch);
    return;
  }
  const auto some = [&](auto count, int pair) {
    reconstruct_pairs<K, decltype(count)::value, NV>(a, head, k_scale, latents, position, pair,
                                                     keys, row_stride);
  };
  int pair = 0;
  for (int part = 0; pair + kPairsAtOnce <= pairs; pair += kPairsAtOnce, ++part) {
    fetch(part);
    some(Const<kPairsAtOnce>{}, pair);
  }
  if (pair < pairs)
    with_rows<kPairsAtOnce, 1>(pairs - pair, [&](auto count) { some(count, pair); });
}

// Memory that is read soon is fetched a part at a time, while products keep the machine busy. These
// are inlined always: a function that only prefetches has no effect in the eyes of the compiler,
// which drops calls to it.
VLLM_EIGEN_INLINE void fetch(const void* memory, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 64)
    __builtin_prefetch(static_cast<const char*>(memory) + at);
}

// Unit rows [from, to) of `tokens` tokens from `token` on.
template <class E>
VLLM_EIGEN_INLINE void fetch_latents(const KeyRun<E>& latents, int token, int tokens, int from, int to) {
  if (token >= latents.tokens) return;
  const auto* first = latents.first + static_cast<int64_t>(token) * E::pack;
  const int64_t bytes = tokens * E::pack * static_cast<int64_t>(sizeof *first);
  for (int u = from; u < std::min(to, latents.units); ++u)
    fetch(first + u * latents.stride, 0, bytes);
}

// The first `pairs` pairs of the keys of reconstructed head `head` from `latents`, the first of which
// sits at `position` in its sequence, into `keys` (rows of row_stride). They are multiplied as M.
// Run: what has staged() and fetch_latents(). `panel`: a buffer of [rank_k][kPanelTokens].
// also(run, t) may use the latents of each panel, the first of which is token t, while they are at
// hand. `values` and `next`, the latents of the block after this, are read later.
template <class K, class M, class Run, class Fn>
void reconstruct_keys(const ReconstructArgs& a, int head, int pairs, float k_scale,
                  const Run& latents, int64_t position, typename K::Storage* keys,
                  int64_t row_stride, float* panel, const Values& values, const Run& next,
                  Fn&& also) {
  constexpr int most_vectors = kPanelTokens / W;
  const int parts = std::max(1, pairs / kPairsAtOnce);  // of a panel, between which to fetch
  const int row_share = (latents.units + parts - 1) / parts;
  const int64_t value_share = (kPanelTokens * values.token_bytes + parts - 1) / parts;
  const auto one_panel = [&](auto vectors, int t) {
    constexpr int NV = decltype(vectors)::value;
    const KeyRun<M> run = staged<M, NV>(latents, t, panel);
    const bool is_last = t + NV * W >= latents.tokens;
    const char* value = values.first + t * values.token_bytes;
    const auto fetch_part = [&](int part) {
      fetch_latents(is_last ? next : latents, is_last ? 0 : t + NV * W, NV * W, part * row_share,
                    (part + 1) * row_share);
      fetch(value, part * value_share,
            std::min((part + 1) * value_share, NV * W * values.token_bytes));
    };
    reconstruct_panel<K, NV>(a, head, pairs, k_scale, run, position + t,
                             keys + static_cast<int64_t>(t) * K::pack, row_stride, parts,
                             fetch_part);
    also(run, t);
  };
  int t = 0;
  for (; t + kPanelTokens <= latents.tokens; t += kPanelTokens) one_panel(Const<most_vectors>{}, t);
  for (; t < latents.tokens; t += W) one_panel(Const<1>{}, t);
}

}  // namespace vllm_eigen
