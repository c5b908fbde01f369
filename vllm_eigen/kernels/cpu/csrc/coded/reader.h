// SPDX-License-Identifier: Apache-2.0
// How a Worker reads a cache of codes: see worker.h for what a reader has. M: what latents are
// multiplied as where keys are reconstructed.
#pragma once

#include "absorbed.h"
#include "reconstruct.h"
#include "tiles.h"

namespace vllm_eigen {

template <class M>
class CodedReader {
 public:
  using Storage = uint8_t;
  using Keys = typename M::Reconstructed;
  using Absorbing = std::conditional_t<kInIntegers<M>, Bfloat16::Reconstructed, Float32>;
  using Run = CodedRun;

  CodedReader() = default;
  CodedReader(Arena& arena, const LayerArgs& layer, int block_size, int64_t rows)
      : layout_{block_size, Sections(*layer.key_code), Sections(*layer.value_code)},
        padded_((layout_.value.rank + W - 1) / W * W),
        weights_(arena, layout_.value, kTileRows),
        probs_(arena.take<float>(kTileRows * kKvChunk)),
        scales_(arena.take<float>(kKvChunk)) {
    if (stages) staged_ = StagedCodes(arena, layout_.key, layout_.value, !layer.reconstruct);
    if (const ReconstructArgs* r = layer.reconstruct) {
      panel_ = arena.take<float>(static_cast<int64_t>(in_tiles(layout_.key.rank)) * kPanelTokens);
      if (r->absorb) {
        const int64_t absorbed = layer.num_heads / r->num_heads * r->absorb->num_functions;
        if constexpr (kAbsorbsInPanels)
          absorbed_ = AbsorbedRows(arena, layout_.key, absorbed);
        else
          queries_ = CodedQueries(arena, layout_.key, absorbed);
      }
    } else {
      queries_ = CodedQueries(arena, layout_.key, rows);
    }
  }

  float k_scale() const { return 1.0f; }
  float v_scale() const { return 1.0f; }

  void put_query(int row, const float* x) const {
    quantize_query<true>(layout_.key, x, queries_, row);
  }

  Run run(const Storage* block, int inside, int tokens) const {
    return {&layout_.key, layout_.keys(block, 0, inside),
            layout_.key.has_scale ? layout_.key_scales(block, inside) : nullptr,
            4 * static_cast<int64_t>(layout_.block_size), layout_.key.code_bytes / 4, tokens};
  }

  static constexpr bool stages = kHasTiles;
  template <class Blocks>
  void stage(bool with_keys, Blocks&& blocks) const {
#if defined(__AMX_INT8__)
    blocks([&](const Storage* block, int inside, int from, int to) {
      if (with_keys) stage_keys(run(block, inside, to - from), from, staged_);
      stage_values(layout_, block, inside, from, to - from, staged_);
    });
#endif
  }

  template <class Blocks>
  void score(bool is_staged, int row, int rows, int begin, int end, Blocks&& blocks,
             float* scores) const {
#if defined(__AMX_INT8__)
    if (is_staged) {
      score_staged(queries_, layout_.key, staged_, row, rows, begin, end, scores);
      if (layout_.key.has_scale)
        blocks([&](const Storage* block, int inside, int from, int to) {
          scale_scores(rows, run(block, inside, to - from), scores + from);
        });
      return;
    }
#endif
    blocks([&](const Storage* block, int inside, int from, int to) {
      score_as<true>(row, rows, run(block, inside, to - from), scores + from);
    });
  }

  void put_absorbed(int count, const AbsorbBuffers& buffers) const {
    const int64_t padded = (layout_.key.rank + W - 1) / W * W;
    for (int i = 0; i < count; ++i) {
      const float* x = buffers.latent + i * padded;
      if constexpr (kAbsorbsInPanels)
        quantize_absorbed(layout_.key, x, absorbed_, i);
      else
        quantize_query<!kInIntegers<M>>(layout_.key, x, queries_, i);
    }
  }

