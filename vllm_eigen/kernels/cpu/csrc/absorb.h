// SPDX-License-Identifier: Apache-2.0
// Scores of the RoPE pairs that are not reconstructed: see absorb.py for the mathematics.
//
// For every query row and basis function of a KV chunk there is one absorbed query in latent
// space. Its products with the cached latents, weighted by the functions and added up, are what
// the slow pairs of reconstructed keys would have given.
#pragma once

#include "reconstruct.h"
#include "workspace.h"

namespace vllm_eigen {

constexpr int kAbsorbRowMultiple = 16;  // of the numbers in a row of AbsorbArgs::basis

// A thread's arrays for a KV chunk. Rotated and weighted queries hold a band's x, then its y.
// Absorbed queries are counted function by function, then row by row, so that the first functions
// of all rows lie together; `products` has rows of kKvChunk.
struct AbsorbBuffers {
  AbsorbBuffers() = default;
  AbsorbBuffers(Arena& arena, const ReconstructArgs& r, int rows, int rank_k) {
    const int64_t slow = 2 * (r.pairs - r.absorb->direct_pairs);
    const int64_t queries_made = rows * r.absorb->num_functions;
    const int64_t padded = (rank_k + W - 1) / W * W;
    products = arena.take<float>(queries_made * kKvChunk);
    latent = arena.take<float>(queries_made * padded);
    queries = arena.take<uint32_t>(queries_made * padded);
    weighted = arena.take<float>(queries_made * slow);
    rotated = arena.take<float>(rows * slow);
    constant = arena.take<float>(queries_made);
  }

