// Symmetric positive definite systems, in double. A lane is a matrix.
#pragma once

#include "cpu/lanes.h"

namespace lowrank::LOWRANK_ISA {

// u = the upper triangle U with UᵀU = G + δI, from the lower triangle of the symmetric G; NaN in all that follows where
// that is not positive definite. `reciprocals` (n): of the diagonal.
inline void cholesky_lanes(double* gram, int64_t n, double damping, double* u, double* reciprocals) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  const V nan = splat(std::numeric_limits<double>::quiet_NaN());
  const V infinity = splat(std::numeric_limits<double>::infinity());
  for (int64_t k = 0; k < n; ++k) {
    V pivot = load(lanes_at(gram, n, k, k)) + splat(damping);
    for (int64_t l = 0; l < k; ++l) {
      const V value = load(lanes_at(u, n, l, k));
      pivot -= value * value;
    }
    const auto good = greater<double>(pivot, V{}) & greater<double>(infinity, pivot);
    const V root = square_root<double>(select<double>(good, pivot, nan));
    const V reciprocal = splat(1.0) / root;
    store(lanes_at(u, n, k, k), root);
    store(reciprocals + k * W, reciprocal);
    by_fours(k + 1, n, [&](int64_t j, auto count) {
      constexpr int J = decltype(count)::value;
      V sum[J];
      for (int c = 0; c < J; ++c) sum[c] = load(lanes_at(gram, n, j + c, k));
      for (int64_t l = 0; l < k; ++l) {
        const V value = load(lanes_at(u, n, l, k));
        for (int c = 0; c < J; ++c) sum[c] -= value * load(lanes_at(u, n, l, j + c));
      }
      for (int c = 0; c < J; ++c) store(lanes_at(u, n, k, j + c), sum[c] * reciprocal);
    });
  }
}

// x ← (UᵀU)⁻¹ x for x (n, columns), by substitution.
inline void solve_lanes(double* u, int64_t n, const double* reciprocals, double* x, int64_t columns) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  by_fours(0, columns, [&](int64_t j, auto count) {
    constexpr int J = decltype(count)::value;
    // Row i from the rows [first, end), which are done; their coefficients are `step` apart.
    const auto substitute = [&](int64_t i, int64_t first, int64_t end, const double* coefficient, int64_t step) {
      V sum[J];
      for (int c = 0; c < J; ++c) sum[c] = load(lanes_at(x, columns, i, j + c));
      for (int64_t k = first; k < end; ++k, coefficient += step) {
        const V value = load(coefficient);
        for (int c = 0; c < J; ++c) sum[c] -= value * load(lanes_at(x, columns, k, j + c));
      }
      for (int c = 0; c < J; ++c) store(lanes_at(x, columns, i, j + c), sum[c] * load(reciprocals + i * W));
    };
    for (int64_t i = 0; i < n; ++i) substitute(i, 0, i, lanes_at(u, n, 0, i), n * W);
    for (int64_t i = n - 1; i >= 0; --i) substitute(i, i + 1, n, lanes_at(u, n, i, i + 1), W);
  });
}

// X ← X (G + δI)⁻¹ for `count` square X, all of double; scratch for solve_squares_scratch(n) doubles.
inline void solve_squares(const SolveItem* items, int64_t count, int64_t n, double damping, double* scratch) {
  constexpr int W = kLanes<double>;
  double *const gram = scratch, *const u = gram + n * n * W, *const x = u + n * n * W,
                *const reciprocals = x + n * n * W;
  for (; count > 0; items += W, count -= W) {
    const int64_t here = count < W ? count : W;
    for (int64_t lane = 0; lane < W; ++lane) {  // what is missing is solved like the first
      const SolveItem& item = items[lane < here ? lane : 0];
      set_lane(View{const_cast<void*>(item.gram), n, 1}, n, lane, gram);
      set_lane(View{item.rhs.data, item.rhs.column_stride, item.rhs.row_stride}, n, lane, x);  // columns of Xᵀ
    }
    cholesky_lanes(gram, n, damping, u, reciprocals);
    solve_lanes(u, n, reciprocals, x, n);
    for (int64_t lane = 0; lane < here; ++lane) {
      const View& out = items[lane].out;
      get_lane(x, n, lane, View{out.data, out.column_stride, out.row_stride});
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
