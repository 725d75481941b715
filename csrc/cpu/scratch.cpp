#include "cpu/scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

std::atomic<bool> guards{false};
constexpr size_t kGuard = 4096;
constexpr char kUntouched = '\x5a';

}  // namespace

void guard_scratch(bool guard) { guards = guard; }

Scratch::Scratch(size_t bytes, int workers)
    : asked_(bytes), bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment), guarded_(guards ? workers : 0) {
  if (guarded_ > 0) bytes_ += kGuard;
  const size_t needed = bytes_ * static_cast<size_t>(workers) + kAlignment;
  if (guarded_ == 0) {
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
  for (int worker = 0; worker < guarded_; ++worker)
    std::fill(of<char>(worker) + asked_, of<char>(worker + 1), kUntouched);
}

Scratch::~Scratch() {
  for (int worker = 0; worker < guarded_; ++worker) {
    if (std::all_of(of<char>(worker) + asked_, of<char>(worker + 1), [](char c) { return c == kUntouched; })) continue;
    std::fprintf(stderr, "lowrank_kernels: worker %d wrote behind its scratch of %zu bytes\n", worker, asked_);
    std::abort();
  }
  if (guarded_ > 0) return;
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock.owns_lock() && capacity_ <= kKeep && capacity_ > kept_capacity) {
    kept = std::move(memory_);
    kept_capacity = capacity_;
  }
}

}  // namespace lowrank
