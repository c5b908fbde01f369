// SPDX-License-Identifier: Apache-2.0
// New latents into their coded blocks: quantized, packed and stored in one pass.
#pragma once

#include "../element.h"
#include "keys.h"

namespace vllm_eigen {

// The smallest bfloat16 that is not below x >= 0; NaN of NaN.
inline uint16_t bf16_rounded_up(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0xffffu) >> 16);
}

// To the next integer below, for |x| < 2^22.
VLLM_EIGEN_INLINE F floor_of(F x) {
  const F whole = __builtin_convertvector(nearest(x), F);
  return whole - select(whole > x, splat(1.0f), F{});
}

// Codes of `x [rank]` less 2^(width - 1), one a byte; returns the token's scale. As
// checkpoint/codes.py says.
inline uint16_t encode(const Sections& code, const float* x, int8_t* codes) {
  float scale = 1.0f;
  uint16_t stored = 0;
  if (code.has_scale) {
    F needed = splat(code.scale_floor);
    I is_nan{};
    for (int s = 0; s < kWidths; ++s) {
      const Section& section = code.of[s];
      const float h = 0.5f * static_cast<float>((1 << section.width) - 1);
      for (int d = 0; d < section.count; d += W) {
        const F some = load_first<F>(x + section.first + d, std::min(W, section.count - d));
        is_nan |= some != some;
        if (section.width > 2) needed = max(max(some, -some) / h, needed);
      }
    }
    bool has_nan = false;
    for (int lane = 0; lane < W; ++lane) has_nan |= is_nan[lane] != 0;
    stored = bf16_rounded_up(has_nan ? std::numeric_limits<float>::quiet_NaN() : max_of(needed));
    const uint32_t bits = static_cast<uint32_t>(stored) << 16;
    std::memcpy(&scale, &bits, 4);
  }
  for (int s = 0; s < kWidths; ++s) {
    const Section& section = code.of[s];
    const float half_levels = static_cast<float>(1 << (section.width - 1));
    for (int d = 0; d < section.count; d += W) {
      const int n = std::min(W, section.count - d);
      F some = load_first<F>(x + section.first + d, n);
      if (code.has_scale) some = some / scale;
      some = select((some == some) & (splat(scale) != 0.0f), some, F{});
      some = max(splat(-half_levels), -max(splat(1.0f - half_levels), -some));
      const B bytes = __builtin_convertvector(__builtin_convertvector(floor_of(some), I), B);
      std::memcpy(codes + section.first + d, &bytes, n);
    }
  }
  return stored;
}

// Unit rows of K at one token; `stride` bytes from row to row.
inline void pack_key(const Sections& code, const int8_t* codes, uint8_t* keys, int64_t stride) {
  for (int s = 0; s < kWidths; ++s) {
    const Section& section = code.of[s];
    const uint32_t offset = bytes_of(1 << (section.width - 1));
    const uint32_t mask = bytes_of((1 << section.width) - 1);
    const int8_t* from = codes + section.first;
    for (int u = 0; u < section.units(); ++u, keys += stride) {
      uint32_t unit = 0;
      for (int j = 0; j < section.planes(); ++j, from += 4) {
        uint32_t four;
        std::memcpy(&four, from, 4);
        // Byte by byte c + offset is c ^ offset in the code's own bits.
        unit |= ((four ^ offset) & mask) << (j * section.width);
      }
      std::memcpy(keys, &unit, 4);
    }
  }
}

// The token's bytes of a row of V.
inline void pack_value(const Sections& code, const int8_t* codes, uint8_t* values) {
  for (int s = 0; s < kWidths; ++s) {
    const Section& section = code.of[s];
    const int bytes = section.bytes(), mask = (1 << section.width) - 1;
    const int8_t* from = codes + section.first;
    for (int i = 0; i < bytes; ++i, values += kGroup) {
      int byte = 0;
      for (int j = 0; j < section.planes(); ++j)
        byte |= (from[j * bytes + i] & mask) << (j * section.width);
      *values = static_cast<uint8_t>(byte);
    }
  }
}

inline void write_codes(const WriteArgs& a) {
  const LayerArgs& layer = *a.layer;
  const int block_size = static_cast<int>(a.cache.block_size);
  const CodedLayout layout{block_size, Sections(*layer.key_code), Sections(*layer.value_code)};
  const Type type = static_cast<Type>(a.type);
  const auto read = [&](const void* from, int64_t base, int size, float* x) {
    for (int d = 0; d < size; d += W) {
      const int n = std::min(W, size - d);
      const F some = widen_first(type, from, base + d, n);
      std::memcpy(x + d, &some, 4 * n);
    }
  };
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.num_tokens >= 32)
  for (int64_t i = 0; i < a.num_tokens; ++i) {
    const int64_t slot = a.slots[i];
    if (slot < 0) continue;
    const int token = static_cast<int>(slot % block_size);
    float x[kMostCodes];
    int8_t codes[kMostCodes];
    for (int64_t h = 0; h < layer.num_kv_heads; ++h) {
      uint8_t* block = static_cast<uint8_t*>(a.cache.data) + slot / block_size * a.cache.block_stride
                       + h * a.cache.head_stride;
      read(a.key, i * a.key_token_stride + h * a.key_head_stride, layout.key.rank, x);
      const uint16_t key_scale = encode(layout.key, x, codes);
      pack_key(layout.key, codes, layout.keys(block, 0, token), 4 * block_size);
      if (layout.key.has_scale) std::memcpy(layout.key_scales(block, token), &key_scale, 2);
      read(a.value, i * a.value_token_stride + h * a.value_head_stride, layout.value.rank, x);
      const uint16_t value_scale = encode(layout.value, x, codes);
      pack_value(layout.value, codes, layout.values(block, token) + token % kGroup);
      if (layout.value.has_scale) std::memcpy(layout.value_scales(block, token), &value_scale, 2);
    }
  }
}

}  // namespace vllm_eigen
