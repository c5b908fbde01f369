// The library's C interface, loaded by cpu.py. Build: see build.py.
#include "attend.h"
#include "write.h"

namespace {

using namespace eigen;

template <class Fn>
int with_element(int64_t type, Fn&& f) {
  switch (type) {
    case kFloat32: f(Float32{}); return 0;
    case kFloat16: f(Float16{}); return 0;
    case kBfloat16: f(Bfloat16{}); return 0;
    case kE4m3: f(Fp8<3>{}); return 0;
    case kE5m2: f(Fp8<2>{}); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" int eigen_write_cache(const eigen::WriteArgs* args) {
  return with_element(args->cache.type,
                      [&](auto element) { write_latents<decltype(element)>(*args); });
}

extern "C" int eigen_attend(const eigen::AttendArgs* args) {
  if (args->rebuild) {
    for (int64_t s = 0; s < args->num_seqs; ++s)
      if (args->seq_lens[s] > args->rebuild->positions) return 2;
  }
  return with_element(args->cache.type, [&](auto element) {
    Attention<decltype(element)>(*args).run();
  });
}
