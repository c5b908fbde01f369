// Scores of a chunk to weights, and the merge of two chunks' results.
#pragma once

#include <limits>

#include "element.h"

namespace eigen {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// One query row against a chunk. Positions count from the chunk's first token.
struct RowScores {
  float scale, soft_cap;  // soft_cap 0: none
  float slope;            // ALiBi, 0: none
  int query_at;           // position of the query, may lie behind the chunk
  int first, last;        // keys in [first, last) are seen
};

struct RowState {
  float max = kMasked;  // in units of log 2
  float sum = 0.0f;
};

// Replaces raw dot products scores[begin, end) by 2^(logit - max), as 32-bit units in `weights`
// (pairs of bfloat16 for Bfloat16); keys not seen weigh exactly 0, whatever their score holds.
// begin and end are multiples of 16.
template <class E>
EIGEN_INLINE RowState weigh(const RowScores& row, float* scores, uint32_t* weights, int begin,
                            int end) {
  const float to_log2 = row.soft_cap == 0.0f ? row.scale * kLog2e : row.scale / row.soft_cap;
  const float cap = row.soft_cap * kLog2e, slope = row.slope * kLog2e;
  F best = splat(kMasked);
  if (cap == 0.0f && slope == 0.0f && row.first <= begin && row.last >= end) {
    for (int t = begin; t < end; t += W) {
      const F x = load<F>(scores + t) * to_log2;
      best = max(best, x);
      store(scores + t, x);
    }
  } else {
    for (int t = begin; t < end; t += W) {
      const I at = iota() + t;
      F x = load<F>(scores + t) * to_log2;
      if (cap != 0.0f) x = tanh(x) * cap;
      if (slope != 0.0f) x = fma(__builtin_convertvector(at - row.query_at, F), splat(slope), x);
      x = select((at >= row.first) & (at < row.last), x, splat(kMasked));
      best = max(best, x);
      store(scores + t, x);
    }
  }
  RowState state;
  state.max = max_of(best);
  // A row that sees nothing here (or only overflow) must not turn -inf - -inf into NaN.
  const F base = splat(state.max == kMasked ? 0.0f : state.max);
  F sum{};
  for (int t = begin; t < end; t += W) {
    const F p = exp2(load<F>(scores + t) - base);
    if constexpr (E::pack == 2) {
      // Sum what the values will be multiplied by, so that rounding cannot bias the mean.
      const F rounded = (F)(((I)p + 0x8000) & static_cast<int32_t>(0xffff0000));
      store(reinterpret_cast<uint16_t*>(weights) + t, bf16_of_float(rounded));
      sum += rounded;
    } else {
      store(weights + t, p);
      sum += p;
    }
  }
  state.sum = sum_of(sum);
  return state;
}

// Left fold of chunk results, always in the order of the chunks: (total, values) += part.
// Values are [padded], a multiple of W.
EIGEN_INLINE void merge(RowState& total, float* values, const RowState& part,
                        const float* part_values, int padded) {
  if (part.max == kMasked) return;
  const float best = total.max > part.max ? total.max : part.max;
  const float factor = exp2(total.max > part.max ? part.max - best : total.max - best);
  const float keep = total.max > part.max ? 1.0f : factor;
  const float add = total.max > part.max ? factor : 1.0f;
  total.max = best;
  total.sum = total.sum * keep + part.sum * add;
  for (int d = 0; d < padded; d += W)
    store(values + d, fma(load<F>(values + d), splat(keep), load<F>(part_values + d) * add));
}

}  // namespace eigen
