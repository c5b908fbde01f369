// SPDX-License-Identifier: Apache-2.0
// Products of a few query rows with one KV chunk: scores with its keys, probabilities with its
// values.
//
// A KV chunk is kKvChunk tokens from a multiple of kKvChunk. A row's result depends on its query,
// its bounds and the chunk alone: on no other row, no tiling, no thread.
#pragma once

#include <algorithm>

#include "amx.h"
#include "multiply.h"
#include "plain/block.h"
#include "softmax.h"

namespace vllm_eigen {

constexpr int kKvChunk = 256;
constexpr int kAlign = 16;     // runs of tokens inside a block start and end at multiples of this
// Query rows that share a pass over the keys: they fit L1 and fill registers or tiles.
constexpr int kTileRows = kHasTiles ? 2 * kTile : 24;
// Rows of a left operand past the last: they are read, and what they give is not used.
constexpr int kUnusedRows = kHasTiles ? kTile - 1 : 0;

// Where K of some consecutive tokens lies: a block, or a buffer of reconstructed keys.
template <class E>
struct KeyRun {
  const typename E::Storage* first;   // unit row 0 at the first token
  const typename E::Storage* single;  // the odd last dimension, or null
  int64_t stride;                     // from unit row to unit row
  int units;                          // full unit rows
  int tokens;                         // multiple of kAlign
  const void* scales = nullptr;       // bfloat16 factors of the tokens, or null
};

// scores[row][t] = query row . key t, rows of kKvChunk.
template <class E>
void score_run(const uint32_t* queries, int64_t query_stride, int rows, const KeyRun<E>& keys,
               float* scores) {
  const auto tile = [&](auto vectors, int t, int most_rows) {
    constexpr int NV = decltype(vectors)::value;
    const int step = even_part(rows, most_rows);
    for (int r = 0; r < rows; r += step) {
      with_rows<rows_for(NV), NV>(std::min(step, rows - r), [&](auto count) {
        constexpr int MR = decltype(count)::value;
        F c[MR][NV] = {};
        const uint32_t* q = queries + r * query_stride;
        multiply<E, MR, NV, true>(c, q, query_stride, keys.first + t * E::pack, keys.stride,
                                  keys.units);
        VLLM_EIGEN_UNROLL for (int i = 0; i < MR; ++i) {
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
            if (keys.single)
              c[i][v] = E::dot(c[i][v], E::load_single(keys.single + t + v * W),
                               E::broadcast(q[i * query_stride + keys.units]));
            store(scores + (r + i) * kKvChunk + t + v * W, c[i][v]);
          }
        }
      });
    }
  };
  constexpr int wide = kAccumulators / 3, narrow = kAccumulators / 6;
  int t = 0;
  if (rows <= 3)
    for (; t + wide * W <= keys.tokens; t += wide * W) tile(Const<wide>{}, t, rows_for(wide));
  for (; t + narrow * W <= keys.tokens; t += narrow * W)
    tile(Const<narrow>{}, t, rows_for(narrow));
  for (; t < keys.tokens; t += W) tile(Const<1>{}, t, rows_for(1));
}

// The same on matrix units where the machine has them, for keys of bfloat16 without a single
// dimension. Every row is computed so, whatever `rows` is: its bits depend on itself alone. Queries
// of up to 16 rows past the last are read.
template <class E>
void score_run_tiles(const uint32_t* queries, int64_t query_stride, int rows,
                     const KeyRun<E>& keys, float* scores) {
#if defined(__AMX_INT8__)
  if constexpr (E::pack == 2) {
    const int units = keys.units / kTile * kTile;
    TileSums sums;
    for (int r = 0; r < rows; r += 2 * kTile) {
      const uint32_t* first = queries + r * query_stride;
      for (int t = 0; t < keys.tokens; t += kTileColumns) {
        const auto* right = reinterpret_cast<const uint32_t*>(keys.first) + t;
        multiply_tiles<Bfloat16Pairs>(first, query_stride, rows - r > kTile, right, keys.stride / 2,
                                      units, sums);
        const int vectors = std::min(kTileColumns, keys.tokens - t) / W;
        for (int i = 0; i < std::min(2 * kTile, rows - r); ++i) {
          for (int v = 0; v < vectors; ++v) {
            F c[1][1] = {{sums.row<F>(i, v)}};
            multiply<E, 1, 1>(c, first + i * query_stride + units, query_stride,
                              keys.first + units * keys.stride + (t + v * W) * E::pack,
                              keys.stride, keys.units - units);
            store(scores + (r + i) * kKvChunk + t + v * W, c[0][0]);
          }
        }
      }
    }
    return;
  }
#endif
  score_run<E>(queries, query_stride, rows, keys, scores);
}

