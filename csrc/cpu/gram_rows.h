// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/in_place.h"
#include "cpu/kernels.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

// Columns of T that are consecutive in memory are read where they are; products and sums in A.
template <class A, class T>
void gram_of_columns(const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                     double* sums) {
  GramSums<A> gram(r, k, item.y.data == nullptr, scratch);
  const T* const x = static_cast<const T*>(item.x.data) + first;
  const T* const y = item.y.data ? static_cast<const T*>(item.y.data) + first : x;
  constexpr int64_t kHeight = 256;
  for (int64_t begin = 0; begin < rows; begin += kHeight) {
    gram.add(x + begin, item.x.column_stride, y + begin, item.y.data ? item.y.column_stride : item.x.column_stride,
             rows - begin < kHeight ? rows - begin : kHeight);
  }
  gram.add_to(sums, k);
}

// Panels of A, from any storage type and strides.
template <class A>
void gram_of_panels(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows,
                    double* scratch, double* sums) {
  const int64_t height = gram_panel_rows(r > k ? r : k);
  const bool symmetric = item.y.data == nullptr;
  GramSums<A> gram(r, k, symmetric, scratch);
  A* const x_panel = reinterpret_cast<A*>(scratch + gram_lanes(r, k));
  A *const y_panel = x_panel + height * r, *const dense = y_panel + height * k;
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    load_wide_panel(dtype, item.x, first + begin, count, r, x_panel, height, dense);
    if (!symmetric) load_wide_panel(dtype, item.y, first + begin, count, k, y_panel, height, dense);
    gram.add(x_panel, height, symmetric ? x_panel : y_panel, height, padded_rows(count));
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

template <class A, class T>
void gram_rows_in(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                  double* sums) {
  const bool symmetric = item.y.data == nullptr;
  const bool own_type = dtype == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  const int64_t whole = rows / kLanes<A> * kLanes<A>;
  if (own_type && sizeof(A) == sizeof(double) && symmetric && item.x.column_stride == 1 && item.x.row_stride == r &&
      r % 4 == 0) {
    gram_of_dense_rows<A>(static_cast<const T*>(item.x.data) + first * r, r, rows, scratch, sums);
  } else if (own_type && item.x.row_stride == 1 && (symmetric || item.y.row_stride == 1)) {
    if (whole > 0) gram_of_columns<A, T>(item, r, k, first, whole, scratch, sums);
    if (whole < rows) gram_of_panels<A>(dtype, item, r, k, first + whole, rows - whole, scratch, sums);
  } else {
    gram_of_panels<A>(dtype, item, r, k, first, rows, scratch, sums);
  }
}

template <class T>
void gram_rows(DType dtype, bool wide, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows,
               double* scratch, double* sums) {
  if (wide) {
    gram_rows_in<double, T>(dtype, item, r, k, first, rows, scratch, sums);
  } else {
    gram_rows_in<T, T>(dtype, item, r, k, first, rows, scratch, sums);
  }
}

}  // namespace lowrank::LOWRANK_ISA
