// A turn of AltLoRA, pair by pair: some pairs' Grams, preconditioners and moment steps, then the next pairs'. So there
// is one parallel region, and nothing between its parts; what each part computes is what the operation of its own
// computes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/grouped.h"
#include "cpu/row_sums.h"

namespace lowrank {
namespace {

// What the drift of a factor's move is to its partner: with the damping that stands beside the factor's Gram.
template <class T>
void add_damping(T* moved, int64_t r, double damping) {
  for (int64_t j = 0; j < r; ++j) moved[j * (r + 1)] += static_cast<T>(damping);
}

// One operation after the other, each with all threads: where a few matrices are most of the work.
template <class T>
void run_by_operation(const AdamWScalars& scalars, const TurnArguments& turn, AdamWItem* items,
                      const GramItem* partners, int64_t n, int threads) {
  const int64_t r = turn.r, area = r * r, all = n * area;
  T *const behind = static_cast<T*>(turn.behind), *const moved = static_cast<T*>(turn.moved);
  std::vector<double> grams(static_cast<size_t>(all));
  std::vector<T> maps(static_cast<size_t>(all)), realigned(static_cast<size_t>(all));
  std::vector<GramItem> gram_items(partners, partners + n);
  for (int64_t i = 0; i < n; ++i) {
    gram_items[i].gram = grams.data() + i * area;
    items[i].grad_map = maps.data() + i * area;
    items[i].momentum_map = realigned.data() + i * area;
    items[i].drift = moved + i * area;
  }
  grouped_gram(scalars.dtype, true, gram_items.data(), n, r, r, threads);
  grouped_preconditioner(
      kDTypeOf<T>,
      {grams.data(), behind, maps.data(), realigned.data(), r, turn.damping, turn.weight, items[0].rank_dim == 1}, n,
      threads);
  grouped_adamw(scalars, items, n, threads);
  std::memset(behind, 0, static_cast<size_t>(all) * sizeof(T));
  for (int64_t i = 0; i < n; ++i) add_damping(moved + i * area, r, turn.own_damping);
}

// Where in `order` each unit of at most kLaneGroup pairs begins, and the end: the fewer pairs are left, the fewer are
// taken at a time, so that the threads end together.
template <class Rows>
std::vector<int64_t> units_of(const std::vector<int64_t>& order, int workers, const Rows& rows) {
  const int64_t n = static_cast<int64_t>(order.size());
  int64_t rest = 0;
  for (int64_t i = 0; i < n; ++i) rest += rows(i);
  std::vector<int64_t> begins;
  for (int64_t at = 0; at < n;) {
    begins.push_back(at);
    int64_t taken = rows(order[at++]);
    while (at < n && at - begins.back() < kLaneGroup && 2 * workers * (taken + rows(order[at])) <= rest) {
      taken += rows(order[at++]);
    }
    rest -= taken;
  }
  begins.push_back(n);
  return begins;
}

template <class T>
void run(const AdamWScalars& scalars, const TurnArguments& turn, AdamWItem* items, const GramItem* partners, int64_t n,
         int threads) {
  const int64_t r = turn.r, area = r * r;
  const auto rows = [&](int64_t i) { return items[i].height() + partners[i].rows; };
  const Schedule schedule(n, r, threads, rows);
  if (schedule.split > 0) return run_by_operation<T>(scalars, turn, items, partners, n, threads);
  const std::vector<int64_t> begins = units_of(schedule.order, schedule.workers, rows);
  const Kernels<T>& kernel = kernels<T>();
  T *const all_behind = static_cast<T*>(turn.behind), *const all_moved = static_cast<T*>(turn.moved);
  // A worker's memory: of a unit Grams, drifts, maps and realignments, of one pair two sums, and what kernels ask for.
  const int64_t stack = kLaneGroup * area, sums_count = round_up(area, 8);
  const int64_t state = (3 * stack * static_cast<int64_t>(sizeof(T)) + 7) / 8;  // in doubles, like the rest
  const int64_t work = std::max({gram_scratch(r, r), preconditioner_scratch(r), mapped_scratch(r)});
  const Scratch scratch(static_cast<size_t>(stack + round_up(state, 8) + 2 * sums_count + work) * sizeof(double),
                        schedule.workers);
  parallel_for(static_cast<int64_t>(begins.size()) - 1, schedule.workers, [&](int64_t unit, int worker) {
    const int64_t *const members = &schedule.order[begins[unit]], count = begins[unit + 1] - begins[unit];
    double *const grams = scratch.of<double>(worker), *const sums = grams + stack + round_up(state, 8);
    double* const free = sums + 2 * sums_count;
    T *const behind = reinterpret_cast<T*>(grams + stack), *const maps = behind + stack,
             *const realigned = maps + stack;
    for (int64_t k = 0; k < count; ++k) {
      GramItem partner = partners[members[k]];
      if (k + 1 < count) partner.next = &partners[members[k + 1]];
      sum_groups(partner.rows, area, sums, [&](int64_t first, int64_t height, double* to) {
        kernel.gram_rows(scalars.dtype, true, partner, r, r, first, height, free, to);
      });
      write_gram<double>(sums, r, r, true, grams + k * area);
      T* const of_pair = all_behind + members[k] * area;
      std::copy(of_pair, of_pair + area, behind + k * area);
      std::fill(of_pair, of_pair + area, T(0));
    }
    kernel.preconditioner(
        {grams, behind, maps, realigned, r, turn.damping, turn.weight, items[members[0]].rank_dim == 1}, 0, count,
        free);
    for (int64_t k = 0; k < count; ++k) {
      AdamWItem& item = items[members[k]];
      item.grad_map = maps + k * area;
      item.momentum_map = realigned + k * area;
      item.next = k + 1 < count ? &items[members[k + 1]] : nullptr;
      sum_groups(item.height(), area, sums, [&](int64_t first, int64_t height, double* to) {
        kernel.adamw_mapped_rows(scalars, item, first, height, reinterpret_cast<T*>(free), to);
      });
      T* const moved = all_moved + members[k] * area;
      write_gram<T>(sums, r, r, false, moved);
      add_damping(moved, r, turn.own_damping);
    }
  });
}

}  // namespace

void grouped_altlora_turn(const AdamWScalars& scalars, const TurnArguments& turn, AdamWItem* items,
                          const GramItem* partners, int64_t n, int threads) {
  if (n == 0 || turn.r == 0) return;
  with_compute_type(scalars.dtype, [&](auto t) { run<decltype(t)>(scalars, turn, items, partners, n, threads); });
}

}  // namespace lowrank
