// SPDX-License-Identifier: Apache-2.0
// One head's part of a coded cache block: bytes, block_size tokens of them, contiguous.
//
// K lies first, as rows of units: row u holds unit u, 32 bits of codes, of every token, so W tokens
// are one load and a dot product needs no sum across lanes. Units of 8-bit codes come first, then
// those of 4, then of 2 bits; within a unit direction 4 j + b is plane j of byte b. The tokens' scales
// follow, if there are any.
//
// V follows as rows of four tokens: in a row unit i holds byte i of each of the four, one in each
// byte, so W units are W places of the latent. Bytes hold 8-bit codes first, then 4, then 2 bits;
// of `n` codes of a width, byte i holds codes i, i + n / p, .. as planes 0 .. p - 1. V's codes are
// stored as signed numbers, 2^(b - 1) less. A byte belongs to one token: threads that write neighbours do not disturb each other.
// Scales follow here too.
#pragma once

#include <cstdint>
#include <cstring>

#include "../args.h"

namespace vllm_eigen {

constexpr int kWidths = 3;
constexpr int kWidth[kWidths] = {8, 4, 2};
constexpr int kGroup = 4;          // tokens of a row of V
constexpr int kMostCodes = 1024;  // directions of a latent: integer sums hold them

// The directions of one width.
struct Section {
  int width, count;
  int first;       // direction
  int first_byte;  // of a token's codes

  int planes() const { return 8 / width; }
  int bytes() const { return count * width / 8; }
  int units() const { return bytes() / 4; }
};

struct Sections {
  Section of[kWidths];
  int rank, code_bytes;
  bool has_scale;
  float scale_floor;

  Sections() = default;
  explicit Sections(const CodeArgs& a)
      : rank(0), code_bytes(0), has_scale(a.token_scale != 0),
        scale_floor(static_cast<float>(a.scale_floor)) {
    const int64_t counts[kWidths] = {a.eight, a.four, a.two};
    for (int i = 0; i < kWidths; ++i) {
      of[i] = {kWidth[i], static_cast<int>(counts[i]), rank, code_bytes};
      rank += of[i].count;
      code_bytes += of[i].bytes();
    }
  }
  int num_bytes() const { return code_bytes + (has_scale ? 2 : 0); }
};

struct CodedLayout {
  int block_size;
  Sections key, value;

  // Unit row u at `token`.
  template <class P>
  P keys(P block, int u, int token) const {
    return block + 4 * (static_cast<int64_t>(u) * block_size + token);
  }
  template <class P>
  P key_scales(P block, int token) const {
    return block + static_cast<int64_t>(block_size) * key.code_bytes + 2 * token;
  }
  // The row that holds `token`.
  template <class P>
  P values(P block, int token) const {
    return block + static_cast<int64_t>(block_size) * key.num_bytes()
           + static_cast<int64_t>(token / kGroup) * kGroup * value.code_bytes;
  }
  template <class P>
  P value_scales(P block, int token) const {
    return block + static_cast<int64_t>(block_size) * (key.num_bytes() + value.code_bytes)
           + 2 * token;
  }
};

}  // namespace vllm_eigen
