// Spreads the pairs of one call over threads, as qr.cpp does with matrices.
#include <algorithm>

#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/qr_work.h"
#include "cpu/schedule.h"

namespace lowrank {
namespace {

template <class T>
void run(DType dtype, const SvdProductItem* items, int64_t n, int64_t k, int64_t rank, int threads) {
  if (n == 0 || k == 0) return;
  int64_t tallest_left = 0, tallest_right = 0;
  for (int64_t i = 0; i < n; ++i) {
    tallest_left = std::max(tallest_left, items[i].left_rows);
    tallest_right = std::max(tallest_right, items[i].right_rows);
  }
  const Schedule schedule(n, k, threads, [&](int64_t i) { return items[i].left_rows + items[i].right_rows; });
  const int workers = schedule.workers;
  const int64_t split = schedule.split;
  const Kernels<T>& kernel = kernels<T>();
  if (split > 0) {
    const QrScratch<T> left(tallest_left, k, 1, workers), right(tallest_right, k, 1, workers);
    for (int64_t i = 0; i < split; ++i) {
      kernel.svd_product(dtype, items[schedule.order[i]], k, rank, left.of(0), right.of(0), workers);
    }
  }
  if (split < n) {
    const QrScratch<T> left(tallest_left, k, workers, 1), right(tallest_right, k, workers, 1);
    parallel_for(n - split, workers, [&](int64_t task, int worker) {
      kernel.svd_product(dtype, items[schedule.order[split + task]], k, rank, left.of(worker), right.of(worker), 1);
    });
  }
}

}  // namespace

void grouped_svd_product(DType dtype, const SvdProductItem* items, int64_t n, int64_t k, int64_t rank, int threads) {
  with_compute_type(dtype, [&](auto t) { run<decltype(t)>(dtype, items, n, k, rank, threads); });
}

}  // namespace lowrank
