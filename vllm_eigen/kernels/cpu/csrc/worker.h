// SPDX-License-Identifier: Apache-2.0
// One thread's work on the items of a plan: scores, softmax and values, KV chunk by KV chunk.
#pragma once

#include "absorb.h"
#include "plan.h"

namespace vllm_eigen {

// What a Worker needs of a reader R (plain/reader.h, coded/reader.h), one for each thread:
//   Storage                  elements of a block
//   Keys                     what reconstructed keys are kept as
//   Absorbing                what absorbed queries are made in
//   Run, run(..)             K of some tokens of a block
//   put_query, score         a query row as it meets the cache itself, and its scores
//   stage                    what is read of a chunk once for many rows, see tiles.h
//   reconstruct              keys of a run, for queries that meet reconstructed ones, and the
//                            products of absorbed queries (put_absorbed) with its latents
//   softmax, values          probabilities of a tile's row, and their sums with the values
//   k_scale, v_scale         what scores and sums are to be multiplied by

// A layer's call together with its plan, and sizes that follow from both.
template <class R>
struct Call {
  using Keys = typename R::Keys;

  explicit Call(const AttendArgs& args, const Plan& step)
      : a(args),
        layer(*args.layer),
        plan(step),
        reconstruct(layer.reconstruct),
        absorb(reconstruct ? reconstruct->absorb : nullptr),
        group(static_cast<int>(layer.num_heads) / step.num_key_heads),
        padded(static_cast<int>(layer.rank_v + W - 1) / W * W),
        query_dims(static_cast<int>(reconstruct ? 2 * reconstruct->pairs : layer.query_size)),
        query_units((query_dims + Keys::pack - 1) / Keys::pack) {}

  const AttendArgs& a;
  const LayerArgs& layer;
  const Plan& plan;
  const ReconstructArgs* reconstruct;  // or null
  const AbsorbArgs* absorb;            // or null
  const int group;                     // query heads of a key head
  const int padded;                    // rank_v in whole vectors
  const int query_dims, query_units;   // of a query row, as it meets reconstructed keys
};

// Partial results of split sequences, shared by all threads.
struct Partials {
  Partials() = default;
  Partials(Arena& arena, int64_t rows, int padded)
      : states(arena.take<SoftmaxState>(rows)), acc(arena.take<float>(rows * padded)) {}

  SoftmaxState* states;
  float* acc;
};

// One thread's arrays.
template <class R>
struct WorkerBuffers {
  using Keys = typename R::Keys;

  WorkerBuffers() = default;
  WorkerBuffers(Arena& arena, const Call<R>& call) {
    const int64_t rows = std::max(call.plan.most_rows, 1);
    reader = R(arena, call.layer, call.plan.block_size, rows);
    scores = arena.take<float>(kTileRows * kKvChunk);
    acc = arena.take<float>(rows * call.padded);
    query = arena.take<float>((call.query_dims + W - 1) / W * W);
    tile_acc = arena.take<float>(kTileRows * static_cast<int64_t>(call.padded));
    states = arena.take<SoftmaxState>(rows);
    tile_states = arena.take<SoftmaxState>(kTileRows);
    if (!call.reconstruct) return;
    queries = arena.take<uint32_t>((rows + kUnusedRows) * call.query_units);
    keys = arena.take<typename Keys::Storage>(static_cast<int64_t>(call.query_units) * kKvChunk
                                              * Keys::pack);
    if (call.absorb)
      absorb = AbsorbBuffers(arena, *call.reconstruct, call.group,
                             static_cast<int>(call.layer.rank_k));
  }

  R reader;
  float *scores, *acc, *query, *tile_acc;
  uint32_t* queries;  // that meet reconstructed keys
  typename Keys::Storage* keys;
  SoftmaxState *states, *tile_states;
  AbsorbBuffers absorb;
};

template <class R>
class Worker {
  using Storage = typename R::Storage;
  using Keys = typename R::Keys;

 public:
  Worker(const Call<R>& call, const WorkerBuffers<R>& buffers, const Partials& partials)
      : c_(call), b_(buffers), reader_(buffers.reader), partials_(partials) {}

  void compute(const WorkItem& item) {
    load_queries(item);
    const int padded = c_.padded;
    const bool is_split = item.partial >= 0;
    if (!is_split) {
      std::fill_n(b_.states, item.rows, SoftmaxState{});
      std::fill_n(b_.acc, static_cast<size_t>(item.rows) * padded, 0.0f);
    }
    for (int c = item.first_chunk; c < item.last_chunk; ++c) {
      if (c_.reconstruct) reconstruct_chunk(item, c);
      if (is_staged(item)) stage_chunk(item, c);
      for (int r = 0; r < item.rows; r += kTileRows) {
        const int rows = std::min(kTileRows, item.rows - r);
        SoftmaxState* states = is_split ? partials_.states + item.partial + r : b_.tile_states;
        float* acc = is_split ? partials_.acc + (item.partial + r) * padded : b_.tile_acc;
        compute_tile(item, r, rows, c, states, acc);
        if (is_split) continue;
        for (int i = 0; i < rows; ++i)
          vllm_eigen::combine(b_.states[r + i], b_.acc + static_cast<int64_t>(r + i) * padded,
                              states[i], acc + i * padded, padded);
      }
    }
    if (is_split) return;
    for (int i = 0; i < item.rows; ++i)
      finish(item, i, b_.states[i], b_.acc + static_cast<int64_t>(i) * padded);
  }

