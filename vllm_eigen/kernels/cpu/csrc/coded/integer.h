// SPDX-License-Identifier: Apache-2.0
// Products of packed codes with 15-bit integers, four codes a 32-bit lane. Like vec.h this file
// knows instruction sets; every level gives the same integers.
//
// A unit is 32 bits: 32 / width codes of one width. Taken apart it gives planes of four codes, one
// in each byte: plane j holds bits [j * width, (j + 1) * width) of every byte. What a plane meets,
// four numbers of 15 bits, is a pair of 32-bit units to be broadcast: their high and their low bytes
// for VNNI, which multiplies bytes; otherwise numbers 0 and 2, then 1 and 3, as 16-bit halves.
#pragma once

#include "../vec.h"

namespace vllm_eigen {

#if defined(__AVX512VNNI__)
constexpr int kSums = 2;  // of a product: what high and low bytes give
struct Plane {
  U bytes;
};
#else
constexpr int kSums = 1;
struct Plane {
  U even, odd;  // bytes 0 and 2, bytes 1 and 3, as 16-bit numbers
};
#endif

// Whether keys are reconstructed, and absorbed queries scored, as products of bytes: VNNI adds up four
// of them, earlier machines two.
#if defined(__AVX512VNNI__)
constexpr bool kMultipliesBytes = true, kInPairs = false;
#elif defined(__AVX2__)
constexpr bool kMultipliesBytes = true, kInPairs = true;
#else
constexpr bool kMultipliesBytes = false, kInPairs = false;
#endif

// In whole turns (of what a byte can hold) a high byte counts so much.
constexpr int kSignedBase = 128, kUnsignedBase = 256;
constexpr int kLargestByte = 127;
constexpr int kLargestSigned = kLargestByte * kSignedBase;  // low bytes in [-64, 63]
constexpr int kLargestUnsigned = kLargestByte * kUnsignedBase + 255;  // 15 bits on every level

constexpr int32_t bytes_of(int byte) {
  return static_cast<int32_t>(static_cast<uint32_t>(byte) * 0x01010101u);
}

// W 16-bit pairs: low * low + high * high.
VLLM_EIGEN_INLINE U multiply_pairs(U a, U b) {
#if defined(__AVX512BW__)
  return (U)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const I low = ((I)(a << 16) >> 16) * ((I)(b << 16) >> 16);
  return (U)low + (U)(((I)a >> 16) * ((I)b >> 16));
#endif
}

#if defined(__AVX2__)
// 4 W unsigned bytes times signed ones, two by two: 16-bit halves.
VLLM_EIGEN_INLINE U multiply_byte_pairs(U bytes, U numbers) {
#if defined(__AVX512BW__)
  return (U)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)numbers);
#else
  return (U)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)numbers);
#endif
}

// sums += the same.
VLLM_EIGEN_INLINE void add_byte_pairs(U& sums, U bytes, U numbers) {
  U pairs;
  // Not the intrinsics: with them gcc makes all products first, for which it lacks registers.
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
      : "+v"(sums), "=&v"(pairs)
      : "v"(numbers), "v"(bytes));
}
#endif

// sum += four unsigned bytes times signed ones with VNNI, otherwise two 16-bit halves times others.
VLLM_EIGEN_INLINE void add_products(U& sum, U codes, U numbers) {
#if defined(__AVX512VNNI__)
  // Not the intrinsic: with it gcc moves sums to the stack and back in every turn.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(numbers));
#else
  sum = sum + multiply_pairs(codes, numbers);
#endif
}

// sums[r][v] += codes times numbers, as add_products has them, over `count` units.
template <int R, int NV>
VLLM_EIGEN_INLINE void multiply_units(U (&sums)[R][NV], const uint32_t* rows, int64_t row_stride,
                                      const uint32_t* codes, int64_t stride, int count) {
  U c[R][NV];  // a copy, as in multiply.h
  VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r)
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) c[r][v] = sums[r][v];
  for (int u = 0; u < count; ++u, codes += stride) {
    U vectors[NV];
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) vectors[v] = load<U>(codes + v * W);
    VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r) {
      const U numbers = U{} + rows[r * row_stride + u];
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) add_products(c[r][v], vectors[v], numbers);
    }
  }
  VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r)
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = c[r][v];
}

// 16-bit halves shifted left, then right with their sign.
template <int left, int right>
VLLM_EIGEN_INLINE U sign_extend_pairs(U x) {
#if defined(__AVX512BW__)
  return (U)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, left), right);
#elif defined(__AVX2__)
  return (U)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, left), right);
#else
  const I low = (I)(x << (16 + left)) >> (16 + right);
  const I high = (I)(x << left) >> (16 + right);
  return ((U)low & 0xffffu) | ((U)high << 16);
