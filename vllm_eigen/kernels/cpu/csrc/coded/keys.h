// SPDX-License-Identifier: Apache-2.0
// Scores of query rows with coded keys, in integers.
//
// A query is quantized once for each width of the code, to 15 bits of its largest number there, or
// to 8 bits where it is not fine, is multiplied with VNNI and does not meet 8-bit codes:
// score = sum over widths of scale * (numbers . (codes - h)), where the sum with the codes is exact
// until it becomes a float. What h takes off them follows from the query's own sum.
#pragma once

#include <algorithm>

#include "../kv_chunk.h"
#include "../workspace.h"
#include "reconstruct.h"

namespace vllm_eigen {

// Rows of quantized queries.
struct CodedQueries {
  struct Factors {
    float scale[kWidths];
    uint32_t correction[kWidths];  // of the integer sum: h without its half
    float constant[kWidths];       // of the score: the half of h
  };

  CodedQueries() = default;
  CodedQueries(Arena& arena, const Sections& code, int64_t rows) : half(0) {
    for (int s = 0; s < kWidths; ++s) {
      first[s] = half;
      half += kHasTiles ? in_tiles(code.of[s].count / 4) : code.of[s].count / 4;
    }
    half += W / 4;  // a width's last vector may reach past it
    numbers = arena.take<uint32_t>((rows + kUnusedRows) * 2 * half);
    factors = arena.take<Factors>(rows);
  }

  uint32_t* row(int i) const { return numbers + static_cast<int64_t>(i) * 2 * half; }

  int half;            // units of the first, then of the second kind (integer.h)
  int first[kWidths];  // unit of each width, whole tiles where the machine has them
  uint32_t* numbers;   // [rows][2 * half]
  Factors* factors;   // [rows]
};

// What is not larger is taken as 0: its inverse would be infinite.
constexpr float kTiny = 1e-30f;

// What one unit of rounded numbers stands for, NaN where a number is not finite; and its inverse, 0
// where it would be infinite.
struct NumberStep {
  float size, inverse;

  // `largest` magnitudes and sums of 0 times the numbers, by lane.
  NumberStep(F largest, F check, int most_number) {
    const float most = max_of(largest), bad = sum_of(check);
    size = most / most_number + bad;
    inverse = most > kTiny && bad == 0.0f ? most_number / most : 0.0f;
  }
};

// With which `count` numbers are at most `most_number`.
inline NumberStep step_of(const float* x, int count, int most_number) {
  F largest{}, check{};
  for (int d = 0; d < count; d += W) {
    const F some = load_first<F>(x + d, std::min(W, count - d));
    largest = max(largest, max(some, -some));
    check = check + some * 0.0f;
  }
  return {largest, check, most_number};
}

// Whether a query that is not fine has bytes where it meets codes of a width.
#if defined(__AVX512VNNI__)
template <bool fine, int width>
constexpr bool kInBytes = !fine && width < 8;
#else
template <bool fine, int width>
constexpr bool kInBytes = false;
#endif

// Row i from `x [rank]`.
template <bool fine>
void quantize_query(const Sections& code, const float* x, const CodedQueries& queries,
                           int i) {
  auto& factors = queries.factors[i];
  if (kHasTiles) std::fill_n(queries.row(i), 2 * queries.half, 0u);
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value;
    constexpr bool in_bytes = kInBytes<fine, kWidth[s]>;
    const Section& section = code.of[s];
    const float* from = x + section.first;
    uint32_t* first = queries.row(i) + queries.first[s];
    const NumberStep step = step_of(from, section.count, in_bytes ? kLargestByte : kLargestSigned);
    factors.scale[s] = step.size;
    I sum{};
    for (int d = 0; d < section.count; d += W) {
      const F some = load_first<F>(from + d, std::min(W, section.count - d));
      const I numbers = step.inverse > 0.0f ? nearest(some * step.inverse) : I{};
      sum = sum + numbers;
      if constexpr (in_bytes)
        store(first + d / 4, __builtin_convertvector(numbers, B));
      else
        put_numbers<kSignedBase>(numbers, first + d / 4, first + queries.half + d / 4);
    }
    int32_t all = 0;
    for (int lane = 0; lane < W; ++lane) all += sum[lane];
    factors.correction[s] = static_cast<uint32_t>(all) << (section.width - 1);
    factors.constant[s] = 0.5f * static_cast<float>(all) * factors.scale[s];
  });
}

