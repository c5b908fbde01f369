// SPDX-License-Identifier: Apache-2.0
// Keys reconstructed from coded latents.
//
// Where the machine multiplies bytes, keys of bfloat16 queries are made in integers: codes as they are
// stored times a key basis of 8 bits a number, and of 15 bits where it meets 8-bit codes. Each row of
// the basis has a scale. What 8 bits take from the basis is far below what the codes themselves lack
// of the latent: 0.3 steps of a code against about 0.02. Elsewhere latents are widened to float32.
#pragma once

#include "../absorb.h"
#include "integer.h"
#include "layout.h"
#include "pairs.h"

namespace vllm_eigen {

// K of some consecutive tokens of a coded block.
struct CodedRun {
  const Sections* code;
  const uint8_t* first;   // unit row 0 at the first token
  const uint8_t* scales;  // of the tokens, or null
  int64_t stride;         // from unit row to unit row
  int units, tokens;
};

// Rows of integers that meet codes: of a key basis, or absorbed queries. First in each is what meets
// 8-bit codes, low_units units of them: with VNNI low bytes, without it all of it, 16-bit halves.
struct IntegerRows {
  const uint32_t* numbers;
  const float *scale, *above;  // a number's step; what sums are too large by
  const float* offset;         // or null
  int low_units;
};

// Latents as float32: one row for each direction.
template <int width, int j>
VLLM_EIGEN_INLINE void store_plane(U unit, float* row, int64_t stride) {
  constexpr uint32_t mask = (1u << width) - 1;
  VLLM_EIGEN_UNROLL for (int byte = 0; byte < 4; ++byte) {
    const I code = (I)((unit >> (8 * byte + j * width)) & mask);
    store(row + (4 * j + byte) * stride, __builtin_convertvector(code, F) - 0.5f * mask);
  }
}

#if defined(__AVX2__)
// Latents as bytes: one row of units for every four directions. Without VNNI codes of 8 bits are
// 16-bit halves (pairs.h): bytes 0 and 2 of every unit, then bytes 1 and 3.
struct CodeBytes {
  using Storage = uint32_t;
  using Reconstructed = Bfloat16::Reconstructed;
  static constexpr int pack = 1;
  static constexpr bool is_plain = false;
};

// Where no code has 8 bits, so that the basis has no low bytes, and tokens have no scales.
struct FewBits : CodeBytes {
  static constexpr bool is_plain = true;
};

template <int width, int j>
VLLM_EIGEN_INLINE void store_plane(U unit, uint32_t* row, int64_t stride) {
  store(row + j * stride, byte_plane<width, j>(unit));
}

#if defined(__AVX512VNNI__)
// sums[r][v] += products in whole steps, low_sums those in 128ths of one.
template <class M, int R, int NV>
VLLM_EIGEN_INLINE void multiply_rows(const IntegerRows& rows, int64_t row,
                                     const KeyRun<M>& latents, U (&low_sums)[R][NV],
                                     U (&sums)[R][NV]) {
  const int low = M::is_plain ? 0 : rows.low_units, units = low + latents.units;
  const uint32_t* numbers = rows.numbers + row * units;
  if (!M::is_plain) multiply_units(low_sums, numbers, units, latents.first, latents.stride, low);
  multiply_units(sums, numbers + low, units, latents.first, latents.stride, latents.units);
}
#else
template <class M, int R, int NV>
VLLM_EIGEN_INLINE void multiply_rows(const IntegerRows& rows, int64_t row,
                                     const KeyRun<M>& latents, U (&low_sums)[R][NV],
                                     U (&sums)[R][NV]) {
  const int halves = M::is_plain ? 0 : 2 * rows.low_units, units = latents.units;
  const uint32_t* numbers = rows.numbers + row * units;
  if (!M::is_plain) multiply_units(low_sums, numbers, units, latents.first, latents.stride, halves);
  multiply_few_bits(sums, numbers + halves, units, latents.first + halves * latents.stride,
                    latents.stride, units - halves);
}
#endif

// Of row `row`, times the latents of W tokens from `token` on, what the sums come to.
template <class M>
VLLM_EIGEN_INLINE F product_of_sums(const IntegerRows& rows, int64_t row, const KeyRun<M>& latents,
                                    int token, U sum, U low_sum) {
  const float scale = rows.scale[row], above = rows.above[row];
  const float offset = rows.offset ? rows.offset[row] : 0.0f;
  if constexpr (M::is_plain) {
    const F product = __builtin_convertvector((I)sum, F);
    return fma(product, splat(scale), splat(offset - above * scale));
  } else {
    const I whole = (I)sum + (((I)low_sum + kSignedBase / 2) >> 7);
    const F product = __builtin_convertvector(whole, F) - above;
    return fma(product, factor_of(latents, token, 1.0f) * scale, splat(offset));
  }
}

// Rows [row, row + R) times latents, and their offsets.
template <class M, int R, int NV>
VLLM_EIGEN_INLINE void integer_products(const IntegerRows& rows, int64_t row,
                                        const KeyRun<M>& latents, F (&c)[R][NV]) {
  U low_sums[R][NV] = {}, sums[R][NV] = {};
  multiply_rows(rows, row, latents, low_sums, sums);
  VLLM_EIGEN_UNROLL for (int r = 0; r < R; ++r)
    VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v)
      c[r][v] = product_of_sums(rows, row + r, latents, v * W, sums[r][v], low_sums[r][v]);
}