  // The chunks of a split sequence; those of chunk c lie at partial + c * key heads * rows.
  void combine(const WorkItem& split) {
    for (int i = 0; i < split.rows; ++i) {
      SoftmaxState state;
      std::fill_n(b_.acc, c_.padded, 0.0f);
      for (int c = 0; c < split.last_chunk; ++c) {
        const int64_t at =
            split.partial + static_cast<int64_t>(c) * c_.plan.num_key_heads * split.rows + i;
        vllm_eigen::combine(state, b_.acc, partials_.states[at], partials_.acc + at * c_.padded,
                            c_.padded);
      }
      finish(split, i, state, b_.acc);
    }
  }

 private:
  struct Bounds {
    int begin, end;  // tokens of the KV chunk that some row sees
  };

  const Sequence& sequence(const WorkItem& item) const { return c_.plan.sequences[item.seq]; }
  int query_head(const WorkItem& item, int row) const {
    return item.head * c_.group + (item.row + row) % c_.group;
  }
  // Counted from the sequence's first query token.
  int query_token(const WorkItem& item, int row) const { return (item.row + row) / c_.group; }
  int position(const WorkItem& item, int row) const {
    const Sequence& s = sequence(item);
    return s.length - s.num_tokens + query_token(item, row);
  }
  int first_seen(int position) const {
    const int64_t window = c_.layer.window;
    return window > 0 && position >= window ? static_cast<int>(position - window + 1) : 0;
  }
  // Rows are ordered by position, so the first and the last bound them all.
  Bounds bounds(const WorkItem& item, int row, int rows, int chunk) const {
    const int start = chunk * kKvChunk;
    return {std::max(0, first_seen(position(item, row)) - start),
            std::min(kKvChunk, position(item, row + rows - 1) + 1 - start)};
  }
  const Storage* block_of(const WorkItem& item, int position) const {
    const CacheArgs& cache = c_.a.cache;
    const int64_t block =
        c_.plan.blocks[sequence(item).first_block + position / c_.plan.block_size];
    const int64_t head = item.head / (c_.plan.num_key_heads / c_.layer.num_kv_heads);
    return static_cast<const Storage*>(cache.data) + block * cache.block_stride
           + head * cache.head_stride;
  }

  // Calls f(block, token in block, begin, end) for the parts of [begin, end) in one block each.
  template <class Fn>
  void each_block(const WorkItem& item, int chunk, int begin, int end, Fn&& f) const {
    const int block_size = c_.plan.block_size;
    for (int t = begin; t < end;) {
      const int position = chunk * kKvChunk + t, inside = position % block_size;
      const int next = std::min(end, t + block_size - inside);
      f(block_of(item, position), inside, t, next);
      t = next;
    }
  }

  void load_queries(const WorkItem& item) {
    const AttendArgs& a = c_.a;
    const Type type = static_cast<Type>(c_.layer.type);
    for (int i = 0; i < item.rows; ++i) {
      const int64_t token = sequence(item).first_token + query_token(item, i);
      const int64_t base = token * a.query_token_stride + query_head(item, i) * a.query_head_stride;
      if (c_.reconstruct) {
        const int32_t* order = c_.reconstruct->order;
        for (int d = 0; d < c_.query_dims; ++d)
          b_.query[d] = order[d] < 0 ? 0.0f : widen_first(type, a.query, base + order[d], 1)[0];
        uint32_t* to = b_.queries + static_cast<int64_t>(i) * c_.query_units;
        for (int d = 0; d < c_.query_dims; d += W)
          put_query<Keys>(load<F>(b_.query + d), to + d / Keys::pack,
                          std::min(W, c_.query_dims - d));
      } else {
        for (int d = 0; d < c_.query_dims; d += W)
          store(b_.query + d,
                widen_first(type, a.query, base + d, std::min(W, c_.query_dims - d)));
        reader_.put_query(i, b_.query);
      }
    }
  }

  // K of the block that holds `position`, from there on; empty past the sequence.
  typename R::Run run_from(const WorkItem& item, int position) const {
    if (position >= sequence(item).length) return {};
    const int inside = position % c_.plan.block_size;
    return reader_.run(block_of(item, position), inside, c_.plan.block_size - inside);
  }

  // Whether there are rows enough to take codes apart once for all of them. The sums are the same.
  static bool is_staged(const WorkItem& item) { return R::stages && 2 * item.rows >= kTile; }

