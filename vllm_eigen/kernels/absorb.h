// Scores of the planes that are not rebuilt: see absorb.py for the mathematics.
//
// For every query row and wave of a chunk there is one absorbed query in latent space. Its products
// with the cached latents, weighted by the waves and added up, are what the slow planes of rebuilt
// keys would have given.
#pragma once

#include "rebuild.h"

namespace eigen {

// A thread's memory for a chunk. Turned and blended queries hold a band's x, then its y. Absorbed
// queries are counted wave by wave, then row by row, so that the first waves of all rows lie
// together; `products` has rows of kChunk.
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

// The slow planes of a query turned back to position `start`.
template <class K>
void turn_back(const RebuildArgs& r, int64_t start, const uint32_t* query, float* turned) {
  int64_t plane = r.absorb->direct_planes;
  for (int64_t b = 0; b < r.absorb->num_bands; ++b) {
    const int64_t planes = r.absorb->bands[2 * b];
    for (int64_t j = 0; j < planes; ++j, ++plane) {
      float x, y;
      plane_of<K>(query, plane, &x, &y);
      const bool turns = plane < r.rotary_planes;
      const float* table = table_at(r, start, turns ? plane : 0);
      const float cos = turns ? table[0] : 1.0f, sin = turns ? table[kTableTokens] : 0.0f;
      turned[j] = x * cos + y * sin;
      turned[planes + j] = y * cos - x * sin;
    }
    turned += 2 * planes;
  }
}

// One query's planes of a band weighted for one wave.
inline void blend_planes(const float* __restrict turned, const float* __restrict cos,
                         const float* __restrict sin, int planes, float* __restrict blended) {
  const float *x = turned, *y = turned + planes;
  for (int j = 0; j < planes; ++j) {
    blended[j] = x[j] * cos[j] + y[j] * sin[j];
    blended[planes + j] = y[j] * cos[j] - x[j] * sin[j];
  }
}

// Absorbed queries of `rows` query rows for the chunk that begins at position `start`, into
// room.queries; what the key offset adds for each of them into room.constant.
template <class K>
void absorb_queries(const RebuildArgs& r, int head, float k_scale, int rank_k, int64_t start,
                    const uint32_t* queries, int64_t query_stride, int rows,
                    const AbsorbRoom& room) {
  const AbsorbArgs& a = *r.absorb;
  const int64_t slow = 2 * (r.planes - a.direct_planes);
  const int count = rows * static_cast<int>(a.num_waves);
  const int padded = (rank_k + W - 1) / W * W;
  for (int i = 0; i < rows; ++i)
    turn_back<K>(r, start, queries + i * query_stride, room.turned + i * slow);
  std::fill_n(room.latent, static_cast<size_t>(count) * padded, 0.0f);
  std::fill_n(room.constant, count, 0.0f);
  const float* blend = a.blend;
  int64_t first = 0;  // dimension of the slow planes
  for (int64_t b = 0; b < a.num_bands; ++b) {
    const int planes = static_cast<int>(a.bands[2 * b]), width = 2 * planes;
    const int used = rows * static_cast<int>(a.bands[2 * b + 1]);
    for (int i = 0; i < used; ++i) {
      const float* cos = blend + i / rows * width;
      float* out = room.blended + static_cast<int64_t>(i) * width;
      blend_planes(room.turned + i % rows * slow + first, cos, cos + planes, planes, out);
      if (!r.offset) continue;
      const float* offset = r.offset + head * 2 * r.planes + 2 * a.direct_planes + first;
      for (int j = 0; j < planes; ++j)
        room.constant[i] += out[j] * offset[2 * j] + out[planes + j] * offset[2 * j + 1];
    }
    add_values<Float32>(reinterpret_cast<const uint32_t*>(room.blended), width, used,
                        a.basis + (head * slow + first) * a.basis_stride, a.basis_stride, width,
                        padded, room.latent, padded);
    blend += a.bands[2 * b + 1] * width;
    first += width;
  }
  const int units = (rank_k + K::pack - 1) / K::pack;
  for (int i = 0; i < count; ++i) {
    uint32_t* to = room.queries + static_cast<int64_t>(i) * units;
    to[units - 1] = 0;  // the second half of an odd last pair
    for (int d = 0; d < rank_k; d += W)
      put_query<K>(load<F>(room.latent + static_cast<int64_t>(i) * padded + d) * k_scale,
                   to + d / K::pack, std::min(W, rank_k - d));
  }
}

// scores[i][t] += sum over waves of wave[t] * products[wave, row + i][t], for tokens [begin,
// end) of the chunk and `rows` of `all_rows`.
inline void add_waves(const AbsorbArgs& a, int all_rows, int row, int rows, int begin, int end,
                      const AbsorbRoom& room, float* scores) {
  for (int i = 0; i < rows; ++i) {
    for (int t = begin; t < end; t += W) {
      F sum = load<F>(scores + i * kChunk + t);
      for (int64_t m = 0; m < a.num_waves; ++m) {
        const int64_t at = m * all_rows + row + i;
        sum = fma(load<F>(a.waves + m * kChunk + t),
                  load<F>(room.products + at * kChunk + t) + room.constant[at], sum);
      }
      store(scores + i * kChunk + t, sum);
    }
  }
}

}  // namespace eigen
