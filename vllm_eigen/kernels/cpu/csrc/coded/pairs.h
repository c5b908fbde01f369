// SPDX-License-Identifier: Apache-2.0
// Rows of numbers times codes where bytes are multiplied two by two into 16 bits: AVX2, and AVX-512
// without VNNI.
//
// Two products of 4-bit codes with 8-bit numbers are at most 2 * 15 * 127, so eight such sums fit
// 16 bits before they are widened. Codes of 8 bits meet numbers of 15: both are 16-bit halves,
// the codes less 128, half a step below what they stand for, so that sums of kMostCodes fit 32 bits.
#pragma once

#include "../multiply.h"
#include "integer.h"

namespace vllm_eigen {

#if defined(__AVX2__)
constexpr int kShortSums = 32767 / (2 * 15 * kLargestByte);

// sums[r][v] += codes of at most 4 bits times numbers of 8, over `count` units.
template <int R, int NV>
VLLM_EIGEN_INLINE void multiply_few_bits(U (&sums)[R][NV], const uint32_t* rows, int64_t row_stride,
                                         const uint32_t* codes, int64_t stride, int count) {
  for (int first = 0; first < count; first += kShortSums) {
    U c[R * NV];
    // Calls f(index of a sum, its codes, its numbers) for all sums. Not loops: inside of others gcc
    // would unroll them too late to keep the sums in registers.
    const auto each_product = [&](int u, auto&& f) VLLM_EIGEN_INLINED {
      U vectors[NV];
      each_below<NV>([&](auto v) VLLM_EIGEN_INLINED {
        vectors[v.value] = load<U>(codes + v.value * W);
      });
      codes += stride;
      each_below<R>([&](auto r) VLLM_EIGEN_INLINED {
        const U numbers = U{} + rows[r.value * row_stride + u];
        each_below<NV>([&](auto v) VLLM_EIGEN_INLINED {
          f(Const<r.value * NV + v.value>{}, vectors[v.value], numbers);
        });
      });
    };
    each_product(first, [&](auto i, U bytes, U numbers) VLLM_EIGEN_INLINED {
      c[i.value] = multiply_byte_pairs(bytes, numbers);
    });
    const int end = first + kShortSums < count ? first + kShortSums : count;
    for (int u = first + 1; u < end; ++u)
      each_product(u, [&](auto i, U bytes, U numbers) VLLM_EIGEN_INLINED {
        add_byte_pairs(c[i.value], bytes, numbers);
      });
    each_below<R * NV>([&](auto i) VLLM_EIGEN_INLINED {
      U& sum = sums[i.value / NV][i.value % NV];
      sum = sum + multiply_pairs(c[i.value], U{} + 0x00010001u);
    });
  }
}

// Codes of 8 bits less 128 as 16-bit halves: bytes 0 and 2 in a row, 1 and 3 `stride` behind.
VLLM_EIGEN_INLINE void store_halves(U unit, uint32_t* row, int64_t stride) {
  const U codes = unit ^ 0x80808080u;
  store(row, sign_extend_pairs<8, 8>(codes));
  store(row + stride, sign_extend_pairs<0, 8>(codes));
}
#endif

}  // namespace vllm_eigen
