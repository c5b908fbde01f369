// SPDX-License-Identifier: Apache-2.0
// How a Worker reads a cache of numbers of type E: see worker.h for what a reader has.
#pragma once

#include "../absorb.h"
#include "block.h"

namespace vllm_eigen {

template <class E>
class PlainReader {
 public:
  using Storage = typename E::Storage;
  using Keys = typename E::Reconstructed;
  using Absorbing = Float32;
  using Run = KeyRun<E>;

  PlainReader() = default;
  PlainReader(Arena& arena, const LayerArgs& layer, int block_size, int64_t rows)
      : layout_{block_size, static_cast<int>(layer.rank_k), static_cast<int>(layer.rank_v)},
        padded_((layout_.rank_v + W - 1) / W * W),
        query_units_((layout_.rank_k + E::pack - 1) / E::pack),
        k_scale_(static_cast<float>(layer.k_scale) * E::unit_value),
        v_scale_(static_cast<float>(layer.v_scale) * E::unit_value) {
    probs_ = arena.take<uint32_t>(kTileRows * kKvChunk);
    edge_ = arena.take<Storage>(static_cast<int64_t>(padded_) * E::pack);
    if (layer.reconstruct)
      panel_ = arena.take<float>(static_cast<int64_t>(layout_.rank_k) * kPanelTokens);
    else
      queries_ = arena.take<uint32_t>(rows * query_units_);
  }

  float k_scale() const { return k_scale_; }
  float v_scale() const { return v_scale_; }

  void put_query(int row, const float* x) const {
    uint32_t* to = queries_ + static_cast<int64_t>(row) * query_units_;
    to[query_units_ - 1] = 0;  // the second half of an odd last unit
    for (int d = 0; d < layout_.rank_k; d += W)
      vllm_eigen::put_query<E>(load<F>(x + d), to + d / E::pack, std::min(W, layout_.rank_k - d));
  }

  Run run(const Storage* block, int inside, int tokens) const {
    return {layout_.keys(block, 0, inside),
            layout_.has_single() ? layout_.single(block, inside) : nullptr, layout_.key_stride(),
            layout_.full_units(), tokens};
  }

  static constexpr bool stages = false;
  template <class Blocks>
  void stage(bool, Blocks&&) const {}

  template <class Blocks>
  void score(bool, int row, int rows, int, int, Blocks&& blocks, float* scores) const {
    blocks([&](const Storage* block, int inside, int from, int to) {
      score_run<E>(queries_ + static_cast<int64_t>(row) * query_units_, query_units_, rows,
                   run(block, inside, to - from), scores + from);
    });
  }

  void put_absorbed(int count, const AbsorbBuffers& buffers) const {
    vllm_eigen::put_absorbed<Keys>(count, k_scale_, layout_.rank_k, buffers);
  }

  void reconstruct(const ReconstructArgs& a, int head, int pairs, const Run& run, int64_t position,
                   typename Keys::Storage* keys, const Storage* block, int inside, const Run& next,
                   int absorbed, const AbsorbBuffers& buffers, float* products) const {
    const Values values{reinterpret_cast<const char*>(layout_.values(block, inside)),
                        static_cast<int64_t>(layout_.rank_v * sizeof(Storage))};
    const auto score_absorbed = [&](const KeyRun<Keys>& latents, int t) {
      if (absorbed == 0) return;
      const int units = latents.units + (latents.single != nullptr);
      score_run<Keys>(buffers.queries, units, absorbed, latents, products + t);
    };
    reconstruct_keys<Keys, Keys>(a, head, pairs, k_scale_, run, position, keys,
                                 kKvChunk * Keys::pack, panel_, values, next, score_absorbed);
  }

  SoftmaxState softmax(int i, const RowScores& row, float* scores, int begin, int end) const {
    return softmax_chunk<E>(row, scores, probs(i), begin, end);
  }

  template <class Bounds, class Blocks>
  void values(bool, int rows, Bounds&& bounds, Blocks&& blocks, float* acc) const {
    values_of(0, rows, bounds(0, rows), blocks, acc);
    if (rows == 1 || is_finite(acc, static_cast<int64_t>(rows) * padded_)) return;
    // 0 * NaN: a value that one row sees must not reach a row that does not.
    for (int i = 0; i < rows; ++i)
      values_of(i, 1, bounds(i, 1), blocks, acc + static_cast<int64_t>(i) * padded_);
  }

 private:
  uint32_t* probs(int row) const { return probs_ + row * kKvChunk / E::pack; }

  template <class B, class Blocks>
  void values_of(int row, int rows, B b, Blocks&& blocks, float* acc) const {
    std::fill_n(acc, static_cast<size_t>(rows) * padded_, 0.0f);
    blocks(b.begin, b.end, [&](const Storage* block, int inside, int from, int to) {
      add_value_run<E>(probs(row), rows, layout_, block, inside, from, to, acc, padded_, edge_);
    });
  }

  BlockLayout<E> layout_;
  int padded_, query_units_;  // rank_v in whole vectors; of a query row
  float k_scale_, v_scale_;
  uint32_t *queries_, *probs_;
  Storage* edge_;
  float* panel_;
};

}  // namespace vllm_eigen
