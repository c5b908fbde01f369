// Attention of a whole batch: who computes what, and in which order results meet.
//
// Work is cut into (sequence, KV head, rows of queries), and for decode also by chunk when there
// are too few of them for the threads. Cutting decides only who computes: each chunk's result is
// kept whole and folded in the order of the chunks, so a row's output has the same bits in any
// batch, with any number of threads, and whether its prompt came in one piece or several.
#pragma once

#include <vector>

#include "absorb.h"
#include "scratch.h"

namespace eigen {

struct Item {
  int seq, head;   // head: KV head, or rebuilt head
  int row, rows;   // rows of this head, counted (query token, query head of the group)
  int first_chunk, last_chunk;
  int64_t part;    // where this chunk's result goes; -1: the item folds all chunks itself
};

template <class E>
class Attention {
  using Storage = typename E::Storage;
  using Keys = typename E::Rebuilt;

 public:
  explicit Attention(const AttendArgs& a)
      : a_(a),
        heads_(static_cast<int>(a.rebuild ? a.rebuild->num_heads : a.cache.num_kv_heads)),
        group_(static_cast<int>(a.num_heads) / heads_),
        layout_{static_cast<int>(a.cache.block_size), static_cast<int>(a.cache.rank_k),
                static_cast<int>(a.cache.rank_v)},
        padded_((layout_.rank_v + W - 1) / W * W),
        query_rows_(static_cast<int>(a.rebuild ? 2 * a.rebuild->planes : a.query_size)),
        query_units_(a.rebuild ? (query_rows_ + Keys::pack - 1) / Keys::pack
                               : (query_rows_ + E::pack - 1) / E::pack) {}

  void run() {
    plan();
    if (items_.empty()) return;
    const size_t part_bytes = static_cast<size_t>(parts_) * (sizeof(RowState) + padded_ * 4);
    static thread_local Scratch shared;
    float* part_values = static_cast<float*>(shared.take(part_bytes + 64));
    auto* part_states = reinterpret_cast<RowState*>(part_values + parts_ * padded_);
    const int count = static_cast<int>(items_.size());
#pragma omp parallel num_threads(a_.threads) if (count > 1)
    {
      static thread_local Scratch scratch;
      Worker worker(*this, scratch);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; ++i) worker.compute(items_[i], part_states, part_values);
#pragma omp for schedule(dynamic, 1) nowait
      for (int i = 0; i < static_cast<int>(splits_.size()); ++i)
        worker.fold(splits_[i], part_states, part_values);
    }
  }

 private:
  int tokens_of(int seq) const {
    return a_.query_start_loc[seq + 1] - a_.query_start_loc[seq];
  }

  void plan() {
    int64_t work = 0, all_rows = 0;
    for (int s = 0; s < a_.num_seqs; ++s) {
      const int64_t n = tokens_of(s);
      if (n <= 0 || a_.seq_lens[s] < n) continue;
      all_rows += n * group_ * heads_;
      work += ((n * group_ + kTileRows - 1) / kTileRows) * heads_ * chunks(s);
    }
    const int64_t target = work / (32 * a_.threads);  // tiles x chunks an item may hold
    // Rebuilding keys pays off over many rows, as long as every thread has some.
    const int64_t share = all_rows / (4 * a_.threads) / kTileRows * kTileRows;
    const int most_rows =
        a_.rebuild ? static_cast<int>(std::clamp<int64_t>(share, 4 * kTileRows, 1024)) : kTileRows;
    for (int s = 0; s < a_.num_seqs; ++s) {
      const int n = tokens_of(s);
      if (n <= 0 || a_.seq_lens[s] < n) continue;
      const int rows = n * group_, last = chunks(s);
      if (rows <= kTileRows && last > target && last > 1) {
        for (int h = 0; h < heads_; ++h) {
          splits_.push_back({s, h, 0, rows, 0, last, parts_ + h * rows});
        }
        for (int c = 0; c < last; ++c) {
          for (int h = 0; h < heads_; ++h) {
            items_.push_back({s, h, 0, rows, c, c + 1, parts_});
            parts_ += rows;
          }
        }
        continue;
      }
      for (int h = 0; h < heads_; ++h)
        for (int r = 0; r < rows; r += most_rows)
          items_.push_back({s, h, r, std::min(most_rows, rows - r), 0, last, -1});
    }
    // One basis after the other: each is read from memory once, not once for every sequence.
    if (a_.rebuild)
      std::stable_sort(items_.begin(), items_.end(),
                       [](const Item& one, const Item& other) { return one.head < other.head; });
  }

  int chunks(int seq) const { return (a_.seq_lens[seq] + kChunk - 1) / kChunk; }

