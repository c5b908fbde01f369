// SPDX-License-Identifier: Apache-2.0
// The one register-blocked product behind scores, values and reconstructed keys.
//
//     c[r][lanes] += sum over u of a[r][u] * b[u][lanes]      r < MR rows, NV vectors of W lanes
//
// a is a row-major array of 32-bit units to broadcast; b is rows of cache units. Every c[r] is
// summed in the order of u alone, whatever MR and NV are: the same bits in any tiling.
#pragma once

#include "element.h"

namespace vllm_eigen {

// `last` is how many units the last vector of b really has. `fetches` asks for what lies beside
// each row of b, in case it is read next: rows too far apart for the machine to foresee it.
template <class E, int MR, int NV, bool fetches = false>
VLLM_EIGEN_INLINE void multiply(F (&c)[MR][NV], const uint32_t* a, int64_t a_stride,
                           const typename E::Storage* b, int64_t b_stride, int count,
                           int last = W) {
  F sum[MR][NV];  // a copy: the compiler keeps it in registers, an argument it would not
  VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r)
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = c[r][v];
  for (int u = 0; u < count; ++u) {
    if constexpr (fetches) {
      constexpr int bytes = NV * W * E::pack * static_cast<int>(sizeof *b);
      VLLM_EIGEN_UNROLL for (int at = bytes; at < 2 * bytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(b) + at);
    }
    typename E::Unit vectors[NV];
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV - 1; ++v) vectors[v] = E::load(b + v * W * E::pack);
    vectors[NV - 1] = E::load_first(b + (NV - 1) * W * E::pack, last);
    VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r) {
      const auto unit = E::broadcast(a[r * a_stride + u]);
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = E::dot(sum[r][v], vectors[v], unit);
    }
    b += b_stride;
  }
  VLLM_EIGEN_UNROLL for (int r = 0; r < MR; ++r)
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) c[r][v] = sum[r][v];
}

template <int N>
struct Const {
  static constexpr int value = N;
};

template <class T>
struct TypeOf {
  using type = T;
};

// After the parameters of a lambda for each_below that indexes an array of vectors.
#define VLLM_EIGEN_INLINED __attribute__((always_inline))

// Calls f(Const<0>{}) .. f(Const<N - 1>{}).
template <int N, int begin = 0, class Fn>
VLLM_EIGEN_INLINE void each_below(Fn&& f) {
  if constexpr (begin < N) {
    f(Const<begin>{});
    each_below<N, begin + 1>(f);
  }
}

// Calls f(Const<rows>{}) for run-time 1 <= rows <= MR where MR * NV accumulators fit.
template <int MR, int NV, class Fn>
VLLM_EIGEN_INLINE void with_rows(int rows, Fn&& f) {
  if constexpr (MR == 1) {
    f(Const<1>{});
  } else if constexpr (MR * NV > kAccumulators) {
    with_rows<MR - 1, NV>(rows, f);
  } else {
    if (rows == MR)
      f(Const<MR>{});
    else
      with_rows<MR - 1, NV>(rows, f);
  }
}

constexpr int kMaxRows = 6, kMaxVectors = 8;

constexpr int rows_for(int nv) {
  return kAccumulators / nv < kMaxRows ? kAccumulators / nv : kMaxRows;
}

// Splits `total` into the fewest equal parts of at most `most`; returns the part.
VLLM_EIGEN_INLINE int even_part(int total, int most) {
  const int parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

}  // namespace vllm_eigen
