// From damped Gram matrices the r × r maps of a preconditioned step, in double: (G + δI)⁻¹ by Cholesky, and
// I - (G + δI)⁻¹K. A lane is a matrix, so that square roots, divisions and short rows keep the vector units busy.
#pragma once

#include "cpu/cholesky_lanes.h"

namespace lowrank::LOWRANK_ISA {

// product = W Wᵀ for upper triangular W, all of it.
inline void square_upper_lanes(double* w, int64_t n, double* product) {
  using V = Vec<double>;
  for (int64_t i = 0; i < n; ++i) {
    by_fours(i, n, [&](int64_t j, auto count) {
      constexpr int J = decltype(count)::value;
      V sum[J] = {};
      for (int c = 0; c < J; ++c) {
        for (int64_t k = j + c; k < j + J; ++k) {
          sum[c] += load(lanes_at(w, n, i, k)) * load(lanes_at(w, n, j + c, k));
        }
      }
      for (int64_t k = j + J; k < n; ++k) {
        const V value = load(lanes_at(w, n, i, k));
        for (int c = 0; c < J; ++c) sum[c] += value * load(lanes_at(w, n, j + c, k));
      }
      for (int c = 0; c < J; ++c) {
        store(lanes_at(product, n, i, j + c), sum[c]);
        store(lanes_at(product, n, j + c, i), sum[c]);
      }
    });
  }
}

template <class T>
void preconditioner(const PreconditionerArguments& of, int64_t first, int64_t count, double* scratch) {
  constexpr int W = kLanes<double>;
  const int64_t n = of.r, area = n * n;
  double *const g = scratch, *const inverse = g + area * W, *const p = inverse + area * W;
  double* const reciprocals = p + area * W;
  for (; count > 0; first += W, count -= W) {
    const int64_t here = count < W ? count : W;
    gather_lanes(of.grams + first * area, n, here, inverse);
    cholesky_lanes(inverse, n, of.damping, g, reciprocals);
    invert_upper_lanes(g, n, reciprocals, inverse);
    square_upper_lanes(inverse, n, p);
    scatter_lanes(p, n, here, of.weight, false, static_cast<T*>(of.out) + first * area);
    if (of.drifts == nullptr) continue;
    gather_lanes(static_cast<const T*>(of.drifts) + first * area, n, here, p);
    solve_lanes(g, n, reciprocals, p, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double* const at = lanes_at(p, n, i, j);
        store(at, splat(i == j ? 1.0 : 0.0) - load(at));
      }
    }
    scatter_lanes(p, n, here, 1.0, of.transposed, static_cast<T*>(of.realigned) + first * area);
  }
}

}  // namespace lowrank::LOWRANK_ISA
