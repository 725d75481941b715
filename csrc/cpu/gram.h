// Thin Gram products XᵀY of matrices in panels.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// Consecutive panels of a tall matrix: `rows` rows in all, r columns, each panel `step` rows high (and its column
// pitch).
template <class T>
struct Panels {
  T* data;
  int64_t rows;
  int64_t r;
  int64_t step = panel_rows(r);

  int64_t height() const { return step; }
  int64_t count() const { return (rows + height() - 1) / height(); }
  T* panel(int64_t p) const { return data + p * height() * r; }
  // Rows of panel p, without and with the zeros behind them.
  int64_t rows_of(int64_t p) const { return rows - p * height() < height() ? rows - p * height() : height(); }
  int64_t padded_rows_of(int64_t p) const { return padded_rows(rows_of(p)); }
  // Rows [group · kGroupRows, (group + 1) · kGroupRows).
  Panels group(int64_t g) const {
    const int64_t first = g * kGroupRows;
    return {data + first * r, rows - first < kGroupRows ? rows - first : kGroupRows, r, step};
  }
};

// sums[i * J + j] = Σ_k x_(i0+i)[k] · y_(j0+j)[k], products and sums in A; a column beyond the last one stands for the
// last one.
template <class A, class T, int I, int J>
LOWRANK_INLINE void gram_block(const Panels<T>& x, const Panels<T>& y, int64_t i0, int64_t j0, A* sums) {
  static_assert(I * J % kLanes<A> == 0, "sums are reduced a vector at a time");
  const int64_t pitch = x.height();  // and y's
  int64_t x_column[I], y_column[J];
  for (int i = 0; i < I; ++i) x_column[i] = (i0 + i < x.r ? i0 + i : x.r - 1) * pitch;
  for (int j = 0; j < J; ++j) y_column[j] = (j0 + j < y.r ? j0 + j : y.r - 1) * pitch;
  Vec<A> sum[I * J] = {};
  for (int64_t p = 0; p < x.count(); ++p) {
    const T *x_panel = x.panel(p), *y_panel = y.panel(p);
    const int64_t rows = x.padded_rows_of(p);
    for (int64_t k = 0; k < rows; k += kLanes<A>) {
      Vec<A> a[I], b[J];
      for (int i = 0; i < I; ++i) a[i] = load_as<A>(x_panel + x_column[i] + k);
      for (int j = 0; j < J; ++j) b[j] = load_as<A>(y_panel + y_column[j] + k);
      for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) sum[i * J + j] += a[i] * b[j];
      }
    }
  }
  for (int s = 0; s < I * J; s += kLanes<A>) store(sums + s, sum_lanes_of_each<A>(sum + s));
}

// gram (x.r, pitch) += XᵀY, and only its upper triangle for Y = X (`symmetric`); x and y have panels of one height. A
// lane of A sums up rows / kLanes<A> products, the lanes and what is there already are added up in double.
template <class A, class T>
void add_gram(const Panels<T>& x, const Panels<T>& y, bool symmetric, double* gram, int64_t pitch) {
  constexpr int I = kManyRegisters ? 4 : 2, J = 4;
  for (int64_t i0 = 0; i0 < x.r; i0 += I) {
    for (int64_t j0 = symmetric ? i0 / J * J : 0; j0 < y.r; j0 += J) {
      A sums[I * J];
      gram_block<A, T, I, J>(x, y, i0, j0, sums);
      for (int i = 0; i < I && i0 + i < x.r; ++i) {
        for (int j = 0; j < J && j0 + j < y.r; ++j) {
          gram[(i0 + i) * pitch + j0 + j] += static_cast<double>(sums[i * J + j]);
        }
      }
    }
  }
}

// The same, with the accumulator chosen when it runs: double, or T.
template <class T>
void add_gram(bool wide, const Panels<T>& x, const Panels<T>& y, bool symmetric, double* gram, int64_t pitch) {
  if (wide) {
    add_gram<double>(x, y, symmetric, gram, pitch);
  } else {
    add_gram<T>(x, y, symmetric, gram, pitch);
  }
}

}  // namespace lowrank::LOWRANK_ISA
