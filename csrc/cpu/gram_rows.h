// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/kernels.h"
#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

template <class T>
void gram_rows(DType dtype, bool wide, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows,
               T* scratch, double* sums) {
  const int64_t height = panel_rows(r > k ? r : k);
  T *x_panels = scratch, *y_panels = x_panels + kBlockRows * r, *dense = y_panels + kBlockRows * k;
  const auto load_block = [&](const View& view, const Panels<T>& x, int64_t begin) {
    for (int64_t p = 0; p < x.count(); ++p) {
      load_panel(dtype, view, begin + p * height, x.rows_of(p), x.r, x.panel(p), height, dense);
    }
  };
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t block = rows - begin < kBlockRows ? rows - begin : kBlockRows;
    const Panels<T> x{x_panels, block, r, height}, y{y_panels, block, k, height};
    load_block(item.x, x, first + begin);
    if (item.y.data) load_block(item.y, y, first + begin);
    add_gram(wide, x, item.y.data ? y : x, !item.y.data, sums, k);
  }
}

}  // namespace lowrank::LOWRANK_ISA
