// Systems with a symmetric positive definite matrix, from the right: X ← X (G + δI)⁻¹.
//
// In double by substitution, rows of X as lanes. In float by a product with the inverse, which is formed in double and
// rounded once: its error, eps·‖X‖‖(G + δI)⁻¹‖, is below that of substitution with a factor in float, which has the
// condition number of G in it; and a product has no chain of operations to wait for.
#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/qr.h"
#include "cpu/small.h"
#include "cpu/thin_product.h"
#include "cpu/triangular.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

// work.upper = U with UᵀU = gram + damping. False if that is not positive definite: a pivot in double that is below the
// rounding error of its diagonal entry in T is noise.
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
  return cholesky_upper(work.upper, r, kTolerance);
}

// What solve_panel needs for both directions: X U⁻¹ U⁻ᵀ. The second factor is lower triangular, which is upper
// triangular for columns numbered from the back.
template <class T>
void prepare_substitution(int64_t r, const SolveWork<T>& work) {
  const int64_t pitch = small_pitch(r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const T value = static_cast<T>(work.upper[i * pitch + j]);
      work.forward[i * pitch + j] = value;
      work.backward[(r - 1 - j) * pitch + r - 1 - i] = value;
    }
    work.reciprocals[i] = work.reversed[r - 1 - i] = static_cast<T>(1 / work.upper[i * pitch + i]);
  }
}

// work.forward = (UᵀU)⁻¹ = U⁻¹ U⁻ᵀ, dense (r, r).
template <class T>
void prepare_inverse(int64_t r, const SolveWork<T>& work) {
  const int64_t pitch = small_pitch(r);
  invert_upper(work.upper, r, work.inverse);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i; j < r; ++j) {
      const double *a = work.inverse + i * pitch, *b = work.inverse + j * pitch;
      Vec<double> lanes{};
      for (int64_t k = j / kLanes<double> * kLanes<double>; k < pitch; k += kLanes<double>) {
        lanes += load(a + k) * load(b + k);
      }
      work.forward[i * r + j] = work.forward[j * r + i] = static_cast<T>(sum_lanes<double>(lanes));
    }
  }
}

// Rows [first, end) with what was prepared; `panel` is scratch for three panels.
template <class T>
void solve_rows(DType dtype, const SolveItem& item, int64_t first, int64_t end, int64_t r, const SolveWork<T>& work,
                T* panel) {
  constexpr bool kInverse = sizeof(T) == 4;
  if constexpr (kInverse) {
    if (dtype == DType::kFloat32 && is_thin(item.rhs, item.out, r)) {
      const bool in_place = item.out.data == item.rhs.data;  // then the lines are in the cache
      const bool streams = work.streams && !in_place && can_stream(item.out, r, sizeof(T));
      const auto multiply = streams ? multiply_thin<T, true> : multiply_thin<T, false>;
      multiply(item.rhs, item.out, first, end - first, r, work.forward);
      return;
    }
  }
  // In double, panels of half as many rows: two of them are to fit the first-level cache.
  const int64_t height = panel_rows(r) * 4 / static_cast<int64_t>(sizeof(T)), pitch = small_pitch(r);
  T *product = panel + height * r, *dense = product + height * r;
  for (; first < end; first += height) {
    const int64_t rows = end - first < height ? end - first : height, padded = padded_rows(rows);
    load_wide_panel(dtype, item.rhs, first, rows, r, panel, height, dense);
    if (kInverse) {
      multiply_panel(panel, height, padded, r, work.forward, r, 1, r, product, height);
      store_wide_panel(dtype, item.out, first, rows, r, product, height, dense);
    } else {
      solve_panel(panel, height, padded, r, work.forward, pitch, work.reciprocals);
      solve_panel(panel + (r - 1) * height, -height, padded, r, work.backward, pitch, work.reversed);
      store_wide_panel(dtype, item.out, first, rows, r, panel, height, dense);
    }
  }
}

template <class T>
void solve(DType dtype, const SolveItem& item, int64_t r, double damping, const SolveWork<T>& work, int threads) {
  if (!factorize(static_cast<const T*>(item.gram), r, damping, work)) {
    fill_nan<T>(dtype, item.out, item.rows, r);
    return;
  }
  if (sizeof(T) == 4) {
    prepare_inverse(r, work);
  } else {
    prepare_substitution(r, work);
  }
  parallel_for(group_count(item.rows), threads, [&](int64_t g, int worker) {
    const int64_t first = g * kGroupRows;
    const int64_t end = item.rows - first < kGroupRows ? item.rows : first + kGroupRows;
    solve_rows(dtype, item, first, end, r, work, work.tile + worker * work.tile_stride);
  });
}

}  // namespace lowrank::LOWRANK_ISA
