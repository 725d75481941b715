// SVD of small square matrices by one-sided Jacobi rotations, in double.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

LOWRANK_INLINE double dot_rows(const double* a, const double* b, int64_t pitch) {
  Vec<double> sum = {};
  for (int64_t j = 0; j < pitch; j += kLanes<double>) sum += load(a + j) * load(b + j);
  return sum_lanes<double>(sum);
}

// (a, b) ← (c a - s b, s a + c b)
LOWRANK_INLINE void rotate_rows(double* a, double* b, double c, double s, int64_t pitch) {
  const Vec<double> cosine = splat(c), sine = splat(s);
  for (int64_t j = 0; j < pitch; j += kLanes<double>) {
    const Vec<double> x = load(a + j), y = load(b + j);
    store(a + j, cosine * x - sine * y);
    store(b + j, sine * x + cosine * y);
  }
}

// Row j becomes a unit vector orthogonal to the rows before it: the coordinate axis that they cover least, less what
// they cover of it (twice, for rounding).
inline void complete_row(double* rows, int64_t j, int64_t n) {
  const int64_t pitch = small_pitch(n);
  int64_t axis = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    double covered = 0;
    for (int64_t l = 0; l < j; ++l) covered += rows[l * pitch + i] * rows[l * pitch + i];
    if (covered < least) {
      least = covered;
      axis = i;
    }
  }
  double* row = rows + j * pitch;
  for (int64_t i = 0; i < pitch; ++i) row[i] = i == axis ? 1 : 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t l = 0; l < j; ++l) {
      const double overlap = dot_rows(rows + l * pitch, row, pitch);
      for (int64_t i = 0; i < n; ++i) row[i] -= overlap * rows[l * pitch + i];
    }
    const double scale = 1 / std::sqrt(dot_rows(row, row, pitch));
    for (int64_t i = 0; i < n; ++i) row[i] *= scale;
  }
}

// SVD of the n × n matrix C whose *columns* are the rows of `u` (pitch small_pitch(n), zeros beyond n): C = U diag(s)
// Vᵀ, s descending; then u's rows are the columns of U, v's rows the columns of V. A rank-deficient C gets a full U.
inline void jacobi_svd(double* u, double* v, double* s, int64_t n) {
  constexpr double kUnit = 0x1p-53;
  constexpr int kSweeps = 40;  // some 6 to 10 are needed; each ends the loop if it rotated nothing
  const int64_t pitch = small_pitch(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < pitch; ++j) v[i * pitch + j] = i == j ? 1 : 0;
  }
  const double tolerance = 4 * std::sqrt(static_cast<double>(n)) * kUnit;
  double negligible = 0;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      s[i] = dot_rows(u + i * pitch, u + i * pitch, pitch);
      largest = s[i] > largest ? s[i] : largest;
    }
    // Rows that are rounding noise of the largest have no direction of their own; they are completed at the end.
    negligible = largest * (n * kUnit) * (n * kUnit);
    bool rotated = false;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) {
        double *a = u + i * pitch, *b = u + j * pitch;
        if (s[i] < s[j]) {  // the longer row first: converges faster and leaves s sorted
          rotate_rows(a, b, 0, -1, pitch);
          rotate_rows(v + i * pitch, v + j * pitch, 0, -1, pitch);
          std::swap(s[i], s[j]);
        }
        if (s[j] <= negligible) continue;
        const double overlap = dot_rows(a, b, pitch);
        if (std::fabs(overlap) <= tolerance * std::sqrt(s[i] * s[j])) continue;
        rotated = true;
        const double zeta = (s[j] - s[i]) / (2 * overlap);
        const double t = (zeta < 0 ? -1 : 1) / (std::fabs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t);
        rotate_rows(a, b, c, c * t, pitch);
        rotate_rows(v + i * pitch, v + j * pitch, c, c * t, pitch);
        s[i] = dot_rows(a, a, pitch);
        s[j] = dot_rows(b, b, pitch);
      }
    }
    if (!rotated) break;
  }
  for (int64_t i = 0; i < n; ++i) {
    double* row = u + i * pitch;
    if (s[i] > negligible) {
      s[i] = std::sqrt(s[i]);
      const double scale = 1 / s[i];
      for (int64_t j = 0; j < n; ++j) row[j] *= scale;
    } else {
      s[i] = std::sqrt(s[i]);
      complete_row(u, i, n);
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
