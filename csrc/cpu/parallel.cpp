#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace lowrank {
namespace {

std::atomic<bool> forked{false};

void mark_forked() { forked.store(true, std::memory_order_relaxed); }

}  // namespace

void watch_for_fork() {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, mark_forked);
#endif
}

int usable_threads(int64_t tasks, int threads) {
#if defined(_OPENMP)
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, threads)));
#else
  (void)tasks;
  (void)threads;
  return 1;
#endif
}

}  // namespace lowrank
