// Small dense matrices in double: Cholesky, triangular inverse and product. Row-major, rows `pitch` = small_pitch(n)
// apart, so that every row is whole vectors; what is beyond column n is zero.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// row[j] += factor · other[j] for j from `first` (rounded down to a whole vector) to the pitch.
LOWRANK_INLINE void add_row(double* row, double factor, const double* other, int64_t first, int64_t pitch) {
  const Vec<double> c = splat(factor);
  for (int64_t j = first / kLanes<double> * kLanes<double>; j < pitch; j += kLanes<double>) {
    store(row + j, load(row + j) + c * load(other + j));
  }
}
LOWRANK_INLINE void scale_row(double* row, double factor, int64_t first, int64_t pitch) {
  const Vec<double> c = splat(factor);
  for (int64_t j = first / kLanes<double> * kLanes<double>; j < pitch; j += kLanes<double>) {
    store(row + j, c * load(row + j));
  }
}

// In place: the upper triangle of a Gram matrix becomes U with UᵀU = gram, the lower one zero. False (contents
// undefined) if a pivot falls below `tolerance` times its diagonal entry: that column is numerically dependent on those
// before it.
inline bool cholesky_upper(double* gram, int64_t n, double tolerance) {
  const int64_t pitch = small_pitch(n);
  double smallest[kMaxRank];
  for (int64_t k = 0; k < n; ++k) {
    smallest[k] = tolerance * gram[k * pitch + k];
    for (int64_t j = 0; j < k; ++j) gram[k * pitch + j] = 0;
  }
  for (int64_t k = 0; k < n; ++k) {
    double* pivot_row = gram + k * pitch;
    const double pivot = pivot_row[k];
    if (!(pivot > smallest[k])) return false;
    scale_row(pivot_row, 1 / std::sqrt(pivot), k, pitch);
    for (int64_t i = k + 1; i < n; ++i) add_row(gram + i * pitch, -pivot_row[i], pivot_row, i, pitch);
  }
  // Whole vectors were updated; what fell below the diagonal goes.
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t j = k / 8 * 8; j < k; ++j) gram[k * pitch + j] = 0;
  }
  return true;
}

// inverse = U⁻¹ for upper triangular U with a non-zero diagonal.
inline void invert_upper(const double* upper, int64_t n, double* inverse) {
  const int64_t pitch = small_pitch(n);
  for (int64_t i = n - 1; i >= 0; --i) {
    double* row = inverse + i * pitch;
    for (int64_t j = 0; j < pitch; ++j) row[j] = 0;
    for (int64_t k = i + 1; k < n; ++k) add_row(row, upper[i * pitch + k], inverse + k * pitch, k, pitch);
    const double reciprocal = 1 / upper[i * pitch + i];
    scale_row(row, -reciprocal, i, pitch);
    row[i] = reciprocal;
  }
}

// right = left · right in place, both upper triangular.
inline void multiply_upper(const double* left, int64_t n, double* right) {
  const int64_t pitch = small_pitch(n);
  for (int64_t i = 0; i < n; ++i) {
    double* row = right + i * pitch;
    scale_row(row, left[i * pitch + i], i, pitch);
    for (int64_t k = i + 1; k < n; ++k) add_row(row, left[i * pitch + k], right + k * pitch, k, pitch);
  }
}

}  // namespace lowrank::LOWRANK_ISA
