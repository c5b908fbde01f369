// The library's C interface, loaded by cpu.py. Build: see build.py.
#include "attend.h"
#include "write.h"

namespace {

using namespace eigen;

// Codes of cpu.py.
enum Problem {
  kFine = 0,
  kUnknownType = 1,
  kTableTooShort = 2,
  kOutsideCache = 3,
  kRowTooShort = 4
};

template <class Fn>
int with_element(int64_t type, Fn&& f) {
  switch (type) {
    case kFloat32: f(Float32{}); return kFine;
    case kFloat16: f(Float16{}); return kFine;
    case kBfloat16: f(Bfloat16{}); return kFine;
    case kE4m3: f(Fp8<3>{}); return kFine;
    case kE5m2: f(Fp8<2>{}); return kFine;
    default: return kUnknownType;
  }
}

// Everything that is used as an index and comes from tensors' contents.
int check(const AttendArgs& a) {
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t length = a.seq_lens[s];
    if (a.query_start_loc[s + 1] <= a.query_start_loc[s]) continue;
    if (a.rebuild && length > a.rebuild->positions) return kTableTooShort;
    const int64_t blocks = (length + a.cache.block_size - 1) / a.cache.block_size;
    if (blocks > a.block_table_width) return kRowTooShort;
    const int32_t* row = a.block_table + s * a.block_table_stride;
    for (int64_t i = 0; i < blocks; ++i)
      if (row[i] < 0 || row[i] >= a.cache.num_blocks) return kOutsideCache;
  }
  return kFine;
}

int check(const WriteArgs& a) {
  const int64_t slots = a.cache.num_blocks * a.cache.block_size;
  for (int64_t i = 0; i < a.num_tokens; ++i)
    if (a.slots[i] >= slots) return kOutsideCache;
  return kFine;
}

}  // namespace

#define EIGEN_EXPORT extern "C" __attribute__((visibility("default")))

EIGEN_EXPORT int eigen_write_cache(const eigen::WriteArgs* args) {
  if (const int problem = check(*args)) return problem;
  return with_element(args->cache.type,
                      [&](auto element) { write_latents<decltype(element)>(*args); });
}

EIGEN_EXPORT int eigen_attend(const eigen::AttendArgs* args) {
  if (const int problem = check(*args)) return problem;
  return with_element(args->cache.type,
                      [&](auto element) { Attention<decltype(element)>(*args).run(); });
}
