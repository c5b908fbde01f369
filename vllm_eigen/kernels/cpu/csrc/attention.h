// SPDX-License-Identifier: Apache-2.0
// Attention of one layer over a planned step: threads, their workspaces, and the order of phases.
#pragma once

#include <atomic>

#include "worker.h"

namespace vllm_eigen {

template <class R>
Error attend(const AttendArgs& a, const Plan& plan) {
  if (plan.items.empty()) return kOk;
  const Call<R> call(a, plan);
  static thread_local Workspace shared;
  Partials partials;
  if (!shared.divide(&partials, plan.partial_rows, call.padded)) return kOutOfMemory;
  const int count = static_cast<int>(plan.items.size());
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(plan.threads) if (count > 1)
  {
    // No exception may leave the region, so a thread without memory only says so.
    static thread_local Workspace workspace;
    WorkerBuffers<R> buffers;
    if (!workspace.divide(&buffers, call)) out_of_memory = true;
#pragma omp barrier
    if (!out_of_memory) {
      [[maybe_unused]] const Tiles tiles;
      Worker<R> worker(call, buffers, partials);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < count; ++i) worker.compute(plan.items[i]);
#pragma omp for schedule(dynamic, 1) nowait
      for (int i = 0; i < static_cast<int>(plan.splits.size()); ++i)
        worker.combine(plan.splits[i]);
    }
  }
  return out_of_memory ? kOutOfMemory : kOk;
}

}  // namespace vllm_eigen
