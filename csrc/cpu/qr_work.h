// The scratch memory of QRs.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/sizes.h"

namespace lowrank {

// For `jobs` QRs at the same time, of up to `rows` rows each, every one shared by `workers` threads.
template <class T>
class QrScratch {
 public:
  QrScratch(int64_t rows, int64_t r, int jobs, int workers)
      : rows_(rows), r_(r), workers_(workers), scratch_(static_cast<size_t>(layout(nullptr, nullptr)), jobs) {}

  QrWork<T> of(int job) const {
    QrWork<T> work{};
    layout(scratch_.of<char>(job), &work);
    return work;
  }

 private:
  // Lays the parts out from `base` on and returns how many bytes they take.
  int64_t layout(char* base, QrWork<T>* work) const {
    const int64_t small = r_ * small_pitch(r_), tile = round_up(2 * panel_rows(r_) * r_, 16);
    int64_t used = 0;
    const auto take = [&](auto** part, int64_t elements) {
      if (base) *part = reinterpret_cast<std::remove_reference_t<decltype(*part)>>(base + used);
      used += round_up(elements * static_cast<int64_t>(sizeof(**part)), 64);
    };
    QrWork<T> unused{};
    QrWork<T>* const w = work ? work : &unused;
    take(&w->panels, panel_elements(rows_, r_));
    take(&w->partial, 2 * group_count(rows_) * small);
    take(&w->gram, small);
    take(&w->r, small);
    take(&w->inverse, small);
    take(&w->factor, small);
    take(&w->reciprocals, small_pitch(r_));
    take(&w->lanes, gram_scratch(r_, r_) * workers_);
    take(&w->tile, tile * workers_);
    w->tile_stride = tile;
    return used;
  }

  int64_t rows_, r_, workers_;
  Scratch scratch_;
};

}  // namespace lowrank
