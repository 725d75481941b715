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
  size_t asked_, bytes_;  // for each worker: what was asked for, and how far apart they are
  char* aligned_;
  int guarded_ = 0;  // so many workers' memory has a guard behind it
};

// For tests: from now on nothing is kept, and the process ends, saying so, where a worker wrote behind its memory. What
// was kept may be larger than what is asked for, and hides that.
void guard_scratch(bool guard);

}  // namespace lowrank
