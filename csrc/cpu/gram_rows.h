// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/in_place.h"
#include "cpu/kernels.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

// Panels of A; columns of A that are consecutive in memory are read where they are.
template <class A>
void gram_rows_in(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                  double* sums) {
  const int64_t height = gram_panel_rows(r > k ? r : k);
  const bool symmetric = item.y.data == nullptr;
  const bool own_type = dtype == (sizeof(A) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  GramSums<A> gram(r, k, symmetric, scratch);
  A* const x_panel = reinterpret_cast<A*>(scratch + gram_lanes(r, k));
  A *const y_panel = x_panel + height * r, *const dense = y_panel + height * k;
  struct Columns {
    const A* data;
    int64_t pitch;
  };
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    const bool whole = count % kLanes<A> == 0;
    const auto columns = [&](const View& view, int64_t width, A* panel) -> Columns {
      if (own_type && whole && view.row_stride == 1) {
        return {static_cast<const A*>(view.data) + first + begin, view.column_stride};
      }
      load_wide_panel(dtype, view, first + begin, count, width, panel, height, dense);
      return {panel, height};
    };
    const Columns x = columns(item.x, r, x_panel), y = symmetric ? x : columns(item.y, k, y_panel);
    gram.add(x.data, x.pitch, y.data, y.pitch, whole ? count : padded_rows(count));
  }
  gram.add_to(sums, k);
}

// The Gram of dense rows of T, widened to A a block at a time.
template <class A, class T>
void gram_of_dense_rows(const T* x, int64_t r, int64_t rows, double* scratch, double* sums) {
  const int64_t height = gram_panel_rows(r);
  A* const block = reinterpret_cast<A*>(scratch);
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    const T* const source = x + begin * r;
    for (int64_t i = 0; i < count * r; ++i) block[i] = static_cast<A>(source[i]);
    add_product_of_rows(static_cast<const A*>(block), static_cast<const A*>(block), count, r, true, sums);
  }
}

template <class T>
void gram_rows(DType dtype, bool wide, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows,
               double* scratch, double* sums) {
  const bool dense = item.y.data == nullptr && item.x.column_stride == 1 && item.x.row_stride == r && r % 4 == 0;
  if (!wide) {
    gram_rows_in<T>(dtype, item, r, k, first, rows, scratch, sums);
  } else if (dense && dtype == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32)) {
    gram_of_dense_rows<double>(static_cast<const T*>(item.x.data) + first * r, r, rows, scratch, sums);
  } else {
    gram_rows_in<double>(dtype, item, r, k, first, rows, scratch, sums);
  }
}

}  // namespace lowrank::LOWRANK_ISA
