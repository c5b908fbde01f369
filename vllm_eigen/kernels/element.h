// Elements of the cache: how a page stores numbers and how W of them meet a dot product.
//
// A page is read in units. A bfloat16 unit is a pair of numbers, since the machine multiplies
// pairs (vdpbf16ps); the other types have one number a unit and are multiplied as floats. The
// other operand (a query, a weight, a basis) is held as 32-bit units to be broadcast.
#pragma once

#include "vec.h"

namespace eigen {

// Codes shared with cpu.py.
enum Type : int64_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kE4m3 = 3, kE5m2 = 4 };

struct Float32;

struct Bfloat16 {
  using Storage = uint16_t;
  using Unit = I;
  // What latents are rebuilt in and keys kept as: pairs pay only where the machine multiplies them
  // (EIGEN_REBUILD_PAIRS is for tests on other machines).
#if defined(__AVX512BF16__) || defined(EIGEN_REBUILD_PAIRS)
  using Rebuilt = Bfloat16;
#else
  using Rebuilt = Float32;
#endif
  static constexpr int pack = 2;
  static constexpr float unit_value = 1.0f;

  static EIGEN_INLINE Unit load(const Storage* p) { return eigen::load<I>(p); }
  static EIGEN_INLINE Unit load_first(const Storage* p, int n) {
    return eigen::load_first<I>(p, n);
  }
  // W single numbers: the second of each pair is zero.
  static EIGEN_INLINE Unit load_single(const Storage* p) {
    return __builtin_convertvector(eigen::load<H>(p), I);
  }
  static EIGEN_INLINE Unit broadcast(uint32_t unit) { return I{} + static_cast<int32_t>(unit); }
  static EIGEN_INLINE F dot(F sum, Unit a, Unit b) {
#if defined(__AVX512BF16__)
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = fma((F)(a << 16), (F)(b << 16), sum);
    const I high = I{} + static_cast<int32_t>(0xffff0000);
    return fma((F)(a & high), (F)(b & high), sum);
#endif
  }
  static EIGEN_INLINE F widen(const Storage* p) { return float_of_bf16(eigen::load<H>(p)); }
  static EIGEN_INLINE void narrow(F v, Storage* p) { store(p, bf16_of_float(v)); }
  // Rebuilt keys: x and y, the two coordinates of a plane, become the pair of a unit.
  static EIGEN_INLINE void store_plane(F x, F y, Storage* p, int64_t) {
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
  static EIGEN_INLINE Unit broadcast(uint32_t unit) {
    float x;
    std::memcpy(&x, &unit, 4);
    return splat(x);
  }
  static EIGEN_INLINE F dot(F sum, F a, F b) { return fma(a, b, sum); }
};

struct Float32 : Widened<float> {
  using Storage = float;
  using Rebuilt = Float32;
  static constexpr float unit_value = 1.0f;
  static EIGEN_INLINE F load(const Storage* p) { return eigen::load<F>(p); }
  static EIGEN_INLINE F load_first(const Storage* p, int n) { return eigen::load_first<F>(p, n); }
  static EIGEN_INLINE F load_single(const Storage* p) { return load(p); }
  static EIGEN_INLINE F widen(const Storage* p) { return load(p); }
  static EIGEN_INLINE void narrow(F v, Storage* p) { store(p, v); }
  static EIGEN_INLINE void store_plane(F x, F y, Storage* p, int64_t stride) {
    store(p, x);
    store(p + stride, y);
  }
};

struct Float16 : Widened<uint16_t> {
  using Storage = uint16_t;
  using Rebuilt = Float32;
  static constexpr float unit_value = 1.0f;
  static EIGEN_INLINE F load(const Storage* p) { return float_of_half(eigen::load<H>(p)); }
  static EIGEN_INLINE F load_first(const Storage* p, int n) {
    return float_of_half(eigen::load_first<H>(p, n));
  }
  static EIGEN_INLINE F load_single(const Storage* p) { return load(p); }
  static EIGEN_INLINE F widen(const Storage* p) { return load(p); }
  static EIGEN_INLINE void narrow(F v, Storage* p) { store(p, half_of_float(v)); }
};

// fp8 is read through the bits of a half. e4m3 moved into a half's fields is 2^-8 of its value,
// subnormals included: `unit_value` gives the factor back, folded into the layer's scale.
template <int kMantissa>
struct Fp8 : Widened<uint8_t> {
  using Storage = uint8_t;
  using Rebuilt = Float32;
  static constexpr float unit_value = kMantissa == 3 ? 256.0f : 1.0f;
  static constexpr float largest = kMantissa == 3 ? 448.0f : 57344.0f;

  static EIGEN_INLINE F decode(B bytes) {
    const SH wide = __builtin_convertvector(bytes, SH);
    if constexpr (kMantissa == 2) return float_of_half((H)(wide << 8));
    return float_of_half((H)((wide << 7) & static_cast<int16_t>(0xbfff)));
  }
  static EIGEN_INLINE F load(const Storage* p) { return decode(eigen::load<B>(p)); }
  static EIGEN_INLINE F load_first(const Storage* p, int n) {
    return decode(eigen::load_first<B>(p, n));
  }
  static EIGEN_INLINE F load_single(const Storage* p) { return load(p); }

  // Round to nearest even, saturating: drop mantissa bits of the float, or, for subnormals, let
  // an addition round.
  static EIGEN_INLINE void narrow(F v, Storage* p) {
    constexpr int drop = 23 - kMantissa;
    constexpr int bias = kMantissa == 3 ? 7 : 15;
    constexpr int32_t smallest_normal = (127 - bias + 1) << 23;
    constexpr int32_t adder = smallest_normal + (drop << 23);
    const I bits = (I)v;
    const I sign = (bits >> 24) & 0x80;
    F a = (F)(bits & 0x7fffffff);
    a = select(a < largest, a, splat(largest));  // NaN saturates too
    const I subnormal = (I)(a + (F)(I{} + adder)) - adder;
    const I even = ((I)a >> drop) & 1;
    const I normal = (((I)a + ((1 << (drop - 1)) - 1) + even) >> drop)
                     - ((127 - bias) << kMantissa);
    const I code = sign | ((I)a < smallest_normal ? subnormal : normal);
    store(p, __builtin_convertvector(code, B));
  }
};

// n numbers as the 32-bit units that meet a cache of E.
template <class E>
EIGEN_INLINE void put_query(F x, uint32_t* to, int n) {
  if constexpr (E::pack == 2) {
    const H h = bf16_of_float(x);
    std::memcpy(to, &h, 2 * n);
  } else {
    std::memcpy(to, &x, 4 * n);
  }
}

// W numbers of a run-time type (queries, new keys, outputs), n of them present.
EIGEN_INLINE F widen_first(Type type, const void* base, int64_t at, int n) {
  switch (type) {
    case kBfloat16:
      return float_of_bf16(load_first<H>(static_cast<const uint16_t*>(base) + at, n));
    case kFloat16:
      return float_of_half(load_first<H>(static_cast<const uint16_t*>(base) + at, n));
    default:
      return load_first<F>(static_cast<const float*>(base) + at, n);
  }
}

EIGEN_INLINE void narrow_first(Type type, F v, void* base, int64_t at, int n) {
  if (type == kFloat32) {
    std::memcpy(static_cast<float*>(base) + at, &v, n * sizeof(float));
    return;
  }
  const H h = type == kBfloat16 ? bf16_of_float(v) : half_of_float(v);
  std::memcpy(static_cast<uint16_t*>(base) + at, &h, n * sizeof(uint16_t));
}

}  // namespace eigen
