// What Python hands over, field by field as in args.py. Pointers are to CPU memory; strides count
// elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace eigen {

struct Cache {
  void* pages;
  int64_t type, block_stride, head_stride;  // Type of element.h; strides in cache elements
  int64_t num_blocks, num_kv_heads, block_size, rank_k, rank_v;
  double k_scale, v_scale;
};

struct WriteArgs {
  Cache cache;
  const void *key, *value;
  int64_t type, key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  const int64_t* slots;
  int64_t num_tokens, threads;
};

// Planes that are not rebuilt for a single query, see absorb.py: those from `direct_planes` on, in
// bands that use the first few waves.
struct AbsorbArgs {
  const float* basis;    // [num_heads][of each band x, then y][basis_stride], zeros past rank_k
  const float* waves;    // [num_waves][tokens of a chunk]
  const float* blend;    // of each band [waves][share in cosine, share in sine][planes]
  const int64_t* bands;  // [num_bands][planes, waves]
  int64_t num_bands, num_waves, direct_planes, basis_stride;
};

// Rebuilt keys. A plane is two dimensions that rotate together; planes past `rotary_planes` do
// not rotate. Rows of `basis` are in plane order (x0, y0, x1, y1, ..), as 32-bit units; past the
// first depth[plane] units, which never falls from plane to plane, they are zero.
struct RebuildArgs {
  const uint32_t* basis;   // [num_heads][2 * planes][units of rank_k]
  const float* offset;     // [num_heads][2 * planes] or null
  const int32_t* order;    // [2 * planes] dimension of the head in each row; -1 is padding
  const int32_t* depth;    // [planes]
  const float* cos_sin;    // [positions / 16][rotary_planes][cos, sin][16]
  int64_t num_heads, planes, rotary_planes, positions;
  const AbsorbArgs* absorb;  // or null
};

struct AttendArgs {
  Cache cache;
  const void* query;
  void* output;
  int64_t type;  // of query and output
  int64_t query_token_stride, query_head_stride, output_token_stride, output_head_stride;
  int64_t num_heads, query_size, num_seqs;
  const int32_t *query_start_loc, *seq_lens, *block_table;
  int64_t block_table_stride, block_table_width;
  const float* alibi_slopes;  // or null
  double scale, soft_cap;     // soft_cap 0: none
  int64_t window;             // 0: none
  const RebuildArgs* rebuild; // or null
  int64_t threads;
};

}  // namespace eigen
