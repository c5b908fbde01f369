// Memory of a thread.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace eigen {

// Kept between calls: fresh pages would cost more than small batches do.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* take(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, size_);
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace eigen
