// SPDX-License-Identifier: Apache-2.0
// Probabilities times coded values, in integers.
//
// Within a KV chunk a row's weights, probabilities times token scales, are rounded to 15 bits of the
// largest. Their products with the codes are exact integers, added up over the chunk whatever blocks
// it lies in. Stored codes are half a step below what they stand for: half the sum of the weights.
#pragma once

#include "keys.h"

namespace vllm_eigen {

// Weights of a few rows in a KV chunk, and their sums with the values.
struct CodedWeights {
  static constexpr int kUnits = kKvChunk / kGroup;

  CodedWeights() = default;
  CodedWeights(Arena& arena, const Sections& code, int64_t rows)
      : numbers(arena.take<uint32_t>(rows * 2 * kUnits)),
        factors(arena.take<float>(rows)),
        halves(arena.take<float>(rows)) {
    row_sums = 0;
    for (int s = 0; s < kWidths; ++s) {
      first_sum[s] = row_sums;
      row_sums += code.of[s].planes() * places(code.of[s]);
    }
    sums = arena.take<uint32_t>(rows * row_sums);
  }

  // Bytes of a width in whole vectors: the places of a plane in `sums`.
  static int places(const Section& section) { return (section.bytes() + W - 1) / W * W; }
  uint32_t* row(int i) const { return numbers + i * 2 * kUnits; }
  uint32_t* sums_of(int i, int s) const {
    return sums + static_cast<int64_t>(i) * row_sums + first_sum[s];
  }

  uint32_t* numbers;  // [rows][first kUnits, second kUnits] as in integer.h
  float* factors;     // [rows], NaN where a weight is not finite
  float* halves;      // [rows], half the sum of the numbers
  uint32_t* sums;     // [rows][of each width [plane][places]]
  int row_sums, first_sum[kWidths];
};

// Row i from its probabilities of the tokens [begin, end) of the chunk, multiples of 16, times the
// tokens' `scales` (null: all 1). Of what the row does not see, outside of [first, last), a scale may
// be NaN. `weights` is overwritten.
inline void quantize_weights(float* weights, const float* scales, int first_seen, int last_seen,
                             int begin, int end, const CodedWeights& to, int i) {
  F largest{}, check{};
  const bool sees_all = first_seen <= begin && last_seen >= end;
  for (int t = begin; t < end; t += W) {
    F w = load<F>(weights + t);
    if (scales) {
      w = w * load<F>(scales + t);
      const I at = iota() + t;
      if (!sees_all) w = select((at >= first_seen) & (at < last_seen), w, F{});
      store(weights + t, w);
    }
    largest = max(largest, w);
    check = check + w * 0.0f;
  }
  const NumberStep step(largest, check, kLargestUnsigned);
  to.factors[i] = step.size;
  uint32_t* first = to.row(i);
  I sum{};
  for (int t = begin; t < end; t += W) {
    const I numbers = step.inverse > 0.0f ? nearest(load<F>(weights + t) * step.inverse) : I{};
    sum = sum + numbers;
    put_numbers<kUnsignedBase>(numbers, first + t / kGroup, first + to.kUnits + t / kGroup);
  }
  to.halves[i] = 0.5f * sum_of(__builtin_convertvector(sum, F));
}

// sums[row][plane][place] of MR rows and NV vectors of places += weights times the codes of
// `groups` rows of V. `last` places of the last vector are there.
template <int width, int MR, int NV>
VLLM_EIGEN_INLINE void add_tile(const CodedWeights& weights, int row, int group, uint32_t* sums,
                                int places, const uint8_t* values, int64_t stride, int groups,
                                int last) {
  constexpr int P = 8 / width;
  U c[MR][NV][P][kSums] = {};
  const uint32_t* w = weights.row(row) + group;
  for (int g = 0; g < groups; ++g, values += stride, ++w) {
    U unit[NV];
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV - 1; ++v) unit[v] = load<U>(values + v * 4 * W);
    unit[NV - 1] = load_first<U>(values + (NV - 1) * 4 * W, last);
    each_below<P>([&](auto plane) {
      constexpr int j = decltype(plane)::value;
      Plane codes[NV];
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) codes[v] = signed_plane<width, j>(unit[v]);
      VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r) {
        const uint32_t* number = w + r * 2 * weights.kUnits;
        VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
          add_signed(c[r][v][j], codes[v], number[0], number[weights.kUnits]);
      }
    });
  }
  VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r) {
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
      VLLM_EIGEN_UNROLL for (int j = 0; j < P; ++j) {
        uint32_t* to = sums + static_cast<int64_t>(r) * weights.row_sums + j * places + v * W;
        store(to, load<U>(to) + total<kUnsignedBase>(c[r][v][j]));
      }
    }
  }
}

// The sums of `rows` rows from `row` on with `tokens` tokens of a block from `inside` on, the first of
// which is token `at` of the chunk; all multiples of 16.
inline void add_codes(const CodedLayout& layout, const CodedWeights& weights, int row, int rows,
                      const uint8_t* block, int inside, int at, int tokens) {
  const int64_t stride = kGroup * static_cast<int64_t>(layout.value.code_bytes);
  const int groups = tokens / kGroup, group = at / kGroup;
  const auto section_of = [&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s], P = 8 / width;
    // Vectors and rows whose accumulators fit: wide for one row, otherwise many rows at once.
    constexpr int budget = W == 16 ? 24 : 12, most_rows = std::min(6, budget / (P * kSums));
    constexpr int wide = std::min(4, (budget - 4) / (P * kSums));
    const Section& section = layout.value.of[s];
    const int bytes = section.bytes(), places = weights.places(section);
    const auto tiles = [&](auto vectors, auto rows_at_once, int& place) {
      constexpr int NV = decltype(vectors)::value, most = decltype(rows_at_once)::value;
      const int step = even_part(rows, most);
      for (; bytes - place > (NV - 1) * W; place += NV * W) {
        const int last = std::min(W, bytes - place - (NV - 1) * W);
        for (int r = 0; r < rows; r += step)
          with_rows<most, 1>(std::min(step, rows - r), [&](auto count) {
            add_tile<width, decltype(count)::value, NV>(
                weights, row + r, group, weights.sums_of(row + r, s) + place, places,
                layout.values(block, inside) + kGroup * (section.first_byte + place), stride,
                groups, last);
          });
      }
    };
    int place = 0;
    if (rows == 1) tiles(Const<wide>{}, Const<1>{}, place);
    if (rows <= 2 && wide >= 2) tiles(Const<2>{}, Const<most_rows / 2>{}, place);
    tiles(Const<1>{}, Const<most_rows>{}, place);
  };
  each_below<kWidths>(section_of);
}

// acc[d] = what the sums of row i stand for.
inline void sums_to_values(const Sections& code, const CodedWeights& weights, int i, float* acc) {
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    const Section& section = code.of[s];
    const F factor = splat(weights.factors[i]), half = splat(weights.halves[i]);
    const int bytes = section.bytes(), places = weights.places(section);
    const uint32_t* sums = weights.sums_of(i, s);
    for (int j = 0; j < section.planes(); ++j) {
      float* to = acc + section.first + j * bytes;
      for (int d = 0; d < bytes; d += W) {
        const F sum = __builtin_convertvector(load<I>(sums + j * places + d), F);
        const F x = fma(sum, splat(1.0f / plane_factor<width>), half) * factor;
        store_first(to + d, x, std::min(W, bytes - d));
      }
    }
  });
}

}  // namespace vllm_eigen
