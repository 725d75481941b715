// Spreads the systems of one call over threads.
#include <algorithm>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace lowrank {
namespace {

// Up to this r square systems are solved side by side, in 0.3 to 0.6 of the time; larger groups of them leave the
// cache.
constexpr int64_t kSideBySide = 32;

// For `jobs` systems at the same time, each shared by `workers` threads.
template <class T>
class SolveScratch {
 public:
  SolveScratch(int64_t r, int jobs, int workers, bool streams)
      : r_(r),
        streams_(streams),
        small_(r * small_pitch(r)),
        tile_(round_up(3 * panel_rows(r) * r, 16)),
        scratch_(static_cast<size_t>(2 * small_) * sizeof(double) +
                     static_cast<size_t>(2 * small_ + 2 * small_pitch(r) + tile_ * workers) * sizeof(T),
                 jobs) {}

  SolveWork<T> of(int job) const {
    SolveWork<T> work{};
    work.upper = scratch_.template of<double>(job);
    work.inverse = work.upper + small_;
    work.forward = reinterpret_cast<T*>(work.inverse + small_);
    work.backward = work.forward + small_;
    work.reciprocals = work.backward + small_;
    work.reversed = work.reciprocals + small_pitch(r_);
    work.tile = work.reversed + small_pitch(r_);
    work.tile_stride = tile_;
    work.streams = streams_;
    return work;
  }

 private:
  int64_t r_;
  bool streams_;
  int64_t small_, tile_;
  Scratch scratch_;
};

template <class T>
void run(DType dtype, const SolveItem* items, int64_t n, int64_t r, double damping, int threads) {
  if (n == 0 || r == 0) return;
  const Schedule schedule(n, r, threads, [&](int64_t i) { return items[i].rows; });
  const Kernels<T>& kernel = kernels<T>();
  const bool streams = 2 * total_rows(items, n) * r * element_size(dtype) > kCacheBytes;
  if (schedule.split > 0) {
    const SolveScratch<T> scratch(r, 1, schedule.workers, streams);
    for (int64_t i = 0; i < schedule.split; ++i) {
      kernel.solve(dtype, items[schedule.order[i]], r, damping, scratch.of(0), schedule.workers);
    }
  }
  if (schedule.split < n) {
    const SolveScratch<T> scratch(r, schedule.workers, 1, streams);
    parallel_for(n - schedule.split, schedule.workers, [&](int64_t task, int worker) {
      kernel.solve(dtype, items[schedule.order[schedule.split + task]], r, damping, scratch.of(worker), 1);
    });
  }
}

}  // namespace

void grouped_solve(DType dtype, bool wide, const SolveItem* items, int64_t n, int64_t r, double damping, int threads) {
  if (wide && dtype == DType::kFloat64 && r <= kSideBySide) {
    std::vector<SolveItem> all(items, items + n);
    const auto is_square = [&](const SolveItem& item) { return item.rows == r; };
    const int64_t squares = std::partition(all.begin(), all.end(), is_square) - all.begin();
    grouped_solve_squares(all.data(), squares, r, damping, threads);
    run<double>(dtype, all.data() + squares, n - squares, r, damping, threads);
  } else if (wide) {
    run<double>(dtype, items, n, r, damping, threads);
  } else {
    run<float>(dtype, items, n, r, damping, threads);
  }
}

}  // namespace lowrank
