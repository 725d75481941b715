// Thin Gram products XᵀY of matrices in panels.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// Consecutive panels of a tall matrix: `rows` rows in all, column pitch panel_rows(r), r columns.
template <class T>
struct Panels {
  T* data;
  int64_t rows;
  int64_t r;

  int64_t height() const { return panel_rows(r); }
  int64_t count() const { return (rows + height() - 1) / height(); }
  T* panel(int64_t p) const { return data + p * height() * r; }
  // Rows of panel p, without and with the zeros behind them.
  int64_t rows_of(int64_t p) const { return rows - p * height() < height() ? rows - p * height() : height(); }
  int64_t padded_rows_of(int64_t p) const { return padded_rows(rows_of(p)); }
  // Rows [group · kGroupRows, (group + 1) · kGroupRows).
  Panels group(int64_t g) const {
    const int64_t first = g * kGroupRows;
    return {data + first * r, rows - first < kGroupRows ? rows - first : kGroupRows, r};
  }
};

// sums[i * J + j] = Σ_k x_(i0+i)[k] · y_(j0+j)[k]; a column beyond the last one stands for the last one.
template <class T, int I, int J>
LOWRANK_INLINE void gram_block(const Panels<T>& x, const Panels<T>& y, int64_t i0, int64_t j0, T* sums) {
  static_assert(I * J % kLanes<T> == 0, "sums are reduced a vector at a time");
  const int64_t pitch = x.height(), y_pitch = y.height();
  int64_t x_column[I], y_column[J];
  for (int i = 0; i < I; ++i) x_column[i] = (i0 + i < x.r ? i0 + i : x.r - 1) * pitch;
  for (int j = 0; j < J; ++j) y_column[j] = (j0 + j < y.r ? j0 + j : y.r - 1) * y_pitch;
  Vec<T> sum[I * J] = {};
  for (int64_t p = 0; p < x.count(); ++p) {
    const T *x_panel = x.panel(p), *y_panel = y.panel(p);
    const int64_t rows = x.padded_rows_of(p);
    for (int64_t k = 0; k < rows; k += kLanes<T>) {
      Vec<T> a[I], b[J];
      for (int i = 0; i < I; ++i) a[i] = load(x_panel + x_column[i] + k);
      for (int j = 0; j < J; ++j) b[j] = load(y_panel + y_column[j] + k);
      for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) sum[i * J + j] += a[i] * b[j];
      }
    }
  }
  for (int s = 0; s < I * J; s += kLanes<T>) store(sums + s, sum_lanes_of_each<T>(sum + s));
}

// gram (x.r, pitch) = XᵀX of one group of rows, its upper triangle; sums in T, at most kGroupRows / kLanes terms a
// lane.
template <class T>
void gram_of_group(const Panels<T>& x, double* gram, int64_t pitch) {
  constexpr int I = kManyRegisters ? 4 : 2, J = 4;
  for (int64_t i0 = 0; i0 < x.r; i0 += I) {
    for (int64_t j0 = i0 / J * J; j0 < x.r; j0 += J) {
      T sums[I * J];
      gram_block<T, I, J>(x, x, i0, j0, sums);
      for (int i = 0; i < I && i0 + i < x.r; ++i) {
        for (int j = 0; j < J && j0 + j < x.r; ++j)
          gram[(i0 + i) * pitch + j0 + j] = static_cast<double>(sums[i * J + j]);
      }
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
