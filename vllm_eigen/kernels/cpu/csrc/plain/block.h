// SPDX-License-Identifier: Apache-2.0
// One head's part of a cache block: block_size tokens, `rank_k + rank_v` numbers each, contiguous.
//
// K lies first, as rows of units: row u holds dimensions (2u, 2u+1) of every token for bfloat16
// (dimension u for the other types), so W tokens are one load and a dot product needs no sum
// across lanes. With an odd bfloat16 rank the last dimension is a row of single numbers.
// V follows as rows of token units: row t holds tokens (2t, 2t+1) (or token t) for all
// dimensions, so W dimensions are one load.
#pragma once

#include <cstdint>

namespace vllm_eigen {

template <class E>
struct BlockLayout {
  int block_size, rank_k, rank_v;

  int full_units() const { return rank_k / E::pack; }
  bool has_single() const { return rank_k % E::pack != 0; }
  int64_t key_stride() const { return static_cast<int64_t>(block_size) * E::pack; }
  int64_t value_stride() const { return static_cast<int64_t>(rank_v) * E::pack; }

  // First unit of row `u` at `token`.
  template <class P>
  P keys(P block, int u, int token) const {
    return block + u * key_stride() + static_cast<int64_t>(token) * E::pack;
  }
  template <class P>
  P single(P block, int token) const {
    return block + full_units() * key_stride() + token;
  }
  // Row of the unit that holds `token`.
  template <class P>
  P values(P block, int token) const {
    return block + static_cast<int64_t>(block_size) * rank_k + token / E::pack * value_stride();
  }

  int64_t key_at(int d, int token) const {
    if (E::pack == 2 && d == rank_k - 1 && has_single())
      return full_units() * key_stride() + token;
    return d / E::pack * key_stride() + static_cast<int64_t>(token) * E::pack + d % E::pack;
  }
  int64_t value_at(int d, int token) const {
    return static_cast<int64_t>(block_size) * rank_k + token / E::pack * value_stride()
           + static_cast<int64_t>(d) * E::pack + token % E::pack;
  }
};

}  // namespace vllm_eigen
