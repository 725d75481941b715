// Scratch memory for the workers of one call, kept between calls so that its pages are touched once.
#pragma once

#include <cstddef>
#include <memory>

namespace lowrank {

class Scratch {
 public:
  // `bytes` for each of `workers`, 64-byte aligned, contents undefined. Throws std::bad_alloc, before anything runs.
  Scratch(size_t bytes, int workers);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* of(int worker) const {
    return reinterpret_cast<T*>(aligned_ + static_cast<size_t>(worker) * bytes_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t capacity_ = 0;
  size_t bytes_;
  char* aligned_;
};

}  // namespace lowrank
