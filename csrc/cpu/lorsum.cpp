// Spreads the layers of a LoRSum over threads.
#include "cpu/grouped.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace lowrank {
namespace {

// Elements of scratch that one layer needs, or the most that any of several needs.
struct Sizes {
  int64_t factors = 0, packed = 0, coefficients = 0, grams = 0, cost = 0;

  Sizes() = default;
  Sizes(const LorsumScalars& s, const LorsumItem& item) {
    const int64_t rows[2] = {lorsum_pitch(item.d_out), lorsum_pitch(item.d_in)};
    const int64_t longest = std::max(rows[0], rows[1]);
    factors = 2 * s.r * (rows[0] + rows[1]);
    coefficients = s.r * s.r;
    grams = lorsum_chunks(longest) * s.r * small_pitch(s.r);
    cost = (rows[0] + rows[1]) * s.r;
    for (int64_t j = 0; j < s.terms; ++j) {
      const LorsumTerm& term = item.terms[j];
      const bool thin = !term.dense && term.k <= kMaxRank;
      if (thin) packed += term.k * (rows[0] + rows[1]);
      coefficients += s.r * (term.dense ? longest : term.k);
      cost += term.dense ? 2 * rows[0] * rows[1] : term.k * (rows[0] + rows[1]);
    }
  }
  void at_least(const Sizes& other) {
    factors = std::max(factors, other.factors);
    packed = std::max(packed, other.packed);
    coefficients = std::max(coefficients, other.coefficients);
    grams = std::max(grams, other.grams);
  }
};

// For `jobs` layers at the same time, each shared by `workers` threads.
template <class T>
class LorsumScratch {
 public:
  LorsumScratch(int64_t r, const Sizes& sizes, int jobs, int workers)
      : small_(6 * r * small_pitch(r)),
        grams_(sizes.grams),
        sums_(kLorsumColumns * small_pitch(r)),
        factors_(round_up(sizes.factors, 16)),
        packed_(round_up(sizes.packed, 16)),
        coefficients_(round_up(sizes.coefficients, 16)),
        workers_(workers),
        scratch_(static_cast<size_t>(small_ + grams_ + sums_ * workers) * sizeof(double) +
                     static_cast<size_t>(factors_ + packed_ + coefficients_ + 2 * kLorsumTile * workers) * sizeof(T),
                 jobs) {}

  LorsumWork<T> of(int job) const {
    LorsumWork<T> work{};
    work.small = scratch_.template of<double>(job);
    work.grams = work.small + small_;
    work.sums = work.grams + grams_;
    work.sums_stride = sums_;
    work.factors = reinterpret_cast<T*>(work.sums + sums_ * workers_);
    work.packed = work.factors + factors_;
    work.coefficients = work.packed + packed_;
    work.tile = work.coefficients + coefficients_;
    work.tile_stride = 2 * kLorsumTile;
    return work;
  }

 private:
  int64_t small_, grams_, sums_, factors_, packed_, coefficients_, workers_;
  Scratch scratch_;
};

template <class T>
void run(const LorsumScalars& s, const LorsumItem* items, int64_t n, int threads) {
  std::vector<Sizes> sizes;
  for (int64_t i = 0; i < n; ++i) sizes.emplace_back(s, items[i]);
  const Schedule schedule(n, std::max(1, 2 * s.sweeps), threads, [&](int64_t i) { return sizes[i].cost; });
  const Kernels<T>& kernel = kernels<T>();
  for (int64_t task = 0; task < schedule.split; ++task) {
    const int64_t i = schedule.order[task];
    const LorsumScratch<T> scratch(s.r, sizes[i], 1, schedule.workers);
    kernel.lorsum(s, items[i], scratch.of(0), schedule.workers);
  }
  if (schedule.split == n) return;
  Sizes largest;
  for (int64_t task = schedule.split; task < n; ++task) largest.at_least(sizes[schedule.order[task]]);
  const LorsumScratch<T> scratch(s.r, largest, schedule.workers, 1);
  parallel_for(n - schedule.split, schedule.workers, [&](int64_t task, int worker) {
    kernel.lorsum(s, items[schedule.order[schedule.split + task]], scratch.of(worker), 1);
  });
}

}  // namespace

void grouped_lorsum(const LorsumScalars& scalars, const LorsumItem* items, int64_t n, int threads) {
  if (n == 0 || scalars.r == 0) return;
  with_compute_type(scalars.dtype, [&](auto t) { run<decltype(t)>(scalars, items, n, threads); });
}

}  // namespace lowrank
