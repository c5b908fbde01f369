// SPDX-License-Identifier: Apache-2.0
// Products of codes on matrix units (amx.h), for many query rows at once.
//
// The codes of a KV chunk are taken apart into bytes once, as the right operands of tiles. Left
// operands are the same 15-bit numbers as elsewhere, a row of high bytes and one of low bytes for
// each. Sums are the integers that keys.h and values.h get, so that it is of no
// consequence for a row's bits which of them computes it.
#pragma once

#include "values.h"

namespace vllm_eigen {

// Bytes of the codes of a KV chunk, each width in whole tiles. What pads a width meets numbers that
// are 0.
struct StagedCodes {
  static constexpr int kGroups = kKvChunk / kGroup;

  StagedCodes() = default;
  // Keys: rows of four directions, of kKvChunk tokens. Values: of each width [plane][group][place].
  StagedCodes(Arena& arena, const Sections& key, const Sections& value, bool has_keys) {
    int rows = 0;
    value_units = 0;
    for (int s = 0; s < kWidths; ++s) {
      first_row[s] = rows;
      rows += in_tiles(key.of[s].count / 4);
      first_value[s] = value_units;
      value_units += value.of[s].planes() * kGroups * CodedWeights::places(value.of[s]);
    }
    // The second right operand may reach past the last column.
    keys = arena.take<uint32_t>(has_keys ? rows * kKvChunk : 0);
    values = arena.take<uint32_t>(value_units + kTile);
  }

  uint32_t *keys, *values;
  int first_row[kWidths], first_value[kWidths];
  int value_units;
};

#if defined(__AMX_INT8__)
// Takes the keys of a run apart, the first of which is token `at` of the chunk.
inline void stage_keys(const CodedRun& run, int at, const StagedCodes& to) {
  const uint8_t* units = run.first;
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    uint32_t* row = to.keys + to.first_row[s] * kKvChunk + at;
    for (int u = 0; u < run.code->of[s].units(); ++u, units += run.stride) {
      for (int t = 0; t < run.tokens; t += W) {
        const U unit = load<U>(units + 4 * t);
        each_below<8 / width>([&](auto plane) {
          store_plane<width, decltype(plane)::value>(unit, row + t, kKvChunk);
        });
      }
      row += 8 / width * kKvChunk;
    }
  });
}

// Takes the values of `tokens` tokens of a block from `inside` on apart.
inline void stage_values(const CodedLayout& layout, const uint8_t* block, int inside, int at,
                         int tokens, const StagedCodes& to) {
  const int64_t stride = kGroup * static_cast<int64_t>(layout.value.code_bytes);
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    const Section& section = layout.value.of[s];
    const int bytes = section.bytes(), places = CodedWeights::places(section);
    const uint8_t* from = layout.values(block, inside) + kGroup * section.first_byte;
    uint32_t* row = to.values + to.first_value[s] + at / kGroup * places;
    for (int g = 0; g < tokens / kGroup; ++g, from += stride, row += places) {
      for (int p = 0; p < bytes; p += W) {
        const U unit = load_first<U>(from + 4 * p, std::min(W, bytes - p));
        each_below<8 / width>([&](auto plane) {
          constexpr int j = decltype(plane)::value;
          store(row + j * StagedCodes::kGroups * places + p, signed_plane<width, j>(unit).bytes);
        });
      }
    }
  });
}

// As score_codes with fine queries, of the staged keys [begin, end).
inline void score_staged(const CodedQueries& queries, const Sections& code,
                         const StagedCodes& keys, int row, int rows, int begin, int end,
                         float* scores) {
  TileSums sums;
  bool is_first = true;
  for (int s = 0; s < kWidths; ++s) {
    if (code.of[s].count == 0) continue;
    const int units = in_tiles(code.of[s].count / 4);
    for (int r = row; r < row + rows; r += kTile) {
      const int count = std::min(kTile, row + rows - r);
      for (int t = begin / kTileColumns * kTileColumns; t < end; t += kTileColumns) {
        multiply_tiles<UnsignedBytes>(queries.row(r) + queries.first[s], queries.half,
                                      2 * count > kTile,
                                      keys.keys + keys.first_row[s] * kKvChunk + t, kKvChunk,
                                      units, sums);
        for (int i = 0; i < count; ++i) {
          const auto& factors = queries.factors[r + i];
          const F scale = splat(factors.scale[s]), constant = splat(factors.constant[s]);
          VLLM_EIGEN_UNROLL for (int v = 0; v < 2; ++v) {
            const U whole = sums.row<U>(2 * i, v) * kSignedBase + sums.row<U>(2 * i + 1, v);
            const F x = __builtin_convertvector((I)(whole - factors.correction[s]), F);
            float* to = scores + (r - row + i) * kKvChunk + t + v * W;
            store(to, fma(x, scale, is_first ? constant : load<F>(to) + constant));
          }
        }
      }
    }
    is_first = false;
  }
}

// As add_codes over the whole chunk, where weights of tokens outside of the rows' bounds are 0.
inline void sum_staged(const Sections& code, const StagedCodes& values,
                       const CodedWeights& weights, int rows) {
  constexpr int kUnits = CodedWeights::kUnits;
  TileSums sums;
  for (int s = 0; s < kWidths; ++s) {
    const Section& section = code.of[s];
    const int places = CodedWeights::places(section);
    for (int j = 0; j < section.planes() && section.count > 0; ++j) {
      const uint32_t* plane =
          values.values + values.first_value[s] + j * StagedCodes::kGroups * places;
      for (int p = 0; p < places; p += kTileColumns) {
        const int vectors = std::min(kTileColumns, places - p) / W;
        for (int r = 0; r < rows; r += kTile) {
          const int count = std::min(kTile, rows - r);
          multiply_tiles<SignedBytes>(weights.row(r), kUnits, 2 * count > kTile, plane + p, places,
                                      kUnits, sums);
          for (int i = 0; i < count; ++i)
            for (int v = 0; v < vectors; ++v)
              store(weights.sums_of(r + i, s) + j * places + p + v * W,
                    sums.row<U>(2 * i, v) * kUnsignedBase + sums.row<U>(2 * i + 1, v));
        }
      }
    }
  }
}
#endif

}  // namespace vllm_eigen