  float *rotated, *weighted, *latent, *constant, *products;
  uint32_t* queries;
};

// x and y of a RoPE pair in a query as load_queries lays it out for reconstructed keys.
template <class K>
VLLM_EIGEN_INLINE void load_pair(const uint32_t* query, int64_t pair, float* x, float* y) {
  if constexpr (K::pack == 2) {
    const uint32_t low = query[pair] << 16, high = query[pair] & 0xffff0000u;
    std::memcpy(x, &low, 4);
    std::memcpy(y, &high, 4);
  } else {
    std::memcpy(x, query + 2 * pair, 4);
    std::memcpy(y, query + 2 * pair + 1, 4);
  }
}

// The slow pairs of `rows` queries rotated back to position `start`.
template <class K>
void rotate_back(const ReconstructArgs& r, int64_t start, const uint32_t* queries,
                 int64_t query_stride, int rows, float* rotated) {
  const int64_t slow = 2 * (r.pairs - r.absorb->direct_pairs);
  int64_t pair = r.absorb->direct_pairs;
  for (int64_t b = 0; b < r.absorb->num_bands; ++b) {
    const int64_t pairs = r.absorb->bands[2 * b];
    for (int64_t j = 0; j < pairs; ++j, ++pair) {
      const bool rotates = pair < r.rotary_pairs;
      const float* cos_sin = cos_sin_at(r, start, rotates ? pair : 0);
      const float cos = rotates ? cos_sin[0] : 1.0f;
      const float sin = rotates ? cos_sin[kTableTokens] : 0.0f;
      for (int i = 0; i < rows; ++i) {
        float x, y;
        load_pair<K>(queries + i * query_stride, pair, &x, &y);
        rotated[i * slow + j] = x * cos + y * sin;
        rotated[i * slow + pairs + j] = y * cos - x * sin;
      }
    }
    rotated += 2 * pairs;
  }
}

// One query's pairs of a band weighted for one basis function: its coefficients of the pairs'
// cosines and sines.
inline void weight_pairs(const float* __restrict rotated, const float* __restrict of_cos,
                         const float* __restrict of_sin, int pairs, float* __restrict weighted) {
  const float *x = rotated, *y = rotated + pairs;
  for (int j = 0; j < pairs; ++j) {
    weighted[j] = x[j] * of_cos[j] + y[j] * of_sin[j];
    weighted[pairs + j] = y[j] * of_cos[j] - x[j] * of_sin[j];
  }
}

// Absorbed queries of `rows` query rows for the KV chunk that begins at position `start`, into
// buffers.latent; what the key offset adds for each of them into buffers.constant. Queries are K,
// weighted queries and the basis are multiplied as A.
template <class K, class A>
void absorb_queries(const ReconstructArgs& r, int head, int rank_k, int64_t start,
                    const uint32_t* queries, int64_t query_stride, int rows,
                    const AbsorbBuffers& buffers) {
  const AbsorbArgs& a = *r.absorb;
  const int64_t slow = 2 * (r.pairs - a.direct_pairs);
  const int count = rows * static_cast<int>(a.num_functions);
  const int padded = (rank_k + W - 1) / W * W;
  rotate_back<K>(r, start, queries, query_stride, rows, buffers.rotated);
  std::fill_n(buffers.latent, static_cast<size_t>(count) * padded, 0.0f);
  std::fill_n(buffers.constant, count, 0.0f);
  const float* coefficients = a.coefficients;
  int64_t first = 0;  // dimension of the slow pairs
  for (int64_t b = 0; b < a.num_bands; ++b) {
    const int pairs = static_cast<int>(a.bands[2 * b]), width = 2 * pairs;
    const int used = rows * static_cast<int>(a.bands[2 * b + 1]);
    for (int i = 0; i < used; ++i) {
      const float* of_cos = coefficients + i / rows * width;
      float* out = buffers.weighted + static_cast<int64_t>(i) * width;
      weight_pairs(buffers.rotated + i % rows * slow + first, of_cos, of_cos + pairs, pairs, out);
      if (!r.offset) continue;
      const float* offset = r.offset + head * 2 * r.pairs + 2 * a.direct_pairs + first;
      for (int j = 0; j < pairs; ++j)
        buffers.constant[i] += out[j] * offset[2 * j] + out[pairs + j] * offset[2 * j + 1];
    }
    // As units in place: a row of bfloat16 takes the first half of its floats.
    for (int i = 0; A::pack == 2 && i < used; ++i) {
      float* row = buffers.weighted + static_cast<int64_t>(i) * width;
      for (int d = 0; d < width; d += W) {
        const int n = std::min(W, width - d);
        vllm_eigen::put_query<A>(load_first<F>(row + d, n), reinterpret_cast<uint32_t*>(row) + d / A::pack,
                                 n);
      }
    }
    const auto* basis = static_cast<const typename A::Storage*>(a.basis);
    add_values<A>(reinterpret_cast<const uint32_t*>(buffers.weighted), width, used,
                  basis + (head * slow + first) * a.basis_stride, a.basis_stride * A::pack,
                  width / A::pack, padded, buffers.latent, padded);
    coefficients += a.bands[2 * b + 1] * width;
    first += width;
  }
}

// `count` absorbed queries as they meet latents of type K.
template <class K>
void put_absorbed(int count, float k_scale, int rank_k, const AbsorbBuffers& buffers) {
  const int units = (rank_k + K::pack - 1) / K::pack, padded = (rank_k + W - 1) / W * W;
  for (int i = 0; i < count; ++i) {
    uint32_t* to = buffers.queries + static_cast<int64_t>(i) * units;
    to[units - 1] = 0;  // the second half of an odd last unit
    for (int d = 0; d < rank_k; d += W)
      put_query<K>(load<F>(buffers.latent + static_cast<int64_t>(i) * padded + d) * k_scale,
                   to + d / K::pack, std::min(W, rank_k - d));
  }
}

// scores[i][t] += sum over m of functions[m][t] * products[m, row + i][t], for tokens [begin,
// end) of the KV chunk and `rows` of `all_rows`.
inline void add_absorbed_scores(const AbsorbArgs& a, int all_rows, int row, int rows, int begin,
                                int end, const AbsorbBuffers& buffers, float* scores) {
  for (int i = 0; i < rows; ++i) {
    for (int t = begin; t < end; t += W) {
      F sum = load<F>(scores + i * kKvChunk + t);
      for (int64_t m = 0; m < a.num_functions; ++m) {
        const int64_t at = m * all_rows + row + i;
        sum = fma(load<F>(a.functions + m * kKvChunk + t),
                  load<F>(buffers.products + at * kKvChunk + t) + buffers.constant[at], sum);
      }
      store(scores + i * kKvChunk + t, sum);
    }
  }
}

}  // namespace vllm_eigen
