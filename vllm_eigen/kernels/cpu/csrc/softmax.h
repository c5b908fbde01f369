// SPDX-License-Identifier: Apache-2.0
// Online softmax (Milakov and Gimelshein 2018): scores of a KV chunk to probabilities, and the
// combination of two chunks' results. A NaN among the scores makes `l` NaN, whatever `m` says.
#pragma once

#include <limits>

#include "element.h"

namespace vllm_eigen {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// One query row against a KV chunk. Positions count from the chunk's first token.
struct RowScores {
  float scale, soft_cap;  // soft_cap 0: none
  float slope;            // ALiBi, 0: none
  int query_at;           // position of the query, may lie behind the chunk
  int first, last;        // keys in [first, last) are seen
};

// m: largest logit, in units of log 2; l: sum of 2^(logit - m), 0 where no key was seen.
struct SoftmaxState {
  float m = kMasked;
  float l = 0.0f;
};

// Replaces raw dot products scores[begin, end) by 2^(logit - m), as 32-bit units in `probs` (two
// numbers each for Bfloat16); keys not seen get exactly 0, whatever their score holds. begin and
// end are multiples of 16.
template <class E>
VLLM_EIGEN_INLINE SoftmaxState softmax_chunk(const RowScores& row, float* scores, uint32_t* probs,
                                             int begin, int end) {
  const float to_log2 = row.soft_cap == 0.0f ? row.scale * kLog2e : row.scale / row.soft_cap;
  const float cap = row.soft_cap * kLog2e, slope = row.slope * kLog2e;
  F largest = splat(kMasked);
  if (cap == 0.0f && slope == 0.0f && row.first <= begin && row.last >= end) {
    for (int t = begin; t < end; t += W) {
      const F x = load<F>(scores + t) * to_log2;
      largest = max(largest, x);
      store(scores + t, x);
    }
  } else {
    for (int t = begin; t < end; t += W) {
      const I at = iota() + t;
      F x = load<F>(scores + t) * to_log2;
      if (cap != 0.0f) x = tanh(x) * cap;
      if (slope != 0.0f) x = fma(__builtin_convertvector(at - row.query_at, F), splat(slope), x);
      x = select((at >= row.first) & (at < row.last), x, splat(kMasked));
      largest = max(largest, x);
      store(scores + t, x);
    }
  }
  SoftmaxState state;
  state.m = max_of(largest);
  // A row that sees nothing here (or only overflow) must not turn -inf - -inf into NaN.
  const F base = splat(state.m == kMasked ? 0.0f : state.m);
  F l{};
  for (int t = begin; t < end; t += W) {
    const F p = exp2(load<F>(scores + t) - base);
    if constexpr (E::pack == 2) {
      // Sum what the values will be multiplied by, so that rounding cannot bias the mean.
      const I bits = (I)plain_nan(p) + 0x8000;
      const F rounded = (F)(bits & static_cast<int32_t>(0xffff0000));
      store(reinterpret_cast<uint16_t*>(probs) + t, bf16_of_rounded(rounded));
      l += rounded;
    } else {
      store(probs + t, p);
      l += p;
    }
  }
  state.l = sum_of(l);
  return state;
}

// (state, acc) += partial result of a KV chunk, always in the order of the chunks. acc is
// [padded], a multiple of W.
VLLM_EIGEN_INLINE void combine(SoftmaxState& state, float* acc, const SoftmaxState& partial,
                               const float* partial_acc, int padded) {
  if (partial.l == 0.0f) return;
  const bool is_older_larger = state.m > partial.m;
  const float m = is_older_larger ? state.m : partial.m;
  const float factor = exp2((is_older_larger ? partial.m : state.m) - m);
  const float alpha = is_older_larger ? 1.0f : factor;
  const float partial_alpha = is_older_larger ? factor : 1.0f;
  state.m = m;
  state.l = state.l * alpha + partial.l * partial_alpha;
  for (int d = 0; d < padded; d += W)
    store(acc + d,
          fma(load<F>(acc + d), splat(alpha), load<F>(partial_acc + d) * partial_alpha));
}

}  // namespace vllm_eigen
