// One parallel region per call: tasks are handed out to OpenMP threads.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lowrank {

// How many threads a region with `tasks` tasks should use when the caller allows `threads`. 1 inside another parallel
// region (no oversubscription), and in a forked child, where OpenMP's pool is gone and a region would wait for ever.
int usable_threads(int64_t tasks, int threads);

// Registers the fork handler; called when the module is loaded.
void watch_for_fork();

// Calls body(task, worker) for every task in [0, tasks). Which worker gets a task is not determined, so the result of
// a task must not depend on it: a worker's number is good for scratch memory only. `body` must not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < tasks; ++task) body(task, worker);
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace lowrank
