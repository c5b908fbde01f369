// Cached low-rank keys of one chunk back to rotary keys of the full head size.
//
// k_hat = k' D + offset, turned by the token's position, laid out as the K part of a page with
// `kChunk` tokens, so that scores do not care where their keys come from. The product costs
// rank_k * head_size multiplications a token: on a CPU without matrix units it, not memory,
// bounds attention in this mode.
#pragma once

#include "args.h"
#include "multiply.h"
#include "page.h"

namespace eigen {

constexpr int kTableTokens = 16;  // tokens side by side in the table of cosines

// Rows [plane, plane + P) of one head for NV vectors of tokens.
template <class E, int P, int NV>
EIGEN_INLINE void rebuild_planes(const RebuildArgs& a, const uint32_t* basis, const float* offset,
                                 float k_scale, const Page<E>& layout,
                                 const typename E::Storage* page, int token, int64_t position,
                                 int plane, typename E::Rebuilt::Storage* keys,
                                 int64_t row_stride) {
  const int units = layout.full_units() + layout.has_single();
  const uint32_t* rows = basis + static_cast<int64_t>(2 * plane) * units;
  F c[2 * P][NV] = {};
  multiply<E>(c, rows, units, layout.keys(page, 0, token), layout.key_stride(),
              layout.full_units());
  if (layout.has_single()) {
    EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const auto single = E::load_single(layout.single(page, token + v * W));
      EIGEN_UNROLL for (int r = 0; r < 2 * P; ++r)
        c[r][v] = E::dot(c[r][v], single, E::broadcast(rows[r * units + units - 1]));
    }
  }
  constexpr int pack = E::Rebuilt::pack;
  EIGEN_UNROLL for (int p = 0; p < P; ++p) {
    const float x_offset = offset ? offset[2 * (plane + p)] : 0.0f;
    const float y_offset = offset ? offset[2 * (plane + p) + 1] : 0.0f;
    auto* out = keys + (plane + p) * (2 / pack) * row_stride;
    EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const F x = fma(c[2 * p][v], splat(k_scale), splat(x_offset));
      const F y = fma(c[2 * p + 1][v], splat(k_scale), splat(y_offset));
      F turned_x = x, turned_y = y;
      if (plane + p < a.rotary_planes) {
        const int64_t at = position + v * W;
        const float* table = a.cos_sin + at % kTableTokens
                             + (at / kTableTokens * a.rotary_planes + plane + p) * 2
                                   * kTableTokens;
        const F cos = load<F>(table), sin = load<F>(table + kTableTokens);
        turned_x = fma(x, cos, -(y * sin));
        turned_y = fma(y, cos, x * sin);
      }
      E::Rebuilt::store_plane(turned_x, turned_y, out + v * W * pack, row_stride);
    }
  }
}

// `tokens` keys (a multiple of 16) of rebuilt head `head`, from `token` of `page`, which sits at
// `position` in its sequence, into `keys` (rows of row_stride).
template <class E>
void rebuild_keys(const RebuildArgs& a, int head, float k_scale, const Page<E>& layout,
                  const typename E::Storage* page, int token, int64_t position, int tokens,
                  typename E::Rebuilt::Storage* keys, int64_t row_stride) {
  const int units = layout.full_units() + layout.has_single();
  const int planes = static_cast<int>(a.planes);
  const uint32_t* basis = a.basis + static_cast<int64_t>(head) * 2 * planes * units;
  const float* offset = a.offset ? a.offset + static_cast<int64_t>(head) * 2 * planes : nullptr;
  constexpr int nv = W == 16 ? 4 : 2, most = kAccumulators / nv / 2;
  const auto block = [&](auto vectors, int t) {
    constexpr int NV = decltype(vectors)::value;
    auto* out = keys + static_cast<int64_t>(t) * E::Rebuilt::pack;
    int plane = 0;
    for (; plane + most <= planes; plane += most)
      rebuild_planes<E, most, NV>(a, basis, offset, k_scale, layout, page, token + t,
                                  position + t, plane, out, row_stride);
    for (; plane < planes; ++plane)
      rebuild_planes<E, 1, NV>(a, basis, offset, k_scale, layout, page, token + t, position + t,
                               plane, out, row_stride);
  };
  int t = 0;
  for (; t + nv * W <= tokens; t += nv * W) block(Const<nv>{}, t);
  for (; t < tokens; t += W) block(Const<1>{}, t);
}

}  // namespace eigen