  // One thread's buffers and the work done in them.
  class Worker {
   public:
    Worker(const Attention& plan, Scratch& scratch) : o_(plan) {
      int rows = 0;
      for (const Item& item : o_.items_) rows = std::max(rows, item.rows);
      const AbsorbArgs* absorb = o_.a_.rebuild ? o_.a_.rebuild->absorb : nullptr;
      const size_t absorbed =
          absorb ? o_.group_ * static_cast<size_t>(absorb->num_waves) : 0;
      const size_t slow = absorb ? 2 * (o_.a_.rebuild->planes - absorb->direct_planes) : 0;
      const size_t rank_k = (static_cast<size_t>(o_.layout_.rank_k) + W - 1) / W * W;
      const size_t tile = kTileRows * kChunk * 4;
      const size_t values = static_cast<size_t>(rows) * o_.padded_ * 4;
      const size_t queries = (static_cast<size_t>(rows) * o_.query_units_ * 4 + 63) / 64 * 64;
      const size_t keys =
          o_.a_.rebuild ? static_cast<size_t>(o_.query_units_) * kChunk * 4 : 0;
      const size_t panel =
          o_.a_.rebuild ? static_cast<size_t>(o_.layout_.rank_k) * kPanelTokens * 4 : 0;
      const size_t tile_values = kTileRows * static_cast<size_t>(o_.padded_) * 4;
      const size_t edge = (o_.layout_.rank_v * 4 + 127) / 64 * 64;
      const size_t states = (rows + kTileRows) * sizeof(RowState);
      const size_t absorbing = 4 * (absorbed * (kChunk + slow + 2 * rank_k + 1) + o_.group_ * slow);
      char* at = static_cast<char*>(scratch.take(2 * tile + values + queries + keys + panel
                                                 + tile_values + edge + states + absorbing));
      const auto next = [&at](size_t bytes) {
        char* here = at;
        at += bytes;
        return here;
      };
      scores_ = reinterpret_cast<float*>(next(tile));
      weights_ = reinterpret_cast<uint32_t*>(next(tile));
      values_ = reinterpret_cast<float*>(next(values));
      queries_ = reinterpret_cast<uint32_t*>(next(queries));
      keys_ = reinterpret_cast<typename Keys::Storage*>(next(keys));
      panel_ = reinterpret_cast<float*>(next(panel));
      tile_values_ = reinterpret_cast<float*>(next(tile_values));
      edge_ = reinterpret_cast<Storage*>(next(edge));
      states_ = reinterpret_cast<RowState*>(next(rows * sizeof(RowState)));
      tile_states_ = reinterpret_cast<RowState*>(next(kTileRows * sizeof(RowState)));
      const auto floats = [&](size_t n) { return reinterpret_cast<float*>(next(4 * n)); };
      absorb_.products = floats(absorbed * kChunk);
      absorb_.latent = floats(absorbed * rank_k);
      absorb_.queries = reinterpret_cast<uint32_t*>(floats(absorbed * rank_k));
      absorb_.blended = floats(absorbed * slow);
      absorb_.turned = floats(o_.group_ * slow);
      absorb_.constant = floats(absorbed);
    }

    void compute(const Item& item, RowState* part_states, float* part_values) {
      if (o_.a_.rebuild)
        load_queries<Keys>(item);
      else
        load_queries<E>(item);
      const int padded = o_.padded_;
      if (item.part < 0) {
        std::fill_n(states_, item.rows, RowState{});
        std::fill_n(values_, static_cast<size_t>(item.rows) * padded, 0.0f);
      }
      for (int c = item.first_chunk; c < item.last_chunk; ++c) {
        if (o_.a_.rebuild) rebuild_chunk(item, c);
        for (int r = 0; r < item.rows; r += kTileRows) {
          const int rows = std::min(kTileRows, item.rows - r);
          const bool kept = item.part >= 0;
          RowState* states = kept ? part_states + item.part + r : tile_states_;
          float* values = kept ? part_values + (item.part + r) * padded : tile_values_;
          compute_tile(item, r, rows, c, states, values);
          if (kept) continue;
          for (int i = 0; i < rows; ++i)
            merge(states_[r + i], values_ + static_cast<int64_t>(r + i) * padded, states[i],
                  values + i * padded, padded);
        }
      }
      if (item.part >= 0) return;
      for (int i = 0; i < item.rows; ++i)
        finish(item, i, states_[i], values_ + static_cast<int64_t>(i) * padded);
    }

    // Sums up the chunks of a split sequence; chunk c, head h lies at part + c * heads * rows.
    void fold(const Item& item, const RowState* part_states, const float* part_values) {
      for (int i = 0; i < item.rows; ++i) {
        RowState state;
        std::fill_n(values_, o_.padded_, 0.0f);
        for (int c = 0; c < item.last_chunk; ++c) {
          const int64_t at = item.part + static_cast<int64_t>(c) * o_.heads_ * item.rows + i;
          merge(state, values_, part_states[at], part_values + at * o_.padded_, o_.padded_);
        }
        finish(item, i, state, values_);
      }
    }

