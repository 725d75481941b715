// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/in_place.h"
#include "cpu/kernels.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

// Columns of T that are consecutive in memory; products and sums in A. Where that is T they are read where they are,
// else each panel is widened once (of a symmetric product by the first ones) and not at every product.
template <class A, class T>
void gram_of_columns(const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                     double* sums) {
  constexpr bool kWidened = !std::is_same_v<A, T>;
  const bool symmetric = item.y.data == nullptr;
  GramSums<A> gram(r, k, symmetric, scratch);
  // A panel that is widened by its products is read from the first-level cache and from the second one alike; what
  // counts is how often the sums are fetched.
  const int64_t height = kWidened ? (symmetric ? 2 : 1) * gram_panel_rows(r > k ? r : k) : 256;
  A *const x_panel = reinterpret_cast<A*>(scratch + gram_lanes(r, k)), *const y_panel = x_panel + height * r;
  const auto widen_columns = [&](const T* from, int64_t stride, int64_t columns, int64_t count, A* to) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < count; i += kLanes<A>) store(to + j * height + i, load_as<A>(from + j * stride + i));
    }
  };
  const int64_t x_stride = item.x.column_stride, y_stride = symmetric ? x_stride : item.y.column_stride;
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    const T* const x = static_cast<const T*>(item.x.data) + first + begin;
    const T* const y = symmetric ? x : static_cast<const T*>(item.y.data) + first + begin;
    NextColumns next;
    if (first + begin + height < item.rows)
      next = {reinterpret_cast<const char*>(x + height), x_stride * static_cast<int64_t>(sizeof(T)),
              static_cast<int64_t>(sizeof(T))};
    if constexpr (kWidened) {
      if (symmetric) {
        gram.add_widening(x, x_stride, count, x_panel, height, next);
        continue;
      }
      widen_columns(x, x_stride, r, count, x_panel);
      widen_columns(y, y_stride, k, count, y_panel);
      gram.add(x_panel, height, y_panel, height, count);
    } else {
      gram.add(x, x_stride, y, y_stride, count, next);
    }
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

// The Gram of dense rows of T, a block at a time: products and sums of a block in A, to which T is widened. Memory is
// asked for the next block meanwhile, as far as rows are `known`: widening alone would wait for it.
template <class A, class T>
void gram_of_dense_rows(const T* x, int64_t r, int64_t rows, int64_t known, double* scratch, double* sums) {
  const int64_t height = gram_panel_rows(r);
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    const T* const source = x + begin * r;
    if constexpr (std::is_same_v<A, T>) {
      add_product_of_rows(source, source, count, r, true, sums);
    } else {
      A* const block = reinterpret_cast<A*>(scratch);
      for (int64_t i = 0; i < count * r; ++i) block[i] = static_cast<A>(source[i]);
      const T* const next = begin + 2 * height <= known ? source + height * r : nullptr;
      add_product_of_rows(static_cast<const A*>(block), static_cast<const A*>(block), count, r, true, sums, next);
    }
  }
}

template <class A, class T>
void gram_rows_in(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                  double* sums) {
  const bool symmetric = item.y.data == nullptr;
  const bool own_type = dtype == kDTypeOf<T>;
  const int64_t whole = rows / kLanes<A> * kLanes<A>;
  // In float short rows leave most of a vector empty: panels are faster.
  const bool rows_fill_vectors = r % (sizeof(A) == sizeof(double) ? 4 : 8) == 0;
  if (own_type && symmetric && item.x.column_stride == 1 && item.x.row_stride == r && rows_fill_vectors) {
    gram_of_dense_rows<A>(static_cast<const T*>(item.x.data) + first * r, r, rows, item.rows - first, scratch, sums);
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
