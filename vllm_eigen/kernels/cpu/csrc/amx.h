// SPDX-License-Identifier: Apache-2.0
// Matrix units (AMX): a tile is 16 rows of 64 bytes, a product 16 x 16 sums of 32 bits.
//
// The left operand holds 16 rows of 16 units, a unit being four bytes or two bfloat16 numbers; the
// right one 16 unit rows of 16 columns. Both lie in memory as the vector products of multiply.h and
// coded/integer.h read them. Sums of bytes are the integers that VNNI gives. Like vec.h this file
// knows instruction sets.
#pragma once

#include "vec.h"

namespace vllm_eigen {

#if defined(__AMX_INT8__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

constexpr int kTile = 16;          // rows, units and columns of a tile
constexpr int kTileColumns = 32;  // columns of a product: two right operands

VLLM_EIGEN_INLINE int in_tiles(int units) { return (units + kTile - 1) / kTile * kTile; }

// Sums of up to two left operands with two right ones.
struct TileSums {
  alignas(64) uint32_t of[2][2][kTile][kTile];

  // Of row i, 0 .. 31, the columns of right operand v.
  template <class V>
  VLLM_EIGEN_INLINE V row(int i, int v) const {
    return load<V>(of[i / kTile][v][i % kTile]);
  }
};

#if defined(__AMX_INT8__)
// Sums in tiles 0 to 3 += products of left operands, 4 and 5, with right ones, 6 and 7. gcc takes
// the numbers of tiles as written: they cannot be template arguments.

// Right operand 0 .. 255, left one -128 .. 127.
struct UnsignedBytes {
  static VLLM_EIGEN_INLINE void add_first() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  static VLLM_EIGEN_INLINE void add_second() {
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};

// Right operand -128 .. 127, left one 0 .. 255.
struct SignedBytes {
  static VLLM_EIGEN_INLINE void add_first() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  static VLLM_EIGEN_INLINE void add_second() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
};

struct Bfloat16Pairs {
  static VLLM_EIGEN_INLINE void add_first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static VLLM_EIGEN_INLINE void add_second() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// A thread's tiles, as long as it lives: all of the full size.
class Tiles {
 public:
  Tiles() {
    alignas(64) Configuration c{};
    c.palette = 1;
    for (int i = 0; i < 8; ++i) {
      c.row_bytes[i] = 64;
      c.rows[i] = kTile;
    }
    _tile_loadconfig(&c);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// sums = products of 16 or, with `two`, 32 rows of `left` with 32 columns of `right`, over `units`,
// a multiple of 16. Strides count units.
template <class Kind>
VLLM_EIGEN_INLINE void multiply_tiles(const uint32_t* left, int64_t left_stride, bool two,
                                      const uint32_t* right, int64_t right_stride, int units,
                                      TileSums& sums) {
  const uint32_t* second = left + kTile * left_stride;
  asm volatile("" ::: "memory");  // gcc does not know that _tile_loadd reads memory
  _tile_zero(0);
  _tile_zero(1);
  if (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int u = 0; u < units; u += kTile, right += kTile * right_stride) {
    _tile_loadd(4, left + u, 4 * left_stride);
    _tile_loadd(6, right, 4 * right_stride);
    _tile_loadd(7, right + kTile, 4 * right_stride);
    Kind::add_first();
    if (!two) continue;
    _tile_loadd(5, second + u, 4 * left_stride);
    Kind::add_second();
  }
  _tile_stored(0, sums.of[0][0], 4 * kTile);
  _tile_stored(1, sums.of[0][1], 4 * kTile);
  if (!two) return;
  _tile_stored(2, sums.of[1][0], 4 * kTile);
  _tile_stored(3, sums.of[1][1], 4 * kTile);
}
#else
struct Tiles {};
#endif

}  // namespace vllm_eigen
