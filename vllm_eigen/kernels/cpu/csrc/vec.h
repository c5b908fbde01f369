// SPDX-License-Identifier: Apache-2.0
// Vectors of the machine: the only file that knows instruction sets.
//
// W floats are handled at once, as GCC vector extensions, so one source serves AVX-512 (W = 16),
// AVX2 and everything else (W = 8, which the compiler splits where registers are narrower).
// Intrinsics appear only where plain C++ has no word for the instruction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VLLM_EIGEN_INLINE inline __attribute__((always_inline))
#define VLLM_EIGEN_UNROLL _Pragma("GCC unroll 8")

namespace vllm_eigen {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kAccumulators = 24;  // of 32 registers; the rest hold operands
#else
constexpr int W = 8;
constexpr int kAccumulators = 12;  // of 16
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int16_t SH __attribute__((vector_size(2 * W)));
typedef int8_t B __attribute__((vector_size(W)));

template <class V>
VLLM_EIGEN_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
VLLM_EIGEN_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n of a vector's W elements, zeros behind; memory past them is not touched.
template <class V>
VLLM_EIGEN_INLINE V load_first(const void* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi32(mask, p);
  if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_epi16(mask, p);
  if constexpr (sizeof(V) == 16) return (V)_mm_maskz_loadu_epi8(mask, p);
#else
  if (n == W) return load<V>(p);
  V v = {};
  std::memcpy(&v, p, n * (sizeof(V) / W));
  return v;
#endif
}

// The first n of W floats.
VLLM_EIGEN_INLINE void store_first(float* p, F v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  if (n == W)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(float));
#endif
}

// Not F{} + x: that would turn -0 into 0, so the compiler could not drop the addition.
VLLM_EIGEN_INLINE F splat(float x) { return x - F{}; }

// a * b + c. The compiler is told not to fuse on its own (build.py): which of two products it
// would fuse may differ from place to place, and with it the last bit.
VLLM_EIGEN_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

VLLM_EIGEN_INLINE I iota() {
  I v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

VLLM_EIGEN_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }

VLLM_EIGEN_INLINE float max_of(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

VLLM_EIGEN_INLINE float sum_of(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < W; ++i) s += v[i];
  return s;
#endif
}

// Whether none of n numbers, a multiple of W, is infinite or NaN.
inline bool is_finite(const float* x, int64_t n) {
  F sum{};
  for (int64_t i = 0; i < n; i += W) sum = sum + load<F>(x + i) * 0.0f;
  return sum_of(sum) == 0.0f;
}

VLLM_EIGEN_INLINE F max(F a, F b) { return a > b ? a : b; }

// A number that is not negative, or the NaN that survives rounding its bits.
VLLM_EIGEN_INLINE F plain_nan(F x) {
  const U nan = U{} + 0x7fc00000u, bits = (U)x;
  return (F)(bits < nan ? bits : nan);
}

// 2^x to 2e-7, exactly 0 for x < -200 and x = -inf, for x <= 126; NaN of NaN.
VLLM_EIGEN_INLINE F exp2(F x) {
#if defined(__AVX512F__)
  const F bounded = max(splat(-200.0f), x);  // in this order NaN stays
  const F whole = (F)_mm512_roundscale_ps((__m512)bounded, _MM_FROUND_TO_NEAREST_INT);
  const F f = bounded - whole;  // in [-0.5, 0.5]
#else
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const I tiny = x < -126.0f;
  const F bounded = select(tiny, splat(-126.0f), x);
  const F shifted = bounded + magic;
  const F f = bounded - (shifted - magic);
#endif
  F p = splat(1.535336188319500e-4f);
  p = fma(p, f, splat(1.339887440266574e-3f));
  p = fma(p, f, splat(9.618437357674640e-3f));
  p = fma(p, f, splat(5.550332471162809e-2f));
  p = fma(p, f, splat(2.402264791363012e-1f));
  p = fma(p, f, splat(6.931472028550421e-1f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return select(tiny, F{}, (F)(((I)p + ((I)shifted << 23)) | (x != x)));
#endif
}

// Scalars need the same bits as vectors: the order in which partial results meet is promised.
VLLM_EIGEN_INLINE float exp2(float x) { return exp2(splat(x))[0]; }

VLLM_EIGEN_INLINE F tanh(F x) {
  const F bounded = max(splat(-15.0f), -max(splat(-15.0f), -x));
  return 1.0f - 2.0f / (exp2(bounded * 2.885390081777927f) + 1.0f);
}

VLLM_EIGEN_INLINE F float_of_half(H h) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#else
  // As a float the half's bits are 2^-112 of its value, subnormals included.
  const I bits = __builtin_convertvector(h, I);
  const F magnitude = (F)((bits & 0x7fff) << 13) * 5.192296858534828e33f;
  const I infinite = (bits & 0x7c00) == 0x7c00;  // or NaN
  return (F)((I)magnitude | (infinite & 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}

VLLM_EIGEN_INLINE H half_of_float(F v) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const I bits = (I)v;
  const I sign = (bits >> 16) & 0x8000;
  const F a = (F)(bits & 0x7fffffff);
  // Subnormal halves are multiples of 2^-24: let the adder round. Others round on their bits.
  const I small = (I)(a + 0.5f) - 0x3f000000;
  const I even = ((I)a >> 13) & 1;
  I normal = (((I)a + 0xfff + even) >> 13) - (112 << 10);
  normal = normal > 0x7c00 ? (I{} + 0x7c00) : normal;
  normal = (I)a > 0x7f800000 ? (I{} + 0x7e00) : normal;
  return __builtin_convertvector(sign | (a < 6.103515625e-5f ? small : normal), H);
#endif
}

VLLM_EIGEN_INLINE H bf16_of_float(F v) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)v);
#else
  const I bits = (I)v;
  const I is_nan = (bits & 0x7fffffff) > 0x7f800000;
  const I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(is_nan ? ((bits >> 16) | 0x40) : rounded, H);
#endif
}

// Of numbers whose lower 16 bits are 0.
VLLM_EIGEN_INLINE H bf16_of_rounded(F v) {
#if defined(__AVX512BF16__)
  return bf16_of_float(v);
#else
  return __builtin_convertvector((I)v >> 16, H);
#endif
}

VLLM_EIGEN_INLINE F float_of_bf16(H h) { return (F)(__builtin_convertvector(h, I) << 16); }

}  // namespace vllm_eigen
