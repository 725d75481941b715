// Systems with a symmetric positive definite matrix, from the right: X ← X (G + δI)⁻¹, rows of X as lanes.
#pragma once

#include "cpu/kernels.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/qr.h"
#include "cpu/small.h"
#include "cpu/triangular.h"

namespace lowrank::LOWRANK_ISA {

// UᵀU = gram + damping, for solve_panel in both directions. False if that is not positive definite: a pivot in double
// that is below the rounding error of its diagonal entry in T is noise.
template <class T>
bool factorize(const T* gram, int64_t r, double damping, const SolveWork<T>& work) {
  const int64_t pitch = small_pitch(r);
  constexpr double kTolerance = sizeof(T) == 4 ? 0x1p-24 : 0;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < pitch; ++j) {
      work.upper[i * pitch + j] = j < i || j >= r ? 0 : static_cast<double>(gram[j * r + i]);
    }
    work.upper[i * pitch + i] = static_cast<double>(gram[i * r + i] + static_cast<T>(damping));
  }
  if (!cholesky_upper(work.upper, r, kTolerance)) return false;
  // X U⁻¹ U⁻ᵀ: the second factor is lower triangular, which is upper triangular for columns numbered from the back.
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const T value = static_cast<T>(work.upper[i * pitch + j]);
      work.forward[i * pitch + j] = value;
      work.backward[(r - 1 - j) * pitch + r - 1 - i] = value;
    }
    work.reciprocals[i] = work.reversed[r - 1 - i] = static_cast<T>(1 / work.upper[i * pitch + i]);
  }
  return true;
}

template <class T>
void solve(DType dtype, const SolveItem& item, int64_t r, double damping, const SolveWork<T>& work, int threads) {
  if (!factorize(static_cast<const T*>(item.gram), r, damping, work)) {
    fill_nan<T>(dtype, item.out, item.rows, r);
    return;
  }
  const int64_t height = panel_rows(r), pitch = small_pitch(r);
  parallel_for(group_count(item.rows), threads, [&](int64_t g, int worker) {
    T *panel = work.tile + worker * work.tile_stride, *dense = panel + height * r;
    const int64_t end = item.rows < (g + 1) * kGroupRows ? item.rows : (g + 1) * kGroupRows;
    for (int64_t first = g * kGroupRows; first < end; first += height) {
      const int64_t rows = end - first < height ? end - first : height, padded = padded_rows(rows);
      load_panel(dtype, item.rhs, first, rows, r, panel, height, dense);
      solve_panel(panel, height, padded, r, work.forward, pitch, work.reciprocals);
      solve_panel(panel + (r - 1) * height, -height, padded, r, work.backward, pitch, work.reversed);
      store_panel(dtype, item.out, first, rows, r, panel, height, dense);
    }
  });
}

}  // namespace lowrank::LOWRANK_ISA
