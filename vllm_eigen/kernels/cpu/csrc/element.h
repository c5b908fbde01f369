// SPDX-License-Identifier: Apache-2.0
// Elements of the cache: how a block stores numbers and how W of them enter a dot product.
//
// A block is read in units. A bfloat16 unit is two numbers, since the machine multiplies them two
// by two (vdpbf16ps); the other types have one number a unit and are multiplied as floats. The
// other operand (a query, a probability, a basis) is held as 32-bit units to be broadcast.
#pragma once

#include "vec.h"

namespace vllm_eigen {

// Shared with abi.py. kCodes: latents in a few bits a number, see coded/layout.h.
enum Type : int64_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kE4m3 = 3, kE5m2 = 4, kCodes = 5 };

struct Float32;

struct Bfloat16 {
  using Storage = uint16_t;
  using Unit = I;
  // What keys are reconstructed in and kept as: bfloat16 pays only where the machine multiplies it
  // (VLLM_EIGEN_RECONSTRUCT_BF16 is for tests on other machines).
#if defined(__AVX512BF16__) || defined(VLLM_EIGEN_RECONSTRUCT_BF16)
  using Reconstructed = Bfloat16;
#else
  using Reconstructed = Float32;
#endif
  static constexpr int pack = 2;
  static constexpr float unit_value = 1.0f;

  static VLLM_EIGEN_INLINE Unit load(const Storage* p) { return vllm_eigen::load<I>(p); }
  static VLLM_EIGEN_INLINE Unit load_first(const Storage* p, int n) {
    return vllm_eigen::load_first<I>(p, n);
  }
  // W single numbers: the second of each unit is zero.
  static VLLM_EIGEN_INLINE Unit load_single(const Storage* p) {
    return __builtin_convertvector(vllm_eigen::load<H>(p), I);
  }
  static VLLM_EIGEN_INLINE Unit broadcast(uint32_t unit) { return I{} + static_cast<int32_t>(unit); }
  static VLLM_EIGEN_INLINE F dot(F sum, Unit a, Unit b) {
#if defined(__AVX512BF16__)
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = fma((F)(a << 16), (F)(b << 16), sum);
    const I high = I{} + static_cast<int32_t>(0xffff0000);
    return fma((F)(a & high), (F)(b & high), sum);
#endif
  }
  static VLLM_EIGEN_INLINE F widen(const Storage* p) { return float_of_bf16(vllm_eigen::load<H>(p)); }
  static VLLM_EIGEN_INLINE void narrow(F v, Storage* p) { store(p, bf16_of_float(v)); }
  // Reconstructed keys: x and y, the two dimensions of a RoPE pair, become one unit.
  static VLLM_EIGEN_INLINE void store_pair(F x, F y, Storage* p, int64_t) {
#if defined(__AVX512BF16__)
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);  // x's, then y's
    const I order = iota() | ((iota() + W) << 16);
    store(p, (I)_mm512_permutexvar_epi16((__m512i)order, both));
    return;
#endif
    const I low = __builtin_convertvector(bf16_of_float(x), I);
    const I high = __builtin_convertvector(bf16_of_float(y), I);
    store(p, low | (high << 16));
  }
};

// Types that are widened to float: Derived gives Storage, widen and narrow.
template <class Stored>
struct Widened {
  using Unit = F;
  static constexpr int pack = 1;
  static VLLM_EIGEN_INLINE Unit broadcast(uint32_t unit) {
    float x;
    std::memcpy(&x, &unit, 4);
    return splat(x);
  }
  static VLLM_EIGEN_INLINE F dot(F sum, F a, F b) { return fma(a, b, sum); }
};

struct Float32 : Widened<float> {
  using Storage = float;
  using Reconstructed = Float32;
  static constexpr float unit_value = 1.0f;
  static VLLM_EIGEN_INLINE F load(const Storage* p) { return vllm_eigen::load<F>(p); }
  static VLLM_EIGEN_INLINE F load_first(const Storage* p, int n) { return vllm_eigen::load_first<F>(p, n); }
  static VLLM_EIGEN_INLINE F load_single(const Storage* p) { return load(p); }
  static VLLM_EIGEN_INLINE F widen(const Storage* p) { return load(p); }
  static VLLM_EIGEN_INLINE void narrow(F v, Storage* p) { store(p, v); }
  static VLLM_EIGEN_INLINE void store_pair(F x, F y, Storage* p, int64_t stride) {
    store(p, x);
    store(p + stride, y);
  }
};

