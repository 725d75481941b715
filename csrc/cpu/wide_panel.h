// Panels of double from and to narrower storage: the transposition is done in float, on half the vectors.
#pragma once

#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

// As load_panel; `dense` is scratch for pitch × r elements.
template <class T>
inline void load_wide_panel(DType dtype, const View& view, int64_t first, int64_t rows, int64_t r, T* panel,
                            int64_t pitch, T* dense) {
  if constexpr (sizeof(T) == 8) {
    if (dtype != DType::kFloat64 && view.column_stride == 1 && view.row_stride != 1) {
      float* const narrow_panel = reinterpret_cast<float*>(dense);
      load_panel<float>(dtype, view, first, rows, r, narrow_panel, pitch, narrow_panel + pitch * r);
      for (int64_t j = 0; j < r; ++j) {
        for (int64_t k = 0; k < padded_rows(rows); k += kLanes<T>) {
          store(panel + j * pitch + k, load_as<T>(narrow_panel + j * pitch + k));
        }
      }
      return;
    }
  }
  load_panel(dtype, view, first, rows, r, panel, pitch, dense);
}

// As store_panel, likewise.
template <class T>
inline void store_wide_panel(DType dtype, const View& view, int64_t first, int64_t rows, int64_t r, const T* panel,
                             int64_t pitch, T* dense) {
  if constexpr (sizeof(T) == 8) {
    if (dtype != DType::kFloat64 && view.column_stride == 1 && view.row_stride != 1) {
      float* const narrow_panel = reinterpret_cast<float*>(dense);
      for (int64_t j = 0; j < r; ++j) narrow_run(panel + j * pitch, rows, narrow_panel + j * pitch, 1);
      store_panel<float>(dtype, view, first, rows, r, narrow_panel, pitch, narrow_panel + pitch * r);
      return;
    }
  }
  store_panel(dtype, view, first, rows, r, panel, pitch, dense);
}

}  // namespace lowrank::LOWRANK_ISA
