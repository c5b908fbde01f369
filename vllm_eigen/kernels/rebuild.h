// Cached low-rank keys of one chunk back to rotary keys of the full head size.
//
// k_hat = k' D + offset, turned by the token's position, laid out as the K part of a page with
// `kChunk` tokens, so that scores do not care where their keys come from. The product costs
// rank_k * head_size multiplications a token: on a CPU without matrix units it, not memory,
// bounds attention in this mode.
#pragma once

#include "args.h"
#include "chunk.h"

namespace eigen {

constexpr int kTableTokens = 16;  // tokens side by side in the table of cosines
constexpr int kPanelTokens = W == 16 ? 64 : 16;  // tokens whose latents are multiplied at once

// Where the values of consecutive tokens lie.
struct Values {
  const char* first;
  int64_t token_bytes;
};

// The latents of NV vectors of tokens as the product reads them. Numbers that are not multiplied
// as they are stored become floats in `panel` ([rank_k][NV * W]), once instead of once for every
// few planes; there they also lie side by side, where rows of a page fall into few sets of L1.
template <class E, int NV>
EIGEN_INLINE KeyRun<typename E::Rebuilt> staged(const KeyRun<E>& latents, int token, float* panel) {
  const auto* first = latents.first + static_cast<int64_t>(token) * E::pack;
  const auto* single = latents.single ? latents.single + token : nullptr;
  constexpr int tokens = NV * W;
  if constexpr (E::Rebuilt::pack == 2) {
    return {first, single, latents.stride, latents.units, tokens};
  } else {
    const I high = I{} + static_cast<int32_t>(0xffff0000);
    float* row = panel;
    for (int u = 0; u < latents.units; ++u, row += E::pack * tokens) {
      EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
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
        EIGEN_UNROLL for (int v = 0; v < NV; ++v)
          store(row + v * W, E::load_single(single + v * W) << 16);
        row += tokens;
      }
    }
    return {panel, nullptr, tokens, static_cast<int>((row - panel) / tokens), tokens};
  }
}

// The cosine of a plane at `position`; those of later positions follow, up to a multiple of
// kTableTokens, sines kTableTokens behind.
EIGEN_INLINE const float* table_at(const RebuildArgs& a, int64_t position, int64_t plane) {
  return a.cos_sin + position % kTableTokens
         + (position / kTableTokens * a.rotary_planes + plane) * 2 * kTableTokens;
}

// Rows [plane, plane + P) of one head for NV vectors of tokens.
template <class K, int P, int NV>
EIGEN_INLINE void rebuild_planes(const RebuildArgs& a, const uint32_t* basis, const float* offset,
                                 float k_scale, const KeyRun<K>& latents, int64_t position,
                                 int plane, typename K::Storage* keys, int64_t row_stride) {
  const int units = latents.units + (latents.single != nullptr);
  const uint32_t* rows = basis + static_cast<int64_t>(2 * plane) * units;
  F c[2 * P][NV] = {};
  const int depth = a.depth[plane + P - 1];
  multiply<K>(c, rows, units, latents.first, latents.stride, std::min(depth, latents.units));
  if (depth > latents.units) {
    EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const auto single = K::load_single(latents.single + v * W);
      EIGEN_UNROLL for (int r = 0; r < 2 * P; ++r)
        c[r][v] = K::dot(c[r][v], single, K::broadcast(rows[r * units + units - 1]));
    }
  }
  EIGEN_UNROLL for (int p = 0; p < P; ++p) {
    const float x_offset = offset ? offset[2 * (plane + p)] : 0.0f;
    const float y_offset = offset ? offset[2 * (plane + p) + 1] : 0.0f;
    auto* out = keys + (plane + p) * (2 / K::pack) * row_stride;
    EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const F x = fma(c[2 * p][v], splat(k_scale), splat(x_offset));
      const F y = fma(c[2 * p + 1][v], splat(k_scale), splat(y_offset));
      F turned_x = x, turned_y = y;
      if (plane + p < a.rotary_planes) {
        const float* table = table_at(a, position + v * W, plane + p);
        const F cos = load<F>(table), sin = load<F>(table + kTableTokens);
        turned_x = fma(x, cos, -(y * sin));
        turned_y = fma(y, cos, x * sin);
      }
      K::store_plane(turned_x, turned_y, out + v * W * K::pack, row_stride);
    }
  }
}