VLLM_EIGEN_INLINE IntegerRows rows_of(const ReconstructArgs& a) {
  return {a.basis, a.row_scale, a.row_offset, a.offset, static_cast<int>(a.low_units)};
}

#if defined(__AMX_INT8__)
template <>
constexpr bool kOnTiles<CodeBytes> = true;
template <>
constexpr bool kOnTiles<FewBits> = true;

// On matrix units, 16 pairs at once: rows of the basis are whole tiles there (low_units too).
template <class K, int NV, class M, class Fn>
void reconstruct_on_tiles(const ReconstructArgs& a, int head, int pairs, const KeyRun<M>& latents,
                          int64_t position, typename K::Storage* keys, int64_t row_stride,
                          int parts, Fn&& fetch) {
  const int low = M::is_plain ? 0 : static_cast<int>(a.low_units);
  const int high = in_tiles(latents.units), units = low + high;
  const IntegerRows basis = rows_of(a);
  TileSums sums, low_sums;
  for (int part = 0; part < parts; ++part) fetch(part);
  for (int pair = 0; pair < pairs; pair += kTile) {
    const int64_t first_row = head * 2 * a.pairs + 2 * pair;
    const uint32_t* rows = a.basis + first_row * units;
    for (int v0 = 0; v0 < NV; v0 += 2) {
      const uint32_t* codes = latents.first + v0 * W;
      if (low > 0)
        multiply_tiles<UnsignedBytes>(rows, units, true, codes, latents.stride, low, low_sums);
      multiply_tiles<UnsignedBytes>(rows + low, units, true, codes, latents.stride, high, sums);
      for (int p = 0; p < std::min(kTile, pairs - pair); ++p) {
        auto* out = keys + (pair + p) * (2 / K::pack) * row_stride;
        for (int v = 0; v < std::min(2, NV - v0); ++v) {
          F c[2];
          for (int r = 0; r < 2; ++r) {
            const int i = 2 * p + r;
            c[r] = product_of_sums(basis, first_row + i, latents, (v0 + v) * W, sums.row<U>(i, v),
                                   low > 0 ? low_sums.row<U>(i, v) : U{});
          }
          store_rotated<K>(a, c[0], c[1], position + (v0 + v) * W, pair + p,
                           out + (v0 + v) * W * K::pack, row_stride);
        }
      }
    }
  }
}
#endif

// As for plain latents.
template <int R, int NV>
VLLM_EIGEN_INLINE void unrotated(const ReconstructArgs& a, int64_t row, int, float,
                                 const KeyRun<CodeBytes>& latents, F (&c)[R][NV]) {
  integer_products(rows_of(a), row, latents, c);
}

template <int R, int NV>
VLLM_EIGEN_INLINE void unrotated(const ReconstructArgs& a, int64_t row, int, float,
                                 const KeyRun<FewBits>& latents, F (&c)[R][NV]) {
  integer_products(rows_of(a), row, latents, c);
}
#else
struct CodeBytes;
using FewBits = CodeBytes;
#endif

template <class M>
constexpr bool kInIntegers = std::is_same_v<M, CodeBytes> || std::is_same_v<M, FewBits>;

// The latents of NV vectors of tokens, in `panel`.
template <class M, int NV>
VLLM_EIGEN_INLINE KeyRun<M> staged(const CodedRun& run, int token, float* panel) {
  constexpr int stride = NV * W;
  auto* row = reinterpret_cast<typename M::Storage*>(panel);
  const auto* first_row = row;
  const uint8_t* units = run.first + 4 * token;
  each_below<kWidths>([&](auto width_index) {
    constexpr int s = decltype(width_index)::value, width = kWidth[s];
    constexpr bool is_halves = kInIntegers<M> && kInPairs && width == 8;
    const int count = run.code->of[s].units();
    for (int u = 0; u < count; ++u, units += run.stride) {
      VLLM_EIGEN_UNROLL for (int v = 0; v < NV; ++v) {
        const U unit = load<U>(units + v * 4 * W);
        if constexpr (is_halves)
          store_halves(unit, row + v * W, count * stride);
        else
          each_below<8 / width>([&](auto plane) {
            store_plane<width, decltype(plane)::value>(unit, row + v * W, stride);
          });
      }
      row += (kInIntegers<M> ? 8 : 32) / width * stride;
    }
    if (is_halves) row += count * stride;
  });
  return {first_row, nullptr, stride, static_cast<int>((row - first_row) / stride), stride,
          run.scales ? run.scales + 2 * token : nullptr};
}

VLLM_EIGEN_INLINE void fetch_latents(const CodedRun& run, int token, int tokens, int from, int to) {
  if (token >= run.tokens) return;
  for (int u = from; u < std::min(to, run.units); ++u)
    fetch(run.first + u * run.stride + 4 * token, 0, 4 * tokens);
}

}  // namespace vllm_eigen
