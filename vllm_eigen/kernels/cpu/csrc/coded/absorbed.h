// SPDX-License-Identifier: Apache-2.0
// Absorbed queries as rows of integers, like those of a key basis: they are scored with the panels of
// latents that keys are reconstructed from, where bytes are multiplied two by two (pairs.h).
//
// Numbers have 8 bits of a query's largest one, 15 bits where they meet 8-bit codes.
#pragma once

#include <algorithm>

#include "keys.h"

namespace vllm_eigen {

struct AbsorbedRows {
  AbsorbedRows() = default;
  AbsorbedRows(Arena& arena, const Sections& code, int64_t rows)
      : units(code.of[0].units() + code.rank / 4),
        numbers(arena.take<uint32_t>(rows * units)),
        scale(arena.take<float>(rows)),
        above(arena.take<float>(rows)) {}

  int units;
  uint32_t* numbers;     // [rows][units], as IntegerRows has them
  float *scale, *above;  // [rows], likewise
};

// The first n bytes of W.
template <class V>
VLLM_EIGEN_INLINE void put_bytes(const V& from, int n, uint32_t* to) {
  static_assert(sizeof from == W);
  if (n == W)
    std::memcpy(to, &from, W);
  else
    std::memcpy(to, &from, n);
}

// Row i from `x [rank]`.
inline void quantize_absorbed(const Sections& code, const float* x, const AbsorbedRows& to, int i) {
  const NumberStep step = step_of(x, code.rank, kLargestByte);
  uint32_t* row = to.numbers + static_cast<int64_t>(i) * to.units;
  float above = 0.0f;
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    const Section& section = code.of[s];
    I sum{};
    for (int d = 0; d < section.count; d += W) {
      const int n = std::min(W, section.count - d);
      const F some = load_first<F>(x + section.first + d, n);
      const F wanted = some * (width == 8 ? kSignedBase * step.inverse : step.inverse);
      const I numbers = step.inverse > 0.0f ? nearest(wanted) : I{};
      sum = sum + numbers;
      if constexpr (width == 8) {
        uint32_t halves[2][W / 4];
        put_numbers<kSignedBase>(numbers, halves[0], halves[1]);
        put_bytes(halves[0], n, row + d / 4);
        put_bytes(halves[1], n, row + section.units() + d / 4);
      } else {
        put_bytes(__builtin_convertvector(numbers, B), n, row + d / 4);
      }
    }
    row += section.count / (width == 8 ? 2 : 4);
    int32_t all = 0;
    for (int lane = 0; lane < W; ++lane) all += sum[lane];
    // Of an 8-bit code the sums have 128 less than is stored: half a step too little.
    constexpr float h = width == 8 ? -0.5f / kSignedBase : 0.5f * ((1 << width) - 1);
    above += h * static_cast<float>(all);
  });
  to.scale[i] = step.size;
  to.above[i] = above;
}

// products[i][t] of `count` rows with a panel of latents, rows of kKvChunk.
template <class M>
void score_absorbed(const AbsorbedRows& queries, int low_units, int count,
                    const KeyRun<M>& latents, float* products) {
  const IntegerRows rows{queries.numbers, queries.scale, queries.above, nullptr, low_units};
  const auto score = [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value, most = rows_for(NV);
    const int step = even_part(count, most);
    for (int r = 0; r < count; r += step)
      with_rows<most, NV>(std::min(step, count - r), [&](auto rows_here) {
        constexpr int R = decltype(rows_here)::value;
        F c[R][NV];
        integer_products(rows, r, latents, c);
        VLLM_EIGEN_UNROLL for (int i = 0; i < R; ++i)
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
            store(products + (r + i) * kKvChunk + v * W, c[i][v]);
      });
  };
  if (latents.tokens == kPanelTokens)
    score(Const<kPanelTokens / W>{});
  else
    score(Const<1>{});
}

}  // namespace vllm_eigen