// Memory that is read soon is fetched a part at a time, while products keep the machine busy. These
// are inlined always: a function that only prefetches has no effect in the eyes of the compiler,
// which drops calls to it.
EIGEN_INLINE void fetch(const void* memory, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 64)
    __builtin_prefetch(static_cast<const char*>(memory) + at);
}

// Unit rows [from, to) of `tokens` tokens from `token` on.
template <class E>
EIGEN_INLINE void fetch_latents(const KeyRun<E>& latents, int token, int tokens, int from, int to) {
  if (token >= latents.tokens) return;
  const auto* first = latents.first + static_cast<int64_t>(token) * E::pack;
  const int64_t bytes = tokens * E::pack * static_cast<int64_t>(sizeof *first);
  for (int u = from; u < std::min(to, latents.units); ++u)
    fetch(first + u * latents.stride, 0, bytes);
}

// The first `planes` planes of the keys of rebuilt head `head` from `latents`, the first of which
// sits at `position` in its sequence, into `keys` (rows of row_stride). `panel`: scratch of
// [rank_k][kPanelTokens]. also(run, t) may use the latents of each panel, the first of which is
// token t, while they are at hand. `values` and `next`, the latents of the page after this, are
// read later.
template <class E, class Fn>
void rebuild_keys(const RebuildArgs& a, int head, int planes, float k_scale,
                  const KeyRun<E>& latents, int64_t position,
                  typename E::Rebuilt::Storage* keys, int64_t row_stride, float* panel,
                  const Values& values, const KeyRun<E>& next, Fn&& also) {
  using K = typename E::Rebuilt;
  constexpr int most_vectors = kPanelTokens / W, most_planes = kAccumulators / most_vectors / 2;
  const int parts = std::max(1, planes / most_planes);  // of a panel, between which to fetch
  const int row_share = (latents.units + parts - 1) / parts;
  const int64_t value_share = (kPanelTokens * values.token_bytes + parts - 1) / parts;
  const auto block = [&](auto vectors, int t) {
    constexpr int NV = decltype(vectors)::value;
    const KeyRun<K> run = staged<E, NV>(latents, t, panel);
    const int units = run.units + (run.single != nullptr);
    const uint32_t* basis = a.basis + head * 2 * a.planes * units;
    const float* offset = a.offset ? a.offset + head * 2 * a.planes : nullptr;
    auto* out = keys + static_cast<int64_t>(t) * K::pack;
    const auto some = [&](auto count, int plane) {
      rebuild_planes<K, decltype(count)::value, NV>(a, basis, offset, k_scale, run, position + t,
                                                    plane, out, row_stride);
    };
    const bool is_last = t + NV * W >= latents.tokens;
    const char* value = values.first + t * values.token_bytes;
    int plane = 0;
    for (int part = 0; plane + most_planes <= planes; plane += most_planes, ++part) {
      fetch_latents(is_last ? next : latents, is_last ? 0 : t + NV * W, NV * W, part * row_share,
                    (part + 1) * row_share);
      fetch(value, part * value_share,
            std::min((part + 1) * value_share, NV * W * values.token_bytes));
      some(Const<most_planes>{}, plane);
    }
    if (plane < planes)
      with_rows<most_planes, 1>(planes - plane, [&](auto count) { some(count, plane); });
    also(run, t);
  };
  int t = 0;
  for (; t + kPanelTokens <= latents.tokens; t += kPanelTokens) block(Const<most_vectors>{}, t);
  for (; t < latents.tokens; t += W) block(Const<1>{}, t);
}

}  // namespace eigen