  void reconstruct(const ReconstructArgs& a, int head, int pairs, const Run& run, int64_t position,
                   typename Keys::Storage* keys, const Storage* block, int inside, const Run& next,
                   int absorbed, const AbsorbBuffers&, float* products) const {
    const Values values{reinterpret_cast<const char*>(layout_.values(block, inside)),
                        layout_.value.code_bytes};
    const auto as = [&](auto latents) {
      using L = typename decltype(latents)::type;
      reconstruct_keys<Keys, L>(a, head, pairs, 1.0f, run, position, keys, kKvChunk * Keys::pack,
                                panel_, values, next, [&](const KeyRun<L>& panel, int t) {
                                  if constexpr (kAbsorbsInPanels)
                                    if (absorbed > 0)
                                      score_absorbed(absorbed_, layout_.key.of[0].units(),
                                                     absorbed, panel, products + t);
                                });
    };
    if constexpr (kInIntegers<M>) {
      if (a.low_units == 0 && !run.scales)
        as(TypeOf<FewBits>{});
      else
        as(TypeOf<M>{});
    } else {
      as(TypeOf<M>{});
    }
    if (absorbed > 0 && !kAbsorbsInPanels) score_as<!kInIntegers<M>>(0, absorbed, run, products);
  }

  SoftmaxState softmax(int i, const RowScores& row, float* scores, int begin, int end) const {
    return softmax_chunk<Float32>(row, scores, reinterpret_cast<uint32_t*>(probs(i)), begin, end);
  }

  template <class Bounds, class Blocks>
  void values(bool is_staged, int rows, Bounds&& bounds, Blocks&& blocks, float* acc) const {
    const auto b = bounds(0, rows);
    const int begin = b.begin / kAlign * kAlign, end = (b.end + kAlign - 1) / kAlign * kAlign;
    const float* scales = nullptr;
    if (layout_.value.has_scale) {
      scales = scales_;
      blocks(begin, end, [&](const Storage* block, int inside, int from, int to) {
        const Storage* stored = layout_.value_scales(block, inside);
        for (int t = from; t < to; t += W, stored += 2 * W)
          store(scales_ + t, float_of_bf16(load<H>(stored)));
      });
    }
    if (is_staged) std::fill_n(weights_.row(0), rows * 2 * CodedWeights::kUnits, 0u);
    for (int i = 0; i < rows; ++i) {
      const auto seen = bounds(i, 1);
      quantize_weights(probs(i), scales, seen.begin, seen.end, begin, end, weights_, i);
    }
#if defined(__AMX_INT8__)
    if (is_staged) sum_staged(layout_.value, staged_, weights_, rows);
#endif
    if (!is_staged) {
      std::fill_n(weights_.sums, static_cast<size_t>(rows) * weights_.row_sums, 0u);
      blocks(begin, end, [&](const Storage* block, int inside, int from, int to) {
        add_codes(layout_, weights_, 0, rows, block, inside, from, to - from);
      });
    }
    for (int i = 0; i < rows; ++i)
      sums_to_values(layout_.value, weights_, i, acc + static_cast<int64_t>(i) * padded_);
  }

 private:
  static constexpr bool kAbsorbsInPanels = kInIntegers<M> && kInPairs;

  template <bool fine>
  void score_as(int row, int rows, const Run& run, float* scores) const {
    score_codes<fine>(queries_, row, rows, run, scores);
    if (run.scales) scale_scores(rows, run, scores);
  }

  float* probs(int row) const { return probs_ + row * kKvChunk; }

  CodedLayout layout_;
  int padded_;  // rank_v in whole vectors
  CodedQueries queries_;  // or absorbed ones, unless they are rows
  AbsorbedRows absorbed_;
  CodedWeights weights_;
  StagedCodes staged_;
  float *probs_, *scales_, *panel_;
};

}  // namespace vllm_eigen
