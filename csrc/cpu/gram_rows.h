// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/kernels.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

template <class A>
void gram_rows_in(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                  double* sums) {
  const int64_t height = gram_panel_rows(r > k ? r : k);
  const bool symmetric = item.y.data == nullptr;
  GramSums<A> gram(r, k, symmetric, scratch);
  A* const x_panel = reinterpret_cast<A*>(scratch + gram_lanes(r, k));
  A *const y_panel = x_panel + height * r, *const dense = y_panel + height * k;
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    load_wide_panel(dtype, item.x, first + begin, count, r, x_panel, height, dense);
    if (!symmetric) load_wide_panel(dtype, item.y, first + begin, count, k, y_panel, height, dense);
    gram.add(x_panel, symmetric ? x_panel : y_panel, padded_rows(count), height);
  }
  gram.add_to(sums, k);
}

template <class T>
void gram_rows(DType dtype, bool wide, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows,
               double* scratch, double* sums) {
  if (wide) {
    gram_rows_in<double>(dtype, item, r, k, first, rows, scratch, sums);
  } else {
    gram_rows_in<T>(dtype, item, r, k, first, rows, scratch, sums);
  }
}

}  // namespace lowrank::LOWRANK_ISA