struct Float16 : Widened<uint16_t> {
  using Storage = uint16_t;
  using Reconstructed = Float32;
  static constexpr float unit_value = 1.0f;
  static VLLM_EIGEN_INLINE F load(const Storage* p) { return float_of_half(vllm_eigen::load<H>(p)); }
  static VLLM_EIGEN_INLINE F load_first(const Storage* p, int n) {
    return float_of_half(vllm_eigen::load_first<H>(p, n));
  }
  static VLLM_EIGEN_INLINE F load_single(const Storage* p) { return load(p); }
  static VLLM_EIGEN_INLINE F widen(const Storage* p) { return load(p); }
  static VLLM_EIGEN_INLINE void narrow(F v, Storage* p) { store(p, half_of_float(v)); }
};

// fp8 is read through the bits of a half. e4m3 moved into a half's fields is 2^-8 of its value,
// subnormals included: `unit_value`, multiplied into the layer's scale, gives the factor back. Its
// NaN, all seven bits set, carries into the half's highest exponent bit.
template <int kMantissa>
struct Fp8 : Widened<uint8_t> {
  using Storage = uint8_t;
  using Reconstructed = Float32;
  static constexpr float unit_value = kMantissa == 3 ? 256.0f : 1.0f;
  static constexpr float largest = kMantissa == 3 ? 448.0f : 57344.0f;

  static VLLM_EIGEN_INLINE F decode(B bytes) {
    const SH wide = __builtin_convertvector(bytes, SH);
    if constexpr (kMantissa == 2) return float_of_half((H)(wide << 8));
    const SH half = (wide << 7) & static_cast<int16_t>(0xbfff);
    return float_of_half((H)(half | (((half & 0x3f80) + 0x80) & 0x4000)));
  }
  static VLLM_EIGEN_INLINE F load(const Storage* p) { return decode(vllm_eigen::load<B>(p)); }
  static VLLM_EIGEN_INLINE F load_first(const Storage* p, int n) {
    return decode(vllm_eigen::load_first<B>(p, n));
  }
  static VLLM_EIGEN_INLINE F load_single(const Storage* p) { return load(p); }

  // Round to nearest even, saturating: drop mantissa bits of the float, or, for subnormals, let
  // an addition round.
  static VLLM_EIGEN_INLINE void narrow(F v, Storage* p) {
    constexpr int drop = 23 - kMantissa;
    constexpr int bias = kMantissa == 3 ? 7 : 15;
    constexpr int32_t smallest_normal = (127 - bias + 1) << 23;
    constexpr int32_t adder = smallest_normal + (drop << 23);
    const I bits = (I)v;
    const I sign = (bits >> 24) & 0x80;
    F a = (F)(bits & 0x7fffffff);
    const I is_nan = (I)a > 0x7f800000;
    a = select(a < largest, a, splat(largest));
    const I subnormal = (I)(a + (F)(I{} + adder)) - adder;
    const I even = ((I)a >> drop) & 1;
    const I normal = (((I)a + ((1 << (drop - 1)) - 1) + even) >> drop)
                     - ((127 - bias) << kMantissa);
    const I finite = (I)a < smallest_normal ? subnormal : normal;
    const I code = sign | (is_nan ? (I{} + 0x7f) : finite);
    store(p, __builtin_convertvector(code, B));
  }
};

// n numbers as the 32-bit units that meet a cache of E.
template <class E>
VLLM_EIGEN_INLINE void put_query(F x, uint32_t* to, int n) {
  if constexpr (E::pack == 2) {
    const H h = bf16_of_float(x);
    std::memcpy(to, &h, 2 * n);
  } else {
    std::memcpy(to, &x, 4 * n);
  }
}

// W numbers of a run-time type (queries, new keys, outputs), n of them present.
VLLM_EIGEN_INLINE F widen_first(Type type, const void* base, int64_t at, int n) {
  switch (type) {
    case kBfloat16:
      return float_of_bf16(load_first<H>(static_cast<const uint16_t*>(base) + at, n));
    case kFloat16:
      return float_of_half(load_first<H>(static_cast<const uint16_t*>(base) + at, n));
    default:
      return load_first<F>(static_cast<const float*>(base) + at, n);
  }
}

VLLM_EIGEN_INLINE void narrow_first(Type type, F v, void* base, int64_t at, int n) {
  if (type == kFloat32) {
    std::memcpy(static_cast<float*>(base) + at, &v, n * sizeof(float));
    return;
  }
  const H h = type == kBfloat16 ? bf16_of_float(v) : half_of_float(v);
  std::memcpy(static_cast<uint16_t*>(base) + at, &h, n * sizeof(uint16_t));
}

}  // namespace vllm_eigen
