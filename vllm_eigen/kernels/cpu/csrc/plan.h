// SPDX-License-Identifier: Apache-2.0
// One scheduler step divided into work items, once for all layers of one geometry.
//
// Work is cut into (sequence, KV head, rows of queries), and for decode also by KV chunk when
// there are too few items for the threads. Cutting decides only who computes: each chunk's result
// is kept whole and combined in the order of the chunks, so a row's output has the same bits in
// any batch, with any number of threads, and whether its prompt came in one piece or several.
#pragma once

#include <algorithm>
#include <vector>

#include "args.h"
#include "kv_chunk.h"

namespace vllm_eigen {

struct Sequence {
  int first_token, num_tokens;  // its query tokens
  int length;                   // cached tokens
  int64_t first_block;          // in Plan::blocks
};

struct WorkItem {
  int seq, head;  // head: KV head, or reconstructed head
  int row, rows;  // rows of this head, counted (query token, query head of the group)
  int first_chunk, last_chunk;
  int64_t partial;  // row of this chunk's partial results; -1: the item combines all chunks itself
};

// Holds a copy of what it has checked: the step's tensors may change afterwards.
class Plan {
 public:
  std::vector<Sequence> sequences;
  std::vector<int32_t> blocks;
  std::vector<WorkItem> items;
  std::vector<WorkItem> splits;  // rows whose partial results are to be combined
  int64_t partial_rows = 0;
  int most_rows = 0;                                  // of an item
  int num_tokens = 0, max_length = 0, max_block = 0;  // bounds that a layer's tensors must have
  int num_heads, num_key_heads, block_size, threads;
  bool reconstructs;

  explicit Plan(const StepArgs& a)
      : num_heads(static_cast<int>(a.num_heads)),
        num_key_heads(static_cast<int>(a.num_key_heads)),
        block_size(static_cast<int>(a.block_size)),
        threads(static_cast<int>(a.threads)),
        reconstructs(a.reconstructs != 0) {}

  Error build(const StepArgs& a) {
    for (int64_t s = 0; s < a.num_seqs; ++s)
      if (const Error error = add_sequence(a, s)) return error;
    divide();
    for (const WorkItem& item : items) most_rows = std::max(most_rows, item.rows);
    return kOk;
  }

 private:
  Error add_sequence(const StepArgs& a, int64_t s) {
    const int first = a.query_start_loc[s], count = a.query_start_loc[s + 1] - first;
    const int length = a.seq_lens[s];
    if (count <= 0 || length < count) return kOk;
    if (first < 0) return kQueryTooShort;
    const int64_t used = (static_cast<int64_t>(length) + block_size - 1) / block_size;
    if (used > a.block_table_width) return kBlockTableTooShort;
    sequences.push_back({first, count, length, static_cast<int64_t>(blocks.size())});
    const int32_t* row = a.block_table + s * a.block_table_stride;
    for (int64_t i = 0; i < used; ++i) {
      if (row[i] < 0) return kOutsideCache;
      max_block = std::max(max_block, row[i]);
    }
    blocks.insert(blocks.end(), row, row + used);
    num_tokens = std::max(num_tokens, first + count);
    max_length = std::max(max_length, length);
    return kOk;
  }

  void divide() {
    const int group = num_heads / num_key_heads;
    int64_t work = 0, all_rows = 0;
    for (const Sequence& s : sequences) {
      const int64_t rows = static_cast<int64_t>(s.num_tokens) * group;
      all_rows += rows * num_key_heads;
      work += (rows + kTileRows - 1) / kTileRows * num_key_heads * chunks(s);
    }
    const int64_t target = work / (32 * threads);  // tiles x chunks an item may hold
    // Reconstructing keys, or taking codes apart, pays off over many rows, as long as every thread
    // has some.
    const int64_t share = all_rows / (4 * threads) / kTileRows * kTileRows;
    const int least = reconstructs ? 4 * kTileRows : kTileRows;
    const int most = reconstructs ? 1024 : kHasTiles ? 256 : kTileRows;
    const int item_rows = static_cast<int>(std::clamp<int64_t>(share, least, most));
    for (int s = 0; s < static_cast<int>(sequences.size()); ++s) {
      const int rows = sequences[s].num_tokens * group, last = chunks(sequences[s]);
      if (rows <= kTileRows && last > target && last > 1) {
        split_by_chunk(s, rows, last);
        continue;
      }
      for (int h = 0; h < num_key_heads; ++h)
        for (int r = 0; r < rows; r += item_rows)
          items.push_back({s, h, r, std::min(item_rows, rows - r), 0, last, -1});
    }
    // One key basis after the other: each is read from memory once, not once for every sequence.
    if (reconstructs)
      std::stable_sort(items.begin(), items.end(), [](const WorkItem& one, const WorkItem& other) {
        return one.head < other.head;
      });
  }

  // Chunk c of head h leaves its results at partial rows [.. + (c * heads + h) * rows ..).
  void split_by_chunk(int s, int rows, int last) {
    for (int h = 0; h < num_key_heads; ++h)
      splits.push_back({s, h, 0, rows, 0, last, partial_rows + h * rows});
    for (int c = 0; c < last; ++c) {
      for (int h = 0; h < num_key_heads; ++h) {
        items.push_back({s, h, 0, rows, c, c + 1, partial_rows});
        partial_rows += rows;
      }
    }
  }

  static int chunks(const Sequence& s) { return (s.length + kKvChunk - 1) / kKvChunk; }
};

}  // namespace vllm_eigen
