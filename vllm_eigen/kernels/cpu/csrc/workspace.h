// SPDX-License-Identifier: Apache-2.0
// Memory of a thread between calls, and how it is divided into arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace vllm_eigen {

// Divides memory into arrays that begin at multiples of 64 bytes. On null it only adds up sizes:
// one description of the arrays both sizes the workspace and divides it.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  size_t size() const { return size_; }

 private:
  char* memory_;
  size_t size_ = 0;
};

// Kept between calls: fresh pages of memory would cost more than small batches do.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }

  // At least `bytes` bytes, or null where there is no memory.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, size_);
      if (!memory_) size_ = 0;
    }
    return memory_;
  }

  // Arrays as `Arrays(arena, arguments..)` takes them; false where there is no memory.
  template <class Arrays, class... Arguments>
  bool divide(Arrays* arrays, const Arguments&... arguments) {
    Arena sizes(nullptr);
    *arrays = Arrays(sizes, arguments...);
    void* memory = reserve(sizes.size());
    if (!memory && sizes.size() > 0) return false;
    Arena arena(memory);
    *arrays = Arrays(arena, arguments...);
    return true;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace vllm_eigen