   private:
    struct Bounds {
      int begin, end;  // tokens of the chunk that some row sees
    };

    int query_head(const Item& item, int row) const {
      return item.head * o_.group_ + (item.row + row) % o_.group_;
    }
    int query_token(const Item& item, int row) const { return (item.row + row) / o_.group_; }
    int position(const Item& item, int row) const {
      return o_.a_.seq_lens[item.seq] - o_.tokens_of(item.seq) + query_token(item, row);
    }
    int first_seen(int position) const {
      const int64_t window = o_.a_.window;
      return window > 0 && position >= window ? static_cast<int>(position - window + 1) : 0;
    }
    // Rows are ordered by position, so the first and the last bound them all.
    Bounds bounds(const Item& item, int row, int rows, int chunk) const {
      const int start = chunk * kChunk;
      return {std::max(0, first_seen(position(item, row)) - start),
              std::min(kChunk, position(item, row + rows - 1) + 1 - start)};
    }
    const Storage* page_of(const Item& item, int position) const {
      const AttendArgs& a = o_.a_;
      const int64_t block =
          a.block_table[item.seq * a.block_table_stride + position / o_.layout_.block_size];
      const int64_t head = item.head / (o_.heads_ / a.cache.num_kv_heads);
      return static_cast<const Storage*>(a.cache.pages) + block * a.cache.block_stride
             + head * a.cache.head_stride;
    }

    // Calls f(page, token in page, begin, end) for the parts of [begin, end) in one page each.
    template <class Fn>
    void each_page(const Item& item, int chunk, int begin, int end, Fn&& f) const {
      const int block_size = o_.layout_.block_size;
      for (int t = begin; t < end;) {
        const int position = chunk * kChunk + t, inside = position % block_size;
        const int next = std::min(end, t + block_size - inside);
        f(page_of(item, position), inside, t, next);
        t = next;
      }
    }

    template <class Q>
    void load_queries(const Item& item) {
      const AttendArgs& a = o_.a_;
      const int32_t* order = a.rebuild ? a.rebuild->order : nullptr;
      for (int i = 0; i < item.rows; ++i) {
        const int64_t token = a.query_start_loc[item.seq] + query_token(item, i);
        const int64_t base =
            token * a.query_token_stride + query_head(item, i) * a.query_head_stride;
        const Type type = static_cast<Type>(a.type);
        uint32_t* to = queries_ + static_cast<int64_t>(i) * o_.query_units_;
        to[o_.query_units_ - 1] = 0;  // the second half of an odd last pair
        for (int d = 0; d < o_.query_rows_; d += W) {
          const int n = std::min(W, o_.query_rows_ - d);
          F x{};
          if (order) {
            for (int k = 0; k < n; ++k)
              if (order[d + k] >= 0) x[k] = widen_first(type, a.query, base + order[d + k], 1)[0];
          } else {
            x = widen_first(type, a.query, base + d, n);
          }
          put_query<Q>(x, to + d / Q::pack, n);
        }
      }
    }

    // K of `tokens` tokens of a page, from token `inside`.
    KeyRun<E> key_run(const Storage* page, int inside, int tokens) const {
      const Page<E>& l = o_.layout_;
      return {l.keys(page, 0, inside), l.has_single() ? l.single(page, inside) : nullptr,
              l.key_stride(), l.full_units(), tokens};
    }

    // K of the page that holds `position`, from there on; empty past the sequence.
    KeyRun<E> run_from(const Item& item, int position) const {
      if (position >= o_.a_.seq_lens[item.seq]) return {};
      const int inside = position % o_.layout_.block_size;
      return key_run(page_of(item, position), inside, o_.layout_.block_size - inside);
    }

    Values value_run(const Storage* page, int inside) const {
      const Page<E>& l = o_.layout_;
      return {reinterpret_cast<const char*>(l.values(page, inside)),
              static_cast<int64_t>(l.rank_v * sizeof(Storage))};
    }

    // Whether only fast planes are rebuilt: they are for the only query token of a step.
    bool absorbs(const Item& item) const {
      return o_.a_.rebuild->absorb && o_.tokens_of(item.seq) == 1;
    }
    int planes_rebuilt(const Item& item) const {
      const RebuildArgs& r = *o_.a_.rebuild;
      return static_cast<int>(absorbs(item) ? r.absorb->direct_planes : r.planes);
    }

