// Spreads the matrices of one call over threads: whole matrices where there are enough of them, so that each stays in
// its core's cache from the Gram product to the last store; the rows of one matrix where it is too large for that.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/qr_work.h"

namespace lowrank {
namespace {

template <class T>
void run(DType dtype, const QrItem* items, int64_t n, int64_t r, int threads) {
  if (n == 0 || r == 0) return;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return items[a].rows > items[b].rows; });
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += items[i].rows;
  const int workers = usable_threads(std::max<int64_t>(n, group_count(items[order[0]].rows)), threads);
  const int64_t split = split_count(n, total * r, workers, [&](int64_t i) { return items[order[i]].rows * r; });
  const Kernels<T>& kernel = kernels<T>();
  if (split > 0) {
    const QrScratch<T> scratch(items[order[0]].rows, r, 1, workers);
    for (int64_t i = 0; i < split; ++i) kernel.qr(dtype, items[order[i]], r, scratch.of(0), workers);
  }
  if (split < n) {
    const QrScratch<T> scratch(items[order[split]].rows, r, workers, 1);
    parallel_for(n - split, workers, [&](int64_t task, int worker) {
      kernel.qr(dtype, items[order[split + task]], r, scratch.of(worker), 1);
    });
  }
}

}  // namespace

void grouped_qr(DType dtype, const QrItem* items, int64_t n, int64_t r, int threads) {
  if (dtype == DType::kFloat64) {
    run<double>(dtype, items, n, r, threads);
  } else {
    run<float>(dtype, items, n, r, threads);
  }
}

}  // namespace lowrank
