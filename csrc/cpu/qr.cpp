// Spreads the matrices of one call over threads.
#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/qr_work.h"
#include "cpu/schedule.h"

namespace lowrank {
namespace {

// body(item, scratch, threads) for every matrix, in the order and by the threads of the schedule.
template <class T, class Item, class Body>
void for_each_matrix(const Item* items, int64_t n, int64_t r, int threads, const Body& body) {
  if (n == 0 || r == 0) return;
  const Schedule schedule(n, r, threads, [&](int64_t i) { return items[i].rows; });
  const bool streams = 2 * total_rows(items, n) * r * static_cast<int64_t>(sizeof(T)) > kCacheBytes;
  const auto work_of = [&](const QrScratch<T>& scratch, int job) {
    QrWork<T> work = scratch.of(job);
    work.streams = streams;
    return work;
  };
  const auto item = [&](int64_t i) -> const Item& { return items[schedule.order[i]]; };
  if (schedule.split > 0) {
    const QrScratch<T> scratch(item(0).rows, r, 1, schedule.workers);
    for (int64_t i = 0; i < schedule.split; ++i) body(item(i), work_of(scratch, 0), schedule.workers);
  }
  if (schedule.split < n) {
    const QrScratch<T> scratch(item(schedule.split).rows, r, schedule.workers, 1);
    parallel_for(n - schedule.split, schedule.workers,
                 [&](int64_t task, int worker) { body(item(schedule.split + task), work_of(scratch, worker), 1); });
  }
}

template <class T>
void run_qr(DType dtype, const QrItem* items, int64_t n, int64_t r, int threads) {
  const Kernels<T>& kernel = kernels<T>();
  for_each_matrix<T>(items, n, r, threads, [&](const QrItem& item, const QrWork<T>& work, int sharing) {
    kernel.qr(dtype, item, r, work, sharing);
  });
}

template <class T>
void run_polar(DType dtype, const PolarItem* items, int64_t n, int64_t r, int threads) {
  const Kernels<T>& kernel = kernels<T>();
  for_each_matrix<T>(items, n, r, threads, [&](const PolarItem& item, const QrWork<T>& work, int sharing) {
    kernel.polar(dtype, item, r, work, sharing);
  });
}

}  // namespace

void grouped_qr(DType dtype, const QrItem* items, int64_t n, int64_t r, int threads) {
  with_compute_type(dtype, [&](auto t) { run_qr<decltype(t)>(dtype, items, n, r, threads); });
}

void grouped_polar(DType dtype, const PolarItem* items, int64_t n, int64_t r, int threads) {
  with_compute_type(dtype, [&](auto t) { run_polar<decltype(t)>(dtype, items, n, r, threads); });
}

}  // namespace lowrank
