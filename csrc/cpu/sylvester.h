// L X + X R = C for symmetric positive semidefinite L and R, in double, through the eigenvectors of both. A lane is a
// matrix.
#pragma once

#include "cpu/eigh.h"

namespace lowrank::LOWRANK_ISA {

// out = A B, with the transpose of A, or of B, in its place if so told.
template <bool kA, bool kB>
void multiply_lanes(double* a, double* b, int64_t n, double* out) {
  using V = Vec<double>;
  for (int64_t i = 0; i < n; ++i) {
    by_fours(0, n, [&](int64_t j, auto count) {
      constexpr int J = decltype(count)::value;
      V sum[J] = {};
      for (int64_t k = 0; k < n; ++k) {
        const V value = load(kA ? lanes_at(a, n, k, i) : lanes_at(a, n, i, k));
        for (int c = 0; c < J; ++c) sum[c] += value * load(kB ? lanes_at(b, n, j + c, k) : lanes_at(b, n, k, j + c));
      }
      for (int c = 0; c < J; ++c) store(lanes_at(out, n, i, j + c), sum[c]);
    });
  }
}

// Eigenvalues scaled back; the largest of them.
inline Vec<double> scale_back(const EighLanes& x, const LaneFacts& facts) {
  constexpr int W = EighLanes::kWidth;
  using V = EighLanes::V;
  alignas(64) double half[W], rest[W];
  for (int lane = 0; lane < W; ++lane) {
    const PowerOfTwo scale(facts.exponents[lane]);
    half[lane] = scale.half;
    rest[lane] = scale.rest;
  }
  V largest = splat(-std::numeric_limits<double>::infinity());
  for (int64_t i = 0; i < x.n; ++i) {
    const V value = x.d(i) * load(half) * load(rest);
    x.set_d(i, value);
    largest = select<double>(greater<double>(value, largest), value, largest);
  }
  return largest;
}

// Where the sum of two eigenvalues is nothing beside the largest sum, X gets nothing. NaN where L or R is not finite.
inline void sylvester(const SylvesterArguments& of, int64_t first, int64_t count, double* scratch) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  const int64_t n = of.r, area = n * n;
  const EighLanes l(n, scratch), r(n, scratch + eigh_scratch(n));
  double *const c = scratch + 2 * eigh_scratch(n), *const work = c + area * W;
  for (; count > 0; first += W, count -= W) {
    const int64_t here = count < W ? count : W;
    bool converged_l[W], converged_r[W];
    const LaneFacts facts_l = decompose<double>(of.left, first, here, true, l, converged_l);
    const LaneFacts facts_r = decompose<double>(of.right, first, here, true, r, converged_r);
    const V negligible = (scale_back(l, facts_l) + scale_back(r, facts_r)) * splat(0x1p-52 * static_cast<double>(n)),
            one = splat(1.0);
    // The eigenvectors are the rows of `matrix`: C in both bases, divided, and back.
    gather_lanes(of.rhs + first * area, n, here, c);
    multiply_lanes<false, false>(l.matrix, c, n, work);
    multiply_lanes<false, true>(work, r.matrix, n, c);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double* const at = lanes_at(c, n, i, j);
        const V sum = l.d(i) + r.d(j);
        const auto some = greater<double>(sum, negligible);
        store(at, select<double>(some, load(at) / select<double>(some, sum, one), V{}));
      }
    }
    multiply_lanes<true, false>(l.matrix, c, n, work);
    multiply_lanes<false, false>(work, r.matrix, n, c);
    double* const out = of.out + first * area;
    scatter_lanes(c, n, here, 1.0, false, out);
    for (int64_t lane = 0; lane < here; ++lane) {
      if (facts_l.finite[lane] && facts_r.finite[lane] && converged_l[lane] && converged_r[lane]) continue;
      std::fill(out + lane * area, out + (lane + 1) * area, std::numeric_limits<double>::quiet_NaN());
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
