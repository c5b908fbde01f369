// SPDX-License-Identifier: Apache-2.0
// The library's C interface, loaded by bindings.py. Build: see build.py.
#include <memory>

#include "attention.h"
#include "coded/reader.h"
#include "coded/write_cache.h"
#include "plain/reader.h"
#include "plain/write_cache.h"

namespace {

using namespace vllm_eigen;

template <class Fn>
Error with_element(int64_t type, Fn&& f) {
  switch (type) {
    case kFloat32: return f(Float32{});
    case kFloat16: return f(Float16{});
    case kBfloat16: return f(Bfloat16{});
    case kE4m3: return f(Fp8<3>{});
    case kE5m2: return f(Fp8<2>{});
    default: return kUnknownType;
  }
}

// No exception crosses the C interface; what may throw is an allocation.
template <class Fn>
int guarded(Fn&& f) noexcept {
  try {
    return f();
  } catch (...) {
    return kOutOfMemory;
  }
}

// What a plan's tensors need of this layer's.
Error check(const AttendArgs& a, const Plan& plan) {
  const LayerArgs& layer = *a.layer;
  const ReconstructArgs* reconstruct = layer.reconstruct;
  const int64_t key_heads = reconstruct ? reconstruct->num_heads : layer.num_kv_heads;
  if (plan.num_heads != layer.num_heads || plan.num_key_heads != key_heads
      || plan.block_size != a.cache.block_size || plan.reconstructs != (reconstruct != nullptr))
    return kOtherGeometry;
  if (plan.items.empty()) return kOk;
  if (plan.num_tokens > a.num_tokens) return kQueryTooShort;
  if (plan.max_block >= a.cache.num_blocks) return kOutsideCache;
  if (reconstruct && plan.max_length > reconstruct->positions) return kRotaryTableTooShort;
  return kOk;
}

struct Constant {
  const char* name;
  int64_t value;
};

constexpr Constant kConstants[] = {
    {"sizeof AbsorbArgs", sizeof(AbsorbArgs)},
    {"sizeof ReconstructArgs", sizeof(ReconstructArgs)},
    {"sizeof CodeArgs", sizeof(CodeArgs)},
    {"sizeof LayerArgs", sizeof(LayerArgs)},
    {"sizeof CacheArgs", sizeof(CacheArgs)},
    {"sizeof WriteArgs", sizeof(WriteArgs)},
    {"sizeof StepArgs", sizeof(StepArgs)},
    {"sizeof AttendArgs", sizeof(AttendArgs)},
    {"float32", kFloat32},
    {"float16", kFloat16},
    {"bfloat16", kBfloat16},
    {"float8_e4m3fn", kE4m3},
    {"float8_e5m2", kE5m2},
    {"codes", kCodes},
    {"most codes", kMostCodes},
    {"kv chunk", kKvChunk},
    {"block multiple", kAlign},
    {"table tokens", kTableTokens},
    {"pairs at once", kPairsAtOnce},
    {"row multiple", kAbsorbRowMultiple},
    {"reconstructs bfloat16", Bfloat16::Reconstructed::pack == 2},
    {"integer keys", kMultipliesBytes},
    {"integer keys in bytes", kMultipliesBytes && !kInPairs},
    {"units of a tile", kHasTiles ? kTile : 1},
    {nullptr, 0},
};

}  // namespace

#define VLLM_EIGEN_EXPORT extern "C" __attribute__((visibility("default")))

// Sizes and constants that Python must agree with; the last has no name.
VLLM_EIGEN_EXPORT const Constant* vllm_eigen_describe() { return kConstants; }

// Sets *plan, to be given back to vllm_eigen_free_plan.
VLLM_EIGEN_EXPORT int vllm_eigen_plan(const StepArgs* args, Plan** plan) {
  *plan = nullptr;
  return guarded([&] {
    auto made = std::make_unique<Plan>(*args);
    const Error error = made->build(*args);
    if (error == kOk) *plan = made.release();
    return error;
  });
}

VLLM_EIGEN_EXPORT void vllm_eigen_free_plan(Plan* plan) { delete plan; }

VLLM_EIGEN_EXPORT int vllm_eigen_attend(const AttendArgs* args, const Plan* plan) {
  return guarded([&] {
    if (const Error error = check(*args, *plan)) return error;
    const LayerArgs& layer = *args->layer;
    if (layer.cache_type == kCodes) {
#if defined(__AVX2__)
      if (layer.reconstruct && layer.reconstruct->row_scale)
        return attend<CodedReader<CodeBytes>>(*args, *plan);
#endif
      return attend<CodedReader<Float32>>(*args, *plan);
    }
    return with_element(layer.cache_type, [&](auto element) {
      return attend<PlainReader<decltype(element)>>(*args, *plan);
    });
  });
}

VLLM_EIGEN_EXPORT int vllm_eigen_write_cache(const WriteArgs* args) {
  return guarded([&] {
    const int64_t slots = args->cache.num_blocks * args->cache.block_size;
    for (int64_t i = 0; i < args->num_tokens; ++i)
      if (args->slots[i] >= slots) return kOutsideCache;
    if (args->layer->cache_type == kCodes) {
      write_codes(*args);
      return kOk;
    }
    return with_element(args->layer->cache_type, [&](auto element) {
      write_cache<decltype(element)>(*args);
      return kOk;
    });
  });
}
