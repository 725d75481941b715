// Triangular solves with a panel of many rows: X ← X U⁻¹, by substitution and not by an explicit inverse, so that
// Q U = X holds to rounding however ill-conditioned U is.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// J columns from j0 on, V vectors of rows; the columns before j0 are solved already.
template <class T, int J, int V>
LOWRANK_INLINE void solve_block(T* panel, int64_t pitch, int64_t j0, const T* upper, int64_t upper_pitch,
                                const T* reciprocals) {
  Vec<T> x[J][V];
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) x[j][v] = load(panel + (j0 + j) * pitch + v * kLanes<T>);
  }
  for (int64_t i = 0; i < j0; ++i) {
    Vec<T> q[V];
    for (int v = 0; v < V; ++v) q[v] = load(panel + i * pitch + v * kLanes<T>);
    for (int j = 0; j < J; ++j) {
      const Vec<T> c = splat(upper[i * upper_pitch + j0 + j]);
      for (int v = 0; v < V; ++v) x[j][v] -= c * q[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    const Vec<T> reciprocal = splat(reciprocals[j0 + j]);
    for (int v = 0; v < V; ++v) x[j][v] *= reciprocal;
    for (int l = j + 1; l < J; ++l) {
      const Vec<T> c = splat(upper[(j0 + j) * upper_pitch + j0 + l]);
      for (int v = 0; v < V; ++v) x[l][v] -= c * x[j][v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) store(panel + (j0 + j) * pitch + v * kLanes<T>, x[j][v]);
  }
}

// The columns from j0 on, in blocks of J, the rest in blocks of J/2, J/4, … 1.
template <class T, int J, int V>
LOWRANK_INLINE void solve_columns(T* panel, int64_t pitch, int64_t j0, int64_t r, const T* upper, int64_t upper_pitch,
                                  const T* reciprocals) {
  for (; j0 + J <= r; j0 += J) solve_block<T, J, V>(panel, pitch, j0, upper, upper_pitch, reciprocals);
  if constexpr (J > 1) {
    if (j0 < r) solve_columns<T, J / 2, V>(panel, pitch, j0, r, upper, upper_pitch, reciprocals);
  }
}

// panel ← panel · U⁻¹ for `rows` rows (a multiple of kRowAlignment); `reciprocals` of U's diagonal.
template <class T>
inline void solve_panel(T* panel, int64_t pitch, int64_t rows, int64_t r, const T* upper, int64_t upper_pitch,
                        const T* reciprocals) {
  constexpr int J = kManyRegisters ? 8 : 4, V = 2;
  for (int64_t k = 0; k < rows; k += V * kLanes<T>) {
    solve_columns<T, J, V>(panel + k, pitch, 0, r, upper, upper_pitch, reciprocals);
  }
}

// Columns [j0, j0 + J) of panel · W for upper triangular W, V vectors of rows, in place: the columns from j0 + J on are
// done already, those before j0 are not.
template <class T, int J, int V>
LOWRANK_INLINE void multiply_upper_block(T* panel, int64_t pitch, int64_t j0, const T* upper, int64_t upper_pitch) {
  Vec<T> sum[J][V] = {};
  for (int64_t i = 0; i < j0; ++i) {
    Vec<T> x[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(panel + i * pitch + v * kLanes<T>);
    LOWRANK_UNROLL
    for (int j = 0; j < J; ++j) {
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) sum[j][v] += upper[i * upper_pitch + j0 + j] * x[v];
    }
  }
  LOWRANK_UNROLL
  for (int i = 0; i < J; ++i) {
    Vec<T> x[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(panel + (j0 + i) * pitch + v * kLanes<T>);
    LOWRANK_UNROLL
    for (int j = i; j < J; ++j) {
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) sum[j][v] += upper[(j0 + i) * upper_pitch + j0 + j] * x[v];
    }
  }
  LOWRANK_UNROLL
  for (int j = 0; j < J; ++j) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) store(panel + (j0 + j) * pitch + v * kLanes<T>, sum[j][v]);
  }
}

// The columns [j0, r), from the last: the rest in blocks of J/2, J/4, … 1 and before it blocks of J.
template <class T, int J, int V>
LOWRANK_INLINE void multiply_upper_columns(T* panel, int64_t pitch, int64_t j0, int64_t r, const T* upper,
                                           int64_t upper_pitch) {
  int64_t j = j0 + (r - j0) / J * J;
  if constexpr (J > 1) {
    if (j < r) multiply_upper_columns<T, J / 2, V>(panel, pitch, j, r, upper, upper_pitch);
  }
  while ((j -= J) >= j0) multiply_upper_block<T, J, V>(panel, pitch, j, upper, upper_pitch);
}

// panel ← panel · W for `rows` rows (a multiple of kRowAlignment): where W is the inverse of a well-conditioned U this
// is as good as solve_panel, and nothing waits for the column before it.
template <class T>
inline void multiply_upper_panel(T* panel, int64_t pitch, int64_t rows, int64_t r, const T* upper,
                                 int64_t upper_pitch) {
  constexpr int J = kManyRegisters ? 8 : 4, V = 2;
  for (int64_t k = 0; k < rows; k += V * kLanes<T>) {
    multiply_upper_columns<T, J, V>(panel + k, pitch, 0, r, upper, upper_pitch);
  }
}

}  // namespace lowrank::LOWRANK_ISA