// acc[row][d] += sum of probs[row][unit] * values[unit][d] over `units` token units; rows of
// `padded` (rank_v rounded up to W).
template <class E>
void add_values(const uint32_t* probs, int64_t probs_stride, int rows,
                const typename E::Storage* values, int64_t stride, int units, int rank_v,
                float* acc, int padded) {
  // As wide as all rows fit, so that values are widened once: more than 4 rows take several passes.
  const int widest = std::min(kMaxVectors, kAccumulators / std::clamp(rows, 1, 4));
  const int vectors = padded / W;
  const int nv = even_part(vectors, widest);
  const auto columns = [&](auto count, int v0) {
    constexpr int NV = decltype(count)::value;
    const int step = even_part(rows, rows_for(NV));
    const int last = std::min(W, rank_v - (v0 + NV - 1) * W);
    for (int r = 0; r < rows; r += step) {
      with_rows<rows_for(NV), NV>(std::min(step, rows - r), [&](auto rows_here) {
        constexpr int MR = decltype(rows_here)::value;
        float* to = acc + r * padded + v0 * W;
        F c[MR][NV];
        VLLM_EIGEN_UNROLL for (int i = 0; i < MR; ++i)
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) c[i][v] = load<F>(to + i * padded + v * W);
        multiply<E, MR, NV>(c, probs + r * probs_stride, probs_stride,
                            values + v0 * W * E::pack, stride, units, last);
        VLLM_EIGEN_UNROLL for (int i = 0; i < MR; ++i)
          VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) store(to + i * padded + v * W, c[i][v]);
      });
    }
  };
  for (int v0 = 0; v0 < vectors; v0 += nv) {
    switch (std::min(nv, vectors - v0)) {
      case 1: columns(Const<1>{}, v0); break;
      case 2: columns(Const<2>{}, v0); break;
      case 3: columns(Const<3>{}, v0); break;
      case 4: columns(Const<4>{}, v0); break;
      case 5: columns(Const<5>{}, v0); break;
      case 6: columns(Const<6>{}, v0); break;
      case 7: columns(Const<7>{}, v0); break;
      case 8: columns(Const<8>{}, v0); break;
    }
  }
}

// add_values over tokens [begin, end) of the chunk; `token_in_block` is where `begin` lies. Of a
// unit that only half belongs to the range the other half is taken as zero: it may be memory
// that was never written. `edge` holds one row of values.
template <class E>
void add_value_run(const uint32_t* probs, int rows, const BlockLayout<E>& layout,
                   const typename E::Storage* block, int token_in_block, int begin, int end,
                   float* acc, int padded, typename E::Storage* edge) {
  constexpr int kUnits = kKvChunk / E::pack;  // of a row of probs
  const auto half_unit = [&](int token, int kept) {
    const auto* row = layout.values(block, token_in_block + token - begin);
    for (int d = 0; d < layout.rank_v; ++d) {
      edge[2 * d + kept] = row[2 * d + kept];
      edge[2 * d + 1 - kept] = 0;
    }
    add_values<E>(probs + token / 2, kUnits, rows, edge, layout.value_stride(), 1,
                  layout.rank_v, acc, padded);
  };
  int first = begin, last = end;
  if constexpr (E::pack == 2) {
    if (first % 2 != 0) half_unit(first++, 1);
    last -= last % 2;
  }
  if (first < last)
    add_values<E>(probs + first / E::pack, kUnits, rows,
                  layout.values(block, token_in_block + first - begin), layout.value_stride(),
                  (last - first) / E::pack, layout.rank_v, acc, padded);
  if (E::pack == 2 && last < end && last >= first) half_unit(last, 0);
}

}  // namespace vllm_eigen
