// SPDX-License-Identifier: Apache-2.0
// What Python passes, field by field as in abi.py. Pointers are to CPU memory; strides count
// elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace vllm_eigen {

// Codes of bindings.py.
enum Error : int {
  kOk = 0,
  kUnknownType = 1,
  kRotaryTableTooShort = 2,
  kOutsideCache = 3,
  kBlockTableTooShort = 4,
  kQueryTooShort = 5,
  kOtherGeometry = 6,
  kOutOfMemory = 7,
};

// RoPE pairs that are not reconstructed for a single query, see absorb.py: those from
// `direct_pairs` on, in bands that use the first few basis functions.
struct AbsorbArgs {
  // [num_heads][of each band x, then y][basis_stride], 0 past rank_k: float32, or bfloat16 two rows
  // to a unit where `ReconstructArgs::basis` is in integers and keys are bfloat16.
  const void* basis;
  const float* functions;     // [num_functions][tokens of a KV chunk]
  const float* coefficients;  // of each band [functions][of cosine, of sine][pairs]
  const int64_t* bands;       // [num_bands][pairs, functions]
  int64_t num_bands, num_functions, direct_pairs, basis_stride;
};

// Reconstructed keys. A RoPE pair is two dimensions that rotate together; pairs past
// `rotary_pairs` do not rotate. Rows of `basis` are in the order of pairs (x0, y0, x1, y1, ..), as
// 32-bit units; past the first depth[pair] units, which never falls from pair to pair, they are 0.
struct ReconstructArgs {
  const uint32_t* basis;  // [num_heads][2 * pairs][units of rank_k]
  const float* offset;    // [num_heads][2 * pairs] or null
  const int32_t* order;   // [2 * pairs] dimension of the head in each row; -1 is padding
  const int32_t* depth;   // [pairs]
  const float* cos_sin;   // [positions / 16][rotary_pairs][cos, sin][16]
  int64_t num_heads, pairs, rotary_pairs, positions;
  const AbsorbArgs* absorb;  // or null
  // Null, or `basis` is in integers: four bytes a unit, in each row first the low bytes of what
  // meets 8-bit codes (low_units), then the high bytes of all (coded/reconstruct.h). Without VNNI
  // first 16-bit halves of what meets 8-bit codes, then the bytes of the rest (coded/pairs.h).
  const float* row_scale;   // [num_heads][2 * pairs]
  const float* row_offset;  // likewise, of the sums: codes are h too large (checkpoint/codes.py)
  int64_t low_units;
};

// How latents are coded (checkpoint/codes.py): directions of each width, and their token scale.
struct CodeArgs {
  int64_t eight, four, two, token_scale;
  double scale_floor;
};

// Constant for a layer.
struct LayerArgs {
  int64_t type, cache_type;  // Type of element.h, of query and output, and of the cache
  int64_t num_heads, num_kv_heads, rank_k, rank_v, query_size;
  double k_scale, v_scale;
  double scale, soft_cap;     // soft_cap 0: none
  int64_t window;             // 0: none
  const float* alibi_slopes;  // [num_heads] or null
  const ReconstructArgs* reconstruct;  // or null
  const CodeArgs *key_code, *value_code;  // of a cache of kCodes, otherwise null
};

struct CacheArgs {
  void* data;
  int64_t block_stride, head_stride, num_blocks, block_size;
};

struct WriteArgs {
  const LayerArgs* layer;
  CacheArgs cache;
  const void *key, *value;
  int64_t type, key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  const int64_t* slots;
  int64_t num_tokens, threads;
};

// A scheduler step and the geometry of the layers that will share its plan.
struct StepArgs {
  const int32_t *query_start_loc, *seq_lens, *block_table;
  int64_t num_seqs, block_table_stride, block_table_width;
  int64_t num_heads, num_key_heads, block_size, reconstructs, threads;
};

struct AttendArgs {
  const LayerArgs* layer;
  CacheArgs cache;
  const void* query;
  void* output;
  int64_t num_tokens;  // rows of query and output
  int64_t query_token_stride, query_head_stride, output_token_stride, output_head_stride;
};

}  // namespace vllm_eigen
