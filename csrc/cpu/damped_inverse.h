// Inverses of triangular factors with damping, in double: the QR of [R; √δ I] by Householder reflections, so that the
// condition number is not squared, and substitution. A lane is a matrix.
#pragma once

#include "cpu/lanes.h"

namespace lowrank::LOWRANK_ISA {

// R becomes the triangular factor of [R; E], for upper triangular E, with a diagonal that is not negative.
inline void append_rows(double* r, double* e, int64_t n) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  for (int64_t k = 0; k < n; ++k) {
    // Column k: only row k of R and the rows of E up to k have entries in it.
    V tail{};
    for (int64_t i = 0; i <= k; ++i) {
      const V value = load(e + (i * n + k) * W);
      tail += value * value;
    }
    double* const row = r + k * n * W;
    const V head = load(row + k * W), norm = square_root<double>(head * head + tail);
    // Without cancellation; v is (v0, the column of E).
    const V v0 = select<double>(greater<double>(head, V{}), V{} - tail / (head + norm), head - norm);
    const V square = v0 * v0 + tail;
    const auto some = greater<double>(square, V{});
    const V tau = splat(2.0) / select<double>(some, square, splat(1.0));
    store(row + k * W, select<double>(some, norm, head));
    for (int64_t j = k + 1; j < n; ++j) {
      const V value = load(row + j * W);
      V dot = v0 * value;
      for (int64_t i = 0; i <= k; ++i) dot += load(e + (i * n + k) * W) * load(e + (i * n + j) * W);
      dot = select<double>(some, tau * dot, V{});
      store(row + j * W, value - dot * v0);
      for (int64_t i = 0; i <= k; ++i) {
        double* const at = e + (i * n + j) * W;
        store(at, load(at) - dot * load(e + (i * n + k) * W));
      }
    }
  }
}

template <class T>
void damped_inverse(const Stack& stack, double damping, void* out, int64_t first, int64_t count, int64_t n,
                    double* scratch) {
  constexpr int W = kLanes<double>;
  double *const r = scratch, *const e = scratch + n * n * W, *const reciprocals = e + n * n * W;
  const double root = std::sqrt(damping);
  for (; count > 0; first += W, count -= W) {
    const int64_t here = count < W ? count : W;
    const LaneFacts facts = load_lanes<T>(stack, first, here, n, root, r);
    for (int64_t i = 0; i < n * n * W; ++i) e[i] = 0;
    for (int lane = 0; lane < W; ++lane) {
      const double scaled = PowerOfTwo(-facts.exponents[lane])(root);
      for (int64_t i = 0; i < n; ++i) e[(i * n + i) * W + lane] = scaled;
    }
    append_rows(r, e, n);
    for (int64_t i = 0; i < n; ++i) store(reciprocals + i * W, splat(1.0) / load(lanes_at(r, n, i, i)));
    invert_upper_lanes(r, n, reciprocals, e);
    for (int64_t lane = 0; lane < here; ++lane) {
      T* to = static_cast<T*>(out) + (first + lane) * n * n;
      const PowerOfTwo scaled(-facts.exponents[lane]);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double value = j < i ? 0 : scaled(e[(i * n + j) * W + lane]);
          to[i * n + j] = facts.finite[lane] ? static_cast<T>(value) : std::numeric_limits<T>::quiet_NaN();
        }
      }
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