#endif
}

// Plane j of units as bytes, of codes stored with an offset, 0 .. 2^width - 1.
template <int width, int j>
VLLM_EIGEN_INLINE U byte_plane(U unit) {
  constexpr uint32_t mask = (1u << width) - 1;
  return (unit >> (j * width)) & (mask * 0x01010101u);
}

// The same, as products with 15-bit integers read it.
template <int width, int j>
VLLM_EIGEN_INLINE Plane unsigned_plane(U unit) {
#if defined(__AVX512VNNI__)
  return {byte_plane<width, j>(unit)};
#else
  constexpr uint32_t mask = (1u << width) - 1;
  return {(unit >> (j * width)) & (mask * 0x00010001u),
          (unit >> (8 + j * width)) & (mask * 0x00010001u)};
#endif
}

// Plane j of units of two's complement codes, times plane_factor<width>.
template <int width, int j>
VLLM_EIGEN_INLINE Plane signed_plane(U unit) {
#if defined(__AVX512VNNI__)
  constexpr uint32_t mask = (0xff00u >> width) & 0xff;
  return {(unit << (8 - (j + 1) * width)) & (mask * 0x01010101u)};
#else
  return {sign_extend_pairs<16 - (j + 1) * width, 16 - width>(unit),
          sign_extend_pairs<8 - (j + 1) * width, 16 - width>(unit)};
#endif
}

#if defined(__AVX512VNNI__)
template <int width>
constexpr float plane_factor = 1 << (8 - width);
#else
template <int width>
constexpr float plane_factor = 1;
#endif

// sums += unsigned codes times signed numbers (`first` and `second` as put_signed leaves them).
VLLM_EIGEN_INLINE void add_unsigned(U (&sums)[kSums], const Plane& codes, uint32_t first,
                                    uint32_t second) {
#if defined(__AVX512VNNI__)
  const auto bytes = (__m512i)codes.bytes;
  sums[0] = (U)_mm512_dpbusd_epi32((__m512i)sums[0], bytes, (__m512i)(U{} + first));
  sums[1] = (U)_mm512_dpbusd_epi32((__m512i)sums[1], bytes, (__m512i)(U{} + second));
#else
  sums[0] = sums[0] + multiply_pairs(codes.even, U{} + first);
  sums[0] = sums[0] + multiply_pairs(codes.odd, U{} + second);
#endif
}

#if defined(__AVX512VNNI__)
// The same of numbers of 8 bits alone.
VLLM_EIGEN_INLINE void add_unsigned_bytes(U& sum, const Plane& codes, uint32_t numbers) {
  sum = (U)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes.bytes, (__m512i)(U{} + numbers));
}
#endif

// sums += signed codes times unsigned numbers (put_unsigned).
VLLM_EIGEN_INLINE void add_signed(U (&sums)[kSums], const Plane& codes, uint32_t first,
                                  uint32_t second) {
#if defined(__AVX512VNNI__)
  const auto bytes = (__m512i)codes.bytes;
  sums[0] = (U)_mm512_dpbusd_epi32((__m512i)sums[0], (__m512i)(U{} + first), bytes);
  sums[1] = (U)_mm512_dpbusd_epi32((__m512i)sums[1], (__m512i)(U{} + second), bytes);
#else
  add_unsigned(sums, codes, first, second);
#endif
}

// The whole product; `base` is that of the numbers.
template <int base>
VLLM_EIGEN_INLINE U total(const U (&sums)[kSums]) {
  if constexpr (kSums == 2) return sums[0] * base + sums[kSums - 1];
  return sums[0];
}

// W numbers as broadcast units, W / 4 in `first` and `second` each: byte 0 or half 0 the first.
template <int base>
VLLM_EIGEN_INLINE void put_numbers(I x, uint32_t* first, uint32_t* second) {
#if defined(__AVX512VNNI__)
  const I high = base == kSignedBase ? (x + base / 2) >> 7 : x >> 8;
  store(first, __builtin_convertvector(high, B));
  store(second, __builtin_convertvector(x - high * base, B));
#else
  uint32_t numbers[W];
  store(numbers, (U)x & 0xffffu);
  for (int i = 0; i < W / 4; ++i) {
    first[i] = numbers[4 * i] | (numbers[4 * i + 2] << 16);
    second[i] = numbers[4 * i + 1] | (numbers[4 * i + 3] << 16);
  }
#endif
}

// To the nearest integer, halves to even, for |x| < 2^22.
VLLM_EIGEN_INLINE I nearest(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23
  return (I)(x + magic) - (I)magic;
}

}  // namespace vllm_eigen
