// Scores of the planes that are not rebuilt: see absorb.py for the mathematics.
//
// For every query row and wave of a chunk there is one absorbed query in latent space. Its products
// with the cached latents, weighted by the waves and added up, are what the slow planes of rebuilt
// keys would have given.
#pragma once

#include "rebuild.h"

namespace eigen {

// A thread's memory for a chunk; `queries`, `products` (rows of kChunk) and `constant` are for each
// query row and wave.
struct AbsorbRoom {
  float *turned, *blended, *latent, *constant, *products;
  uint32_t* queries;
};

// Coordinates x and y of a plane in a query as attend.h loads it for rebuilt keys.
template <class K>
EIGEN_INLINE void plane_of(const uint32_t* query, int64_t plane, float* x, float* y) {
  if constexpr (K::pack == 2) {
    const uint32_t low = query[plane] << 16, high = query[plane] & 0xffff0000u;
    std::memcpy(x, &low, 4);
    std::memcpy(y, &high, 4);
  } else {
    std::memcpy(x, query + 2 * plane, 4);
    std::memcpy(y, query + 2 * plane + 1, 4);
  }
}

// The slow planes of a query turned back to position `start`, then weighted for each wave:
// blended[wave][x of every plane, y of every plane].
template <class K>
void blend_query(const RebuildArgs& r, int64_t start, const uint32_t* query,
                 float* __restrict turned, float* __restrict blended) {
  const AbsorbArgs& a = *r.absorb;
  const int direct = static_cast<int>(a.direct_planes);
  const int slow = static_cast<int>(r.planes) - direct;
  for (int j = 0; j < slow; ++j) {
    float x, y, cos = 1.0f, sin = 0.0f;
    plane_of<K>(query, direct + j, &x, &y);
    if (direct + j < r.rotary_planes) {
      cos = table_at(r, start, direct + j)[0];
      sin = table_at(r, start, direct + j)[kTableTokens];
    }
    turned[j] = x * cos + y * sin;
    turned[slow + j] = y * cos - x * sin;
  }
  for (int64_t m = 0; m < a.num_waves; ++m) {
    const float* __restrict cos = a.blend + m * 2 * slow;
    const float* __restrict sin = cos + slow;
    float* __restrict out = blended + m * 2 * slow;
    for (int j = 0; j < slow; ++j) {
      out[j] = turned[j] * cos[j] + turned[slow + j] * sin[j];
      out[slow + j] = turned[slow + j] * cos[j] - turned[j] * sin[j];
    }
  }
}

// Absorbed queries of `rows` query rows for the chunk that begins at position `start`, into
// room.queries; what the key offset adds for each of them into room.constant.
template <class K>
void absorb_queries(const RebuildArgs& r, int head, float k_scale, int rank_k, int64_t start,
                    const uint32_t* queries, int64_t query_stride, int rows,
                    const AbsorbRoom& room) {
  const AbsorbArgs& a = *r.absorb;
  const int width = 2 * static_cast<int>(r.planes - a.direct_planes);
  const int waves = static_cast<int>(a.num_waves), count = rows * waves;
  for (int i = 0; i < rows; ++i)
    blend_query<K>(r, start, queries + i * query_stride, room.turned,
                   room.blended + static_cast<int64_t>(i) * waves * width);
  for (int i = 0; i < count; ++i) {
    float sum = 0.0f;
    if (a.offset)
      for (int d = 0; d < width; ++d)
        sum += room.blended[static_cast<int64_t>(i) * width + d] * a.offset[head * width + d];
    room.constant[i] = sum;
  }
  const int padded = (rank_k + W - 1) / W * W;
  std::fill_n(room.latent, static_cast<size_t>(count) * padded, 0.0f);
  add_values<Float32>(reinterpret_cast<const uint32_t*>(room.blended), width, count,
                      a.basis + static_cast<int64_t>(head) * width * a.basis_stride,
                      a.basis_stride, width, rank_k, room.latent, padded);
  const int units = (rank_k + K::pack - 1) / K::pack;
  for (int i = 0; i < count; ++i) {
    uint32_t* to = room.queries + static_cast<int64_t>(i) * units;
    to[units - 1] = 0;  // the second half of an odd last pair
    for (int d = 0; d < rank_k; d += W)
      put_query<K>(load<F>(room.latent + static_cast<int64_t>(i) * padded + d) * k_scale,
                   to + d / K::pack, std::min(W, rank_k - d));
  }
}

// scores[row][t] += sum over waves of wave[t] * products[row, wave][t], for tokens [begin, end) of
// the chunk.
inline void add_waves(const AbsorbArgs& a, int row, int rows, int begin, int end,
                      const AbsorbRoom& room, float* scores) {
  for (int i = 0; i < rows; ++i) {
    const int64_t first = (row + i) * a.num_waves;
    for (int t = begin; t < end; t += W) {
      F sum = load<F>(scores + i * kChunk + t);
      for (int64_t m = 0; m < a.num_waves; ++m)
        sum = fma(load<F>(a.waves + m * kChunk + t),
                  load<F>(room.products + (first + m) * kChunk + t) + room.constant[first + m],
                  sum);
      store(scores + i * kChunk + t, sum);
    }
  }
}

}  // namespace eigen