// scores of MR rows with NV vectors of keys of one width, added to what is there unless `is_first`.
template <bool fine, int width, int MR, int NV>
VLLM_EIGEN_INLINE void score_tile(const CodedQueries& queries, int row, int s, const Section& section,
                                  const uint8_t* keys, int64_t stride, bool is_first,
                                  float* scores) {
  U sums[MR][NV][kSums] = {};
  const uint32_t* q = queries.row(row) + queries.first[s];
  const int64_t q_stride = 2 * queries.half;
  const int units = section.units();
  for (int u = 0; u < units; ++u, keys += stride, q += 8 / width) {
    U unit[NV];
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) unit[v] = load<U>(keys + v * 4 * W);
    each_below<8 / width>([&](auto plane) {
      constexpr int j = decltype(plane)::value;
      Plane codes[NV];
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) codes[v] = unsigned_plane<width, j>(unit[v]);
      VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r) {
        const uint32_t first = q[r * q_stride + j];
        if constexpr (kInBytes<fine, width>) {
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
            add_unsigned_bytes(sums[r][v][0], codes[v], first);
        } else {
          const uint32_t second = q[r * q_stride + queries.half + j];
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
            add_unsigned(sums[r][v], codes[v], first, second);
        }
      }
    });
  }
  VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r) {
    const auto& factors = queries.factors[row + r];
    const F scale = splat(factors.scale[s]), constant = splat(factors.constant[s]);
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      const U whole = kInBytes<fine, width> ? sums[r][v][0] : total<kSignedBase>(sums[r][v]);
      const U sum = whole - factors.correction[s];
      float* to = scores + r * kKvChunk + v * W;
      const F x = __builtin_convertvector((I)sum, F);
      store(to, fma(x, scale, is_first ? constant : load<F>(to) + constant));
    }
  }
}

// scores[row][t] of query rows [row, row + rows), rows of kKvChunk, without the scales of the keys.
template <bool fine>
void score_codes(const CodedQueries& queries, int row, int rows, const CodedRun& keys,
                        float* scores) {
  bool is_first = true;
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    const Section& section = keys.code->of[s];
    if (section.count == 0) return;
    const uint8_t* first = keys.first + section.first_byte / 4 * keys.stride;
    const auto tiles = [&](auto vectors, auto most_rows, int& t) {
      constexpr int NV = decltype(vectors)::value, most = decltype(most_rows)::value;
      const int step = even_part(rows, most);
      for (; t + NV * W <= keys.tokens; t += NV * W)
        for (int r = 0; r < rows; r += step)
          with_rows<most, 1>(std::min(step, rows - r), [&](auto count) {
            constexpr int MR = decltype(count)::value;
            score_tile<fine, width, MR, NV>(queries, row + r, s, section, first + 4 * t, keys.stride,
                                      is_first, scores + r * kKvChunk + t);
          });
    };
    int t = 0;
    if (rows == 1) tiles(Const<8>{}, Const<1>{}, t);
    if (rows <= 3) tiles(Const<4>{}, Const<3>{}, t);
    tiles(Const<2>{}, Const<6>{}, t);
    tiles(Const<1>{}, Const<6>{}, t);
    is_first = false;
  });
}

// scores[row][t] times the scales of the keys.
inline void scale_scores(int rows, const CodedRun& keys, float* scores) {
  for (int t = 0; t < keys.tokens; t += W) {
    const F scale = float_of_bf16(load<H>(keys.scales + 2 * t));
    for (int r = 0; r < rows; ++r) {
      float* to = scores + r * kKvChunk + t;
      store(to, load<F>(to) * scale);
    }
  }
}

}  // namespace vllm_eigen
