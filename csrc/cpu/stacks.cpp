// Operations on stacks of small matrices: spreads groups of them over threads.
#include <algorithm>

#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"
#include "cpu/sizes.h"

namespace lowrank {
namespace {

// body(first, count, scratch) for groups of n matrices (r, r).
template <class Body>
void for_each_group(int64_t n, int64_t r, int threads, int64_t scratch_elements, const Body& body) {
  if (n == 0 || r == 0) return;
  const int64_t groups = (n + kLaneGroup - 1) / kLaneGroup;
  const int64_t useful = (8 * n * r * r + kThreadElements - 1) / kThreadElements;  // some 10 ns for each element
  const int workers = usable_threads(std::min(groups, useful), threads);
  const Scratch scratch(static_cast<size_t>(scratch_elements) * sizeof(double), workers);
  parallel_for(groups, workers, [&](int64_t group, int worker) {
    const int64_t first = group * kLaneGroup;
    body(first, std::min(kLaneGroup, n - first), scratch.of<double>(worker));
  });
}

}  // namespace

void grouped_eigh(DType dtype, const Stack& xs, void* values, void* vectors, int64_t n, int64_t r, int threads) {
  with_compute_type(dtype, [&](auto t) {
    const auto eigh = kernels<decltype(t)>().eigh;
    for_each_group(n, r, threads, eigh_scratch(r), [&](int64_t first, int64_t count, double* scratch) {
      eigh(xs, values, vectors, first, count, r, scratch);
    });
  });
}

void grouped_damped_inverse(DType dtype, const Stack& rs, double damping, void* out, int64_t n, int64_t r,
                            int threads) {
  with_compute_type(dtype, [&](auto t) {
    const auto damped_inverse = kernels<decltype(t)>().damped_inverse;
    for_each_group(n, r, threads, damped_inverse_scratch(r), [&](int64_t first, int64_t count, double* scratch) {
      damped_inverse(rs, damping, out, first, count, r, scratch);
    });
  });
}

void grouped_preconditioner(DType dtype, const PreconditionerArguments& arguments, int64_t n, int threads) {
  with_compute_type(dtype, [&](auto t) {
    const auto preconditioner = kernels<decltype(t)>().preconditioner;
    for_each_group(
        n, arguments.r, threads, preconditioner_scratch(arguments.r),
        [&](int64_t first, int64_t count, double* scratch) { preconditioner(arguments, first, count, scratch); });
  });
}

void grouped_solve_squares(const SolveItem* items, int64_t n, int64_t r, double damping, int threads) {
  const Kernels<double>& kernel = kernels<double>();
  for_each_group(n, r, threads, solve_squares_scratch(r), [&](int64_t first, int64_t count, double* scratch) {
    kernel.solve_squares(items + first, count, r, damping, scratch);
  });
}

void grouped_sylvester(const SylvesterArguments& arguments, int64_t n, int threads) {
  const Kernels<double>& kernel = kernels<double>();
  for_each_group(
      n, arguments.r, threads, sylvester_scratch(arguments.r),
      [&](int64_t first, int64_t count, double* scratch) { kernel.sylvester(arguments, first, count, scratch); });
}

}  // namespace lowrank