    // Fills keys_, and where the item absorbs planes its products with the latents.
    void rebuild_chunk(const Item& item, int chunk) {
      const Bounds b = bounds(item, 0, item.rows, chunk);
      if (b.begin >= b.end) return;
      const RebuildArgs& r = *o_.a_.rebuild;
      const float k_scale = static_cast<float>(o_.a_.cache.k_scale) * E::unit_value;
      const int absorbed = absorbs(item) ? item.rows * static_cast<int>(r.absorb->num_waves) : 0;
      if (absorbed > 0)
        absorb_queries<Keys>(r, item.head, k_scale, o_.layout_.rank_k, chunk * kChunk, queries_,
                             o_.query_units_, item.rows, absorb_);
      each_page(item, chunk, b.begin / kAlign * kAlign, (b.end + kAlign - 1) / kAlign * kAlign,
                [&](const Storage* page, int inside, int begin, int end) {
                  rebuild_keys<E>(r, item.head, planes_rebuilt(item), k_scale,
                                  key_run(page, inside, end - begin), chunk * kChunk + begin,
                                  keys_ + begin * Keys::pack, kChunk * Keys::pack, panel_,
                                  value_run(page, inside), run_from(item, chunk * kChunk + end),
                                  [&](const KeyRun<Keys>& latents, int t) {
                                    if (absorbed == 0) return;
                                    const int units = latents.units + (latents.single != nullptr);
                                    score_run<Keys>(absorb_.queries, units, absorbed, latents,
                                                    absorb_.products + begin + t);
                                  });
                });
    }

    void compute_tile(const Item& item, int row, int rows, int chunk, RowState* states,
                      float* values) {
      const int padded = o_.padded_;
      const Bounds b = bounds(item, row, rows, chunk);
      if (b.begin >= b.end) {
        std::fill_n(states, rows, RowState{});
        return;  // merge reads no values of an empty part
      }
      const int begin = b.begin / kAlign * kAlign, end = (b.end + kAlign - 1) / kAlign * kAlign;
      const uint32_t* queries = queries_ + static_cast<int64_t>(row) * o_.query_units_;
      if (o_.a_.rebuild) {
        const KeyRun<Keys> run{keys_ + begin * Keys::pack, nullptr, kChunk * Keys::pack,
                               2 * planes_rebuilt(item) / Keys::pack, end - begin};
        score_run<Keys>(queries, o_.query_units_, rows, run, scores_ + begin);
        if (absorbs(item))
          add_waves(*o_.a_.rebuild->absorb, item.rows, row, rows, begin, end, absorb_, scores_);
      } else {
        each_page(item, chunk, begin, end, [&](const Storage* page, int inside, int from, int to) {
          score_run<E>(queries, o_.query_units_, rows, key_run(page, inside, to - from),
                       scores_ + from);
        });
      }
      const AttendArgs& a = o_.a_;
      const float k_scale =
          a.rebuild ? 1.0f : static_cast<float>(a.cache.k_scale) * E::unit_value;
      for (int i = 0; i < rows; ++i) {
        const int at = position(item, row + i) - chunk * kChunk;
        const int first = first_seen(position(item, row + i)) - chunk * kChunk;
        const float slope = a.alibi_slopes ? a.alibi_slopes[query_head(item, row + i)] : 0.0f;
        const RowScores options{static_cast<float>(a.scale) * k_scale,
                                static_cast<float>(a.soft_cap), slope, at, first, at + 1};
        states[i] = weigh<E>(options, scores_ + i * kChunk, weights_ + i * kChunk / E::pack,
                             begin, end);
      }
      std::fill_n(values, static_cast<size_t>(rows) * padded, 0.0f);
      each_page(item, chunk, b.begin, b.end, [&](const Storage* page, int in, int from, int to) {
        add_value_run<E>(weights_, rows, o_.layout_, page, in, from, to, values, padded, edge_);
      });
    }

    void finish(const Item& item, int row, const RowState& state, const float* values) {
      const AttendArgs& a = o_.a_;
      const int64_t token = a.query_start_loc[item.seq] + query_token(item, row);
      const int64_t base =
          token * a.output_token_stride + query_head(item, row) * a.output_head_stride;
      const float v_scale = static_cast<float>(a.cache.v_scale) * E::unit_value;
      const float factor = state.sum > 0.0f ? v_scale / state.sum : 0.0f;
      for (int d = 0; d < o_.layout_.rank_v; d += W)
        narrow_first(static_cast<Type>(a.type), load<F>(values + d) * factor, a.output, base + d,
                     std::min(W, o_.layout_.rank_v - d));
    }

    const Attention& o_;
    float *scores_, *values_, *panel_, *tile_values_;
    uint32_t *weights_, *queries_;
    typename Keys::Storage* keys_;
    Storage* edge_;
    RowState *states_, *tile_states_;
    AbsorbRoom absorb_;
  };

  const AttendArgs& a_;
  const int heads_, group_;
  const Page<E> layout_;
  const int padded_, query_rows_, query_units_;
  std::vector<Item> items_, splits_;
  int64_t parts_ = 0;
};

}  // namespace eigen
