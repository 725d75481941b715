// From damped Gram matrices the r × r maps of a preconditioned step, in double: (G + δI)⁻¹ by Cholesky, and
// I - (G + δI)⁻¹K. A lane is a matrix, so that square roots, divisions and short rows keep the vector units busy.
#pragma once

#include "cpu/lanes.h"

namespace lowrank::LOWRANK_ISA {

// The upper triangles of symmetric matrices become U with UᵀU = G; NaN in all that follows where one is not positive
// definite. `reciprocals` (n): of the diagonal.
inline void cholesky_lanes(double* g, int64_t n, double* reciprocals) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  const V nan = splat(std::numeric_limits<double>::quiet_NaN());
  const V infinity = splat(std::numeric_limits<double>::infinity());
  for (int64_t k = 0; k < n; ++k) {
    V pivot = load(lanes_at(g, n, k, k));
    for (int64_t l = 0; l < k; ++l) {
      const V value = load(lanes_at(g, n, l, k));
      pivot -= value * value;
    }
    const auto good = greater<double>(pivot, V{}) & greater<double>(infinity, pivot);
    const V root = square_root<double>(select<double>(good, pivot, nan));
    const V reciprocal = splat(1.0) / root;
    store(lanes_at(g, n, k, k), root);
    store(reciprocals + k * W, reciprocal);
    by_fours(k + 1, n, [&](int64_t j, auto count) {
      constexpr int J = decltype(count)::value;
      V sum[J];
      for (int c = 0; c < J; ++c) sum[c] = load(lanes_at(g, n, k, j + c));
      for (int64_t l = 0; l < k; ++l) {
        const V value = load(lanes_at(g, n, l, k));
        for (int c = 0; c < J; ++c) sum[c] -= value * load(lanes_at(g, n, l, j + c));
      }
      for (int c = 0; c < J; ++c) store(lanes_at(g, n, k, j + c), sum[c] * reciprocal);
    });
  }
}

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

// x = I - (UᵀU)⁻¹ x, by substitution.
inline void one_minus_solution_lanes(double* u, int64_t n, const double* reciprocals, double* x) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  by_fours(0, n, [&](int64_t j, auto count) {
    constexpr int J = decltype(count)::value;
    // Row i from the rows [first, end), which are done; their coefficients are `step` apart.
    const auto substitute = [&](int64_t i, int64_t first, int64_t end, const double* coefficient, int64_t step) {
      V sum[J];
      for (int c = 0; c < J; ++c) sum[c] = load(lanes_at(x, n, i, j + c));
      for (int64_t k = first; k < end; ++k, coefficient += step) {
        const V value = load(coefficient);
        for (int c = 0; c < J; ++c) sum[c] -= value * load(lanes_at(x, n, k, j + c));
      }
      for (int c = 0; c < J; ++c) store(lanes_at(x, n, i, j + c), sum[c] * load(reciprocals + i * W));
    };
    for (int64_t i = 0; i < n; ++i) substitute(i, 0, i, lanes_at(u, n, 0, i), n * W);
    for (int64_t i = n - 1; i >= 0; --i) substitute(i, i + 1, n, lanes_at(u, n, i, i + 1), W);
    for (int64_t i = 0; i < n; ++i) {
      for (int c = 0; c < J; ++c) {
        double* const at = lanes_at(x, n, i, j + c);
        store(at, splat(i == j + c ? 1.0 : 0.0) - load(at));
      }
    }
  });
}

// `count` (n, n) matrices into the lanes of `to`; an identity takes the place of what is missing in the group.
template <class S>
LOWRANK_INLINE void gather_lanes(const S* matrices, int64_t n, int64_t count, double* to) {
  constexpr int W = kLanes<double>;
  const int64_t area = n * n;
  int64_t e = 0;
  for (; e + W <= area; e += W) {  // of each matrix W elements, of W elements each matrix's
    Vec<double> v[W] = {};
    for (int lane = 0; lane < count; ++lane) v[lane] = load_as<double>(matrices + lane * area + e);
    perfect_shuffles<double, W, log2_of(W)>(v);
    for (int i = 0; i < W; ++i) store(to + (e + i) * W, v[i]);
  }
  for (; e < area; ++e) {
    for (int lane = 0; lane < W; ++lane) {
      to[e * W + lane] = lane < count ? static_cast<double>(matrices[lane * area + e]) : 0;
    }
  }
  for (int64_t lane = count; lane < W; ++lane) {
    for (int64_t i = 0; i < n; ++i) lanes_at(to, n, i, i)[lane] = 1;
  }
}

template <class T>
LOWRANK_INLINE void scatter_lanes(double* lanes, int64_t n, int64_t count, double weight, bool transposed, T* to) {
  constexpr int W = kLanes<double>;
  const auto from = [&](int64_t i, int64_t j) {
    return transposed ? lanes_at(lanes, n, j, i) : lanes_at(lanes, n, i, j);
  };
  for (int64_t i = 0; i < n; ++i) {
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      Vec<double> v[W];
      for (int c = 0; c < W; ++c) v[c] = splat(weight) * load(from(i, j + c));
      perfect_shuffles<double, W, log2_of(W)>(v);
      for (int lane = 0; lane < count; ++lane) store_as<double>(to + (lane * n + i) * n + j, v[lane]);
    }
    for (; j < n; ++j) {
      for (int lane = 0; lane < count; ++lane) {
        to[(lane * n + i) * n + j] = static_cast<T>(weight * from(i, j)[lane]);
      }
    }
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
    // Only the lower triangles are read: as columns of the upper ones.
    gather_lanes(of.grams + first * area, n, here, inverse);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        const auto value = load(lanes_at(inverse, n, j, i));
        store(lanes_at(g, n, i, j), i == j ? value + splat(of.damping) : value);
      }
    }
    cholesky_lanes(g, n, reciprocals);
    invert_upper_lanes(g, n, reciprocals, inverse);
    square_upper_lanes(inverse, n, p);
    scatter_lanes(p, n, here, of.weight, false, static_cast<T*>(of.out) + first * area);
    if (of.drifts == nullptr) continue;
    gather_lanes(static_cast<const T*>(of.drifts) + first * area, n, here, p);
    one_minus_solution_lanes(g, n, reciprocals, p);
    scatter_lanes(p, n, here, 1.0, of.transposed, static_cast<T*>(of.realigned) + first * area);
  }
}

}  // namespace lowrank::LOWRANK_ISA
