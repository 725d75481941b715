// Sums over the rows of each matrix of a list, spread over threads: over the rows of one group, and then over the
// groups in order, whoever formed them, so that the result does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace lowrank {

// Of one matrix of `rows` rows: add(first, rows, sums) adds the sums of some rows to `sums` (`count` doubles).
template <class Add>
void sum_group(int64_t rows, int64_t group, int64_t count, double* sums, const Add& add) {
  std::fill(sums, sums + count, 0.0);
  add(group * kGroupRows, std::min(kGroupRows, rows - group * kGroupRows), sums);
}

inline void add_sums(double* total, const double* sums, int64_t count) {
  for (int64_t j = 0; j < count; ++j) total[j] += sums[j];
}

// The same of all groups, in order. The total is left in `total`, behind which there is room for the sums of a group,
// at a multiple of 8.
template <class Add>
void sum_groups(int64_t rows, int64_t count, double* total, const Add& add) {
  double* const sums = total + round_up(count, 8);
  for (int64_t group = 0; group < group_count(rows); ++group) {
    sum_group(rows, group, count, group == 0 ? total : sums, add);
    if (group > 0) add_sums(total, sums, count);
  }
}

// rows(i) of matrix i; add(i, next, first, rows, scratch, sums) adds the sums of a group of rows to `sums` (`count`
// doubles), where the thread is likely to take matrix `next` next, if that is not negative; finish(i, sums) takes the
// total. `scratch` holds `scratch_bytes`, for one thread.
template <class Rows, class Add, class Finish>
void sum_rows(int64_t n, int64_t columns, int64_t count, size_t scratch_bytes, int threads, const Rows& rows,
              const Add& add, const Finish& finish) {
  const Schedule schedule(n, columns, threads, rows);
  const size_t sums_bytes = static_cast<size_t>(round_up(count, 8)) * sizeof(double);
  for (int64_t s = 0; s < schedule.split; ++s) {
    const int64_t i = schedule.order[s], groups = group_count(rows(i));
    const Scratch partial(sums_bytes, static_cast<int>(groups)), scratch(scratch_bytes, schedule.workers);
    parallel_for(groups, schedule.workers, [&](int64_t group, int worker) {
      sum_group(rows(i), group, count, partial.of<double>(static_cast<int>(group)),
                [&](int64_t first, int64_t height, double* sums) {
                  add(i, int64_t{-1}, first, height, scratch.of<char>(worker), sums);
                });
    });
    double* const total = partial.of<double>(0);
    for (int64_t group = 1; group < groups; ++group)
      add_sums(total, partial.of<double>(static_cast<int>(group)), count);
    finish(i, total);
  }
  if (schedule.split == n) return;
  const Scratch scratch(2 * sums_bytes + scratch_bytes, schedule.workers);
  parallel_for(n - schedule.split, schedule.workers, [&](int64_t task, int worker) {
    const int64_t i = schedule.order[schedule.split + task], later = schedule.split + task + schedule.workers;
    const int64_t next = later < n ? schedule.order[later] : -1;
    char* const base = scratch.of<char>(worker);
    double* const total = reinterpret_cast<double*>(base);
    sum_groups(rows(i), count, total, [&](int64_t first, int64_t height, double* sums) {
      add(i, next, first, height, base + 2 * sums_bytes, sums);
    });
    finish(i, total);
  });
}

// gram (r, r) in G from the upper triangle of sums, (r, k) from all of them.
template <class G>
void write_gram(const double* sums, int64_t r, int64_t k, bool symmetric, void* gram) {
  G* out = static_cast<G*>(gram);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      out[i * k + j] = static_cast<G>(symmetric && j < i ? sums[j * k + i] : sums[i * k + j]);
    }
  }
}

}  // namespace lowrank
