// Who works on which matrix of a list: whole matrices where there are enough of them, so that each stays in its core's
// cache from the first load to the last store; the rows of one matrix where it is too large for that.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sizes.h"

namespace lowrank {

// Half a megabyte in float: smaller matrices are not shared, as the parallel region for each step costs more than it
// gains.
constexpr int64_t kSplitElements = 131072;

// Elements that one thread should have at least: some 10 µs of work, which a thread that another process holds up
// undoes.
constexpr int64_t kThreadElements = 16384;

// What the cores that work may expect to keep of a last-level cache. (Asking the machine tells what it has, not what a
// virtual one may use of it.) Where inputs and results are more, who reads the results finds them in memory anyway, and
// they may go there past the caches.
constexpr int64_t kCacheBytes = int64_t{32} << 20;

template <class Item>
int64_t total_rows(const Item* items, int64_t n) {
  int64_t rows = 0;
  for (int64_t i = 0; i < n; ++i) rows += items[i].rows;
  return rows;
}

struct Schedule {
  std::vector<int64_t> order;  // the largest first
  int workers = 1;
  int64_t split = 0;  // so many of `order` are shared by all workers, one after the other

  // n matrices of rows(i) rows and `columns` columns. Shared are those that are more than half of a worker's fair
  // share.
  template <class Rows>
  Schedule(int64_t n, int64_t columns, int threads, const Rows& rows) : order(static_cast<size_t>(n)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += rows(i);
    const int64_t useful = (total * columns + kThreadElements - 1) / kThreadElements;
    if (n > 0) workers = usable_threads(std::min(useful, std::max<int64_t>(n, group_count(rows(order[0])))), threads);
    while (split < n && workers > 1 && rows(order[split]) * columns >= kSplitElements &&
           2 * workers * rows(order[split]) > total) {
      ++split;
    }
  }

  int64_t size() const { return static_cast<int64_t>(order.size()); }
};

}  // namespace lowrank
