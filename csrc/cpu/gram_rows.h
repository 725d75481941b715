// The Gram products of grouped_gram, from matrices of any storage type and strides.
#pragma once

#include "cpu/gram.h"
#include "cpu/in_place.h"
#include "cpu/kernels.h"
#include "cpu/wide_panel.h"

namespace lowrank::LOWRANK_ISA {

// Whether the columns of x, and of y if there is one, are consecutive in memory.
inline bool has_dense_columns(const GramItem& item) {
  return item.x.row_stride == 1 && (item.symmetric || item.y.row_stride == 1);
}

// Columns of T that are consecutive in memory; products and sums in A. Where that is T they are read where they are,
// else each panel is widened once (of a symmetric product by the first ones) and not at every product.
template <class A, class T>
void gram_of_columns(const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                     double* sums) {
  constexpr bool kWidened = !std::is_same_v<A, T>;
  constexpr int64_t kBytes = sizeof(T);
  const bool symmetric = item.symmetric;
  GramSums<A> gram(r, k, symmetric, scratch);
  // What is widened is copied, and more than eight columns are: at strides of whole pages they share the few lines of a
  // set of the first-level cache. A panel that its products copy is read from that cache and from the second one alike;
  // what counts is how often the sums are fetched.
  const bool copies = symmetric && (kWidened || r > 8);
  const int64_t shared = gram_panel_rows(r > k ? r : k);
  const int64_t height = copies && r > 8 ? 2 * shared : kWidened ? shared : 256;
  const int64_t pitch = copies ? height + 8 : height;
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
    const auto ask_for = [&](const GramItem& of, int64_t row) {
      const auto part = [&](const View& view) -> NextColumns::Part {
        return {reinterpret_cast<const char*>(static_cast<const T*>(view.data) + row), view.column_stride * kBytes};
      };
      next = {part(of.x), symmetric ? NextColumns::Part() : part(of.y), kBytes};
    };
    if (first + begin + height < item.rows) {
      ask_for(item, first + begin + height);
    } else if (item.next && item.next->rows >= count && has_dense_columns(*item.next)) {
      ask_for(*item.next, 0);
    }
    if (copies) {
      gram.add_copying(x, x_stride, count, x_panel, pitch, next);
      continue;
    }
    if constexpr (kWidened) {
      widen_columns(x, x_stride, r, count, x_panel);
      widen_columns(y, y_stride, k, count, y_panel);
      gram.add(x_panel, height, y_panel, height, count, next);
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
  const bool symmetric = item.symmetric;
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

// Whether the rows of x, and of y if there is one, lie one behind the other; both have r columns.
inline bool has_dense_rows(const GramItem& item, int64_t r) {
  const auto dense = [&](const View& view) { return view.column_stride == 1 && view.row_stride == r; };
  return dense(item.x) && (item.symmetric || dense(item.y));
}

// Dense rows of T, of x and y alike r, a block at a time: products and sums of a block in A, to which T is widened.
// Memory is asked for the next block meanwhile, at the end for that of the next matrix: widening alone would wait for
// it.
template <class A, class T>
void gram_of_dense_rows(const GramItem& item, int64_t r, int64_t first, int64_t rows, double* scratch, double* sums) {
  const int64_t height = gram_panel_rows(r), known = item.rows - first;
  const bool symmetric = item.symmetric;
  const GramItem* const then =
      item.next && has_dense_rows(*item.next, r) && item.next->rows >= height ? item.next : nullptr;
  const auto row_of = [&](const View& view, int64_t row) {
    return view.data ? static_cast<const T*>(view.data) + row * r : nullptr;
  };
  A *const x_block = reinterpret_cast<A*>(scratch), *const y_block = symmetric ? x_block : x_block + height * r;
  for (int64_t begin = 0; begin < rows; begin += height) {
    const int64_t count = rows - begin < height ? rows - begin : height;
    const T *const x = row_of(item.x, first + begin), *const y = symmetric ? x : row_of(item.y, first + begin);
    const T *next_x = nullptr, *next_y = nullptr;
    if (begin + 2 * height <= known) {
      next_x = x + height * r, next_y = y + height * r;
    } else if (then && begin + height >= known) {
      next_x = row_of(then->x, 0), next_y = row_of(then->y, 0);
    }
    if constexpr (std::is_same_v<A, T>) {
      add_product_of_rows(x, y, count, r, symmetric, sums, next_x, next_y);
    } else {
      for (int64_t i = 0; i < count * r; ++i) x_block[i] = static_cast<A>(x[i]);
      for (int64_t i = 0; !symmetric && i < count * r; ++i) y_block[i] = static_cast<A>(y[i]);
      add_product_of_rows(static_cast<const A*>(x_block), static_cast<const A*>(y_block), count, r, symmetric, sums,
                          next_x, next_y);
    }
  }
}

template <class A, class T>
void gram_rows_in(DType dtype, const GramItem& item, int64_t r, int64_t k, int64_t first, int64_t rows, double* scratch,
                  double* sums) {
  const bool own_type = dtype == kDTypeOf<T>;
  const int64_t whole = rows / kLanes<A> * kLanes<A>;
  // In float short rows leave most of a vector empty: panels are faster.
  const bool rows_fill_vectors = r % (sizeof(A) == sizeof(double) ? 4 : 8) == 0;
  if (own_type && r == k && has_dense_rows(item, r) && rows_fill_vectors) {
    gram_of_dense_rows<A, T>(item, r, first, rows, scratch, sums);
  } else if (own_type && has_dense_columns(item)) {
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