  void stage_chunk(const WorkItem& item, int chunk) {
    const Bounds b = bounds(item, 0, item.rows, chunk);
    if (b.begin >= b.end) return;
    reader_.stage(!c_.reconstruct, [&](auto&& f) {
      each_block(item, chunk, b.begin / kAlign * kAlign, (b.end + kAlign - 1) / kAlign * kAlign, f);
    });
  }

  // Whether only fast pairs are reconstructed: they are for the only query token of a step.
  bool absorbs(const WorkItem& item) const { return c_.absorb && sequence(item).num_tokens == 1; }
  int pairs_reconstructed(const WorkItem& item) const {
    return static_cast<int>(absorbs(item) ? c_.absorb->direct_pairs : c_.reconstruct->pairs);
  }

  // Fills b_.keys, and where the item absorbs pairs its products with the latents.
  void reconstruct_chunk(const WorkItem& item, int chunk) {
    const Bounds b = bounds(item, 0, item.rows, chunk);
    if (b.begin >= b.end) return;
    const ReconstructArgs& r = *c_.reconstruct;
    const int rank_k = static_cast<int>(c_.layer.rank_k);
    const int absorbed =
        absorbs(item) ? item.rows * static_cast<int>(c_.absorb->num_functions) : 0;
    if (absorbed > 0) {
      absorb_queries<Keys, typename R::Absorbing>(r, item.head, rank_k, chunk * kKvChunk, b_.queries, c_.query_units,
                           item.rows, b_.absorb);
      reader_.put_absorbed(absorbed, b_.absorb);
    }
    each_block(item, chunk, b.begin / kAlign * kAlign, (b.end + kAlign - 1) / kAlign * kAlign,
               [&](const Storage* block, int inside, int begin, int end) {
                 reader_.reconstruct(
                     r, item.head, pairs_reconstructed(item),
                     reader_.run(block, inside, end - begin), chunk * kKvChunk + begin,
                     b_.keys + begin * Keys::pack, block, inside,
                     run_from(item, chunk * kKvChunk + end), absorbed, b_.absorb,
                     b_.absorb.products + begin);
               });
  }

  void compute_tile(const WorkItem& item, int row, int rows, int chunk, SoftmaxState* states,
                    float* acc) {
    const Bounds b = bounds(item, row, rows, chunk);
    if (b.begin >= b.end) {
      std::fill_n(states, rows, SoftmaxState{});
      return;  // combine reads no values of an empty part
    }
    const int begin = b.begin / kAlign * kAlign, end = (b.end + kAlign - 1) / kAlign * kAlign;
    if (c_.reconstruct) {
      const uint32_t* queries = b_.queries + static_cast<int64_t>(row) * c_.query_units;
      const KeyRun<Keys> run{b_.keys + begin * Keys::pack, nullptr, kKvChunk * Keys::pack,
                             2 * pairs_reconstructed(item) / Keys::pack, end - begin};
      score_run_tiles<Keys>(queries, c_.query_units, rows, run, b_.scores + begin);
      if (absorbs(item))
        add_absorbed_scores(*c_.absorb, item.rows, row, rows, begin, end, b_.absorb, b_.scores);
    } else {
      reader_.score(
          is_staged(item), row, rows, begin, end,
          [&](auto&& f) { each_block(item, chunk, begin, end, f); }, b_.scores);
    }
    const LayerArgs& layer = c_.layer;
    const float k_scale = c_.reconstruct ? 1.0f : reader_.k_scale();
    for (int i = 0; i < rows; ++i) {
      const int at = position(item, row + i) - chunk * kKvChunk;
      const int first = first_seen(position(item, row + i)) - chunk * kKvChunk;
      const float slope = layer.alibi_slopes ? layer.alibi_slopes[query_head(item, row + i)] : 0.0f;
      const RowScores options{static_cast<float>(layer.scale) * k_scale,
                              static_cast<float>(layer.soft_cap), slope, at, first, at + 1};
      states[i] = reader_.softmax(i, options, b_.scores + i * kKvChunk, begin, end);
    }
    reader_.values(
        is_staged(item), rows, [&](int i, int count) { return bounds(item, row + i, count, chunk); },
        [&](int from, int to, auto&& f) { each_block(item, chunk, from, to, f); }, acc);
  }

  void finish(const WorkItem& item, int row, const SoftmaxState& state, const float* acc) {
    const AttendArgs& a = c_.a;
    const int64_t token = sequence(item).first_token + query_token(item, row);
    const int64_t base =
        token * a.output_token_stride + query_head(item, row) * a.output_head_stride;
    const int rank_v = static_cast<int>(c_.layer.rank_v);
    const float factor = state.l == 0.0f ? 0.0f : reader_.v_scale() / state.l;
    for (int d = 0; d < rank_v; d += W)
      narrow_first(static_cast<Type>(c_.layer.type), load<F>(acc + d) * factor, a.output, base + d,
                   std::min(W, rank_v - d));
  }

  const Call<R>& c_;
  const WorkerBuffers<R>& b_;
  const R& reader_;
  const Partials& partials_;
};

}  // namespace vllm_eigen
