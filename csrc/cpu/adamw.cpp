// Hands the elements of all parameters out to threads, in chunks, so that one large parameter does not serialize.
#include <algorithm>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"
#include "cpu/sizes.h"

namespace lowrank {
namespace {

constexpr int64_t kChunk = kThreadElements;

bool has_maps(const AdamWItem& item) {
  return item.grad_map || item.momentum_map || item.param_map || item.direction_map;
}

// All of one rank, with their drifts, mapped or not.
template <class T>
void run_with_drifts(const AdamWScalars& scalars, const AdamWItem* items, int64_t n, int threads) {
  const int64_t r = items[0].rank();
  const Kernels<T>& kernel = kernels<T>();
  sum_rows(
      n, r, r * r, static_cast<size_t>(mapped_scratch(r)) * sizeof(T), threads,
      [&](int64_t i) { return items[i].height(); },
      [&](int64_t i, int64_t next, int64_t first, int64_t rows, char* scratch, double* sums) {
        AdamWItem item = items[i];
        if (next >= 0) item.next = &items[next];
        kernel.adamw_mapped_rows(scalars, item, first, rows, reinterpret_cast<T*>(scratch), sums);
      },
      [&](int64_t i, const double* sums) { write_gram<T>(sums, r, r, false, items[i].drift); });
}

template <class T>
void run(const AdamWScalars& scalars, const AdamWItem* items, int64_t n, int threads) {
  if (n > 0 && items[0].drift) return run_with_drifts<T>(scalars, items, n, threads);
  // Chunks of item i are the tasks [first[i], first[i + 1]).
  std::vector<int64_t> first(static_cast<size_t>(n) + 1, 0);
  int64_t scratch_elements = 0;
  for (int64_t i = 0; i < n; ++i) {
    const AdamWItem& item = items[i];
    int64_t chunks = (item.rows * item.columns + kChunk - 1) / kChunk;
    if (has_maps(item)) {
      const int64_t r = item.rank(), height = item.height();
      chunks = r ? group_count(height) : 0;
      scratch_elements = std::max(scratch_elements, mapped_scratch(r));
    }
    first[i + 1] = first[i] + chunks;
  }
  const int64_t tasks = first[n];
  threads = usable_threads(tasks, threads);
  const Scratch scratch(static_cast<size_t>(scratch_elements) * sizeof(T), scratch_elements ? threads : 0);
  const Kernels<T>& kernel = kernels<T>();
  parallel_for(tasks, threads, [&](int64_t task, int worker) {
    const int64_t i = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    const AdamWItem& item = items[i];
    if (has_maps(item)) {
      const int64_t begin = (task - first[i]) * kGroupRows, rows = std::min(kGroupRows, item.height() - begin);
      kernel.adamw_mapped_rows(scalars, item, begin, rows, scratch.of<T>(worker), nullptr);
    } else {
      const int64_t begin = (task - first[i]) * kChunk;
      kernel.adamw_range(scalars, item, begin, std::min(begin + kChunk, item.rows * item.columns));
    }
  });
}

}  // namespace

void grouped_adamw(const AdamWScalars& scalars, const AdamWItem* items, int64_t n, int threads) {
  with_compute_type(scalars.dtype, [&](auto t) { run<decltype(t)>(scalars, items, n, threads); });
}

}  // namespace lowrank
