// Sums over the rows of each matrix of a list, spread over threads: over the rows of one group, and then over the
// groups in order, whoever formed them, so that the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace lowrank {

// rows(i) of matrix i; add(i, first, rows, scratch, sums) adds the sums of a group of rows to `sums` (`count` doubles);
// finish(i, sums) takes the total. `scratch` holds `scratch_bytes`, for one thread.
template <class Rows, class Add, class Finish>
void sum_rows(int64_t n, int64_t columns, int64_t count, size_t scratch_bytes, int threads, const Rows& rows,
              const Add& add, const Finish& finish) {
  const Schedule schedule(n, columns, threads, rows);
  const size_t sums_bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(double)), 64));
  const auto add_group = [&](int64_t i, int64_t group, char* scratch, double* sums) {
    const int64_t first = group * kGroupRows;
    std::memset(sums, 0, sums_bytes);
    add(i, first, std::min(kGroupRows, rows(i) - first), scratch, sums);
  };
  const auto add_to = [&](double* total, const double* sums) {
    for (int64_t j = 0; j < count; ++j) total[j] += sums[j];
  };
  for (int64_t s = 0; s < schedule.split; ++s) {
    const int64_t i = schedule.order[s], groups = group_count(rows(i));
    const Scratch partial(sums_bytes, static_cast<int>(groups)), scratch(scratch_bytes, schedule.workers);
    parallel_for(groups, schedule.workers, [&](int64_t group, int worker) {
      add_group(i, group, scratch.of<char>(worker), partial.of<double>(static_cast<int>(group)));
    });
    double* total = partial.of<double>(0);
    for (int64_t group = 1; group < groups; ++group) add_to(total, partial.of<double>(static_cast<int>(group)));
    finish(i, total);
  }
  if (schedule.split == n) return;
  const Scratch scratch(2 * sums_bytes + scratch_bytes, schedule.workers);
  parallel_for(n - schedule.split, schedule.workers, [&](int64_t task, int worker) {
    const int64_t i = schedule.order[schedule.split + task], groups = group_count(rows(i));
    char* const base = scratch.of<char>(worker);
    double *total = reinterpret_cast<double*>(base), *sums = reinterpret_cast<double*>(base + sums_bytes);
    for (int64_t group = 0; group < groups; ++group) {
      add_group(i, group, base + 2 * sums_bytes, group == 0 ? total : sums);
      if (group > 0) add_to(total, sums);
    }
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
