#include "cpu/scratch.h"

#include <cstdint>
#include <mutex>
#include <utility>

namespace lowrank {
namespace {

constexpr size_t kAlignment = 64;
// Larger buffers go back to the system after the call.
constexpr size_t kKeep = size_t{64} << 20;

std::mutex mutex;
std::unique_ptr<char[]> kept;
size_t kept_capacity = 0;

}  // namespace

Scratch::Scratch(size_t bytes, int workers) : bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment) {
  const size_t needed = bytes_ * static_cast<size_t>(workers) + kAlignment;
  {
    // A concurrent call finds nothing kept and gets memory of its own. try_lock: a forked child must never wait here.
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock.owns_lock() && kept_capacity >= needed) {
      memory_ = std::move(kept);
      capacity_ = std::exchange(kept_capacity, 0);
    }
  }
  if (!memory_) {
    memory_.reset(new char[needed]);
    capacity_ = needed;
  }
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
  aligned_ = memory_.get() + (kAlignment - start % kAlignment) % kAlignment;
}

Scratch::~Scratch() {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock.owns_lock() && capacity_ <= kKeep && capacity_ > kept_capacity) {
    kept = std::move(memory_);
    kept_capacity = capacity_;
  }
}

}  // namespace lowrank
