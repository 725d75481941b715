// Panels: the one layout that all kernels work on.
//
// A tall (d, r) matrix is cut into panels of panel_rows(r) rows, and a panel is stored column after column, so that
// lanes run along the rows whatever r is, triangular products skip exactly the half they may skip, and a panel stays
// in the first-level cache. Loading converts from any storage type and any strides; rows beyond the end are zeros.
#pragma once

#include "cpu/convert.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// kLanes rows of C columns (a power of two), `stride` apart, become C columns of kLanes elements, `pitch` apart.
template <class T, int C>
LOWRANK_INLINE void transpose_in(const T* rows, int64_t stride, T* columns, int64_t pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> v[C];
  if (C == L) {
    for (int i = 0; i < C; ++i) v[i] = load(rows + i * stride);
  } else if (stride == C) {
    for (int i = 0; i < C; ++i) v[i] = load(rows + i * L);
  } else {
    T dense[C * L];
    for (int i = 0; i < L; ++i) std::memcpy(dense + i * C, rows + i * stride, C * sizeof(T));
    for (int i = 0; i < C; ++i) v[i] = load(dense + i * L);
  }
  perfect_shuffles<T, C, log2_of(L)>(v);
  for (int i = 0; i < C; ++i) store(columns + i * pitch, v[i]);
}

template <class T, int C>
LOWRANK_INLINE void transpose_out(const T* columns, int64_t pitch, T* rows, int64_t stride) {
  constexpr int L = kLanes<T>;
  Vec<T> v[C];
  for (int i = 0; i < C; ++i) v[i] = load(columns + i * pitch);
  perfect_shuffles<T, C, log2_of(C)>(v);
  if (C == L) {
    for (int i = 0; i < C; ++i) store(rows + i * stride, v[i]);
  } else if (stride == C) {
    for (int i = 0; i < C; ++i) store(rows + i * L, v[i]);
  } else {
    T dense[C * L];
    for (int i = 0; i < C; ++i) store(dense + i * L, v[i]);
    for (int i = 0; i < L; ++i) std::memcpy(rows + i * stride, dense + i * C, C * sizeof(T));
  }
}

// All r columns: as many blocks of C as fit, the rest in blocks of C/2, C/4, … 1.
template <class T, int C>
LOWRANK_INLINE void transpose_rows_in(const T* rows, int64_t stride, int64_t r, T* columns, int64_t pitch) {
  int64_t j = 0;
  for (; j + C <= r; j += C) transpose_in<T, C>(rows + j, stride, columns + j * pitch, pitch);
  if constexpr (C > 1) {
    if (j < r) transpose_rows_in<T, C / 2>(rows + j, stride, r - j, columns + j * pitch, pitch);
  }
}
template <class T, int C>
LOWRANK_INLINE void transpose_rows_out(const T* columns, int64_t pitch, int64_t r, T* rows, int64_t stride) {
  int64_t j = 0;
  for (; j + C <= r; j += C) transpose_out<T, C>(columns + j * pitch, pitch, rows + j, stride);
  if constexpr (C > 1) {
    if (j < r) transpose_rows_out<T, C / 2>(columns + j * pitch, pitch, r - j, rows + j, stride);
  }
}

// rows × r of type T with unit column stride into the columns of a panel, zeros up to padded_rows(rows).
template <class T>
inline void columns_from_rows(const T* source, int64_t stride, int64_t rows, int64_t r, T* panel, int64_t pitch) {
  int64_t i = 0;
  for (; i + kLanes<T> <= rows; i += kLanes<T>) {
    transpose_rows_in<T, kLanes<T>>(source + i * stride, stride, r, panel + i, pitch);
  }
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t k = i; k < rows; ++k) panel[j * pitch + k] = source[k * stride + j];
    for (int64_t k = rows; k < padded_rows(rows); ++k) panel[j * pitch + k] = 0;
  }
}
template <class T>
inline void rows_from_columns(const T* panel, int64_t pitch, int64_t rows, int64_t r, T* out, int64_t stride) {
  int64_t i = 0;
  for (; i + kLanes<T> <= rows; i += kLanes<T>) {
    transpose_rows_out<T, kLanes<T>>(panel + i, pitch, r, out + i * stride, stride);
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < r; ++j) out[i * stride + j] = panel[j * pitch + i];
  }
}

// Rows [first, first + rows) of `view` into `panel` (column pitch `pitch`); `dense` is scratch for rows × r elements.
template <class T>
inline void load_panel(DType dtype, const View& view, int64_t first, int64_t rows, int64_t r, T* panel, int64_t pitch,
                       T* dense) {
  with_storage(dtype, view.data, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    const S* source = data + first * view.row_stride;
    if (view.row_stride == 1 || view.column_stride != 1) {
      for (int64_t j = 0; j < r; ++j) {
        T* column = panel + j * pitch;
        widen_run(source + j * view.column_stride, view.row_stride, rows, column);
        for (int64_t k = rows; k < padded_rows(rows); ++k) column[k] = 0;
      }
    } else if constexpr (std::is_same_v<S, T>) {
      columns_from_rows(source, view.row_stride, rows, r, panel, pitch);
    } else {
      for (int64_t i = 0; i < rows; ++i) widen_run(source + i * view.row_stride, 1, r, dense + i * r);
      columns_from_rows(dense, r, rows, r, panel, pitch);
    }
  });
}

template <class T>
inline void store_panel(DType dtype, const View& view, int64_t first, int64_t rows, int64_t r, const T* panel,
                        int64_t pitch, T* dense) {
  with_storage(dtype, view.data, [&](auto* data) {
    using S = std::remove_pointer_t<decltype(data)>;
    S* out = data + first * view.row_stride;
    if (view.row_stride == 1 || view.column_stride != 1) {
      for (int64_t j = 0; j < r; ++j) {
        narrow_run(panel + j * pitch, rows, out + j * view.column_stride, view.row_stride);
      }
    } else if constexpr (std::is_same_v<S, T>) {
      rows_from_columns(panel, pitch, rows, r, out, view.row_stride);
    } else {
      rows_from_columns(panel, pitch, rows, r, dense, r);
      for (int64_t i = 0; i < rows; ++i) narrow_run(dense + i * r, r, out + i * view.row_stride, 1);
    }
  });
}

// What a product asks memory for while it reads its input: the same places of two other arrays, which are wanted next.
// (So spread it is free; many lines at once, or into the first-level cache, are not.)
template <class T>
struct Ahead {
  const T* data[2];
  int64_t pitch[2];  // of their columns, or unused where rows are dense
};

// out_j = Σ_i coefficient(i, j) · in_i over the r columns of a panel, J columns from j0 on, V vectors from row k on; it
// asks for what kAsked Aheads say.
template <class T, int J, int V, int kAsked = 0>
LOWRANK_INLINE void multiply_block(const T* in, int64_t pitch, int64_t r, const T* matrix, int64_t row_stride,
                                   int64_t column_stride, T* out, int64_t out_pitch, const Ahead<T>* ahead = nullptr) {
  Vec<T> sum[J][V] = {};
  for (int64_t i = 0; i < r; ++i) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(in + i * pitch + v * kLanes<T>);
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    LOWRANK_UNROLL
    for (int n = 0; n < 2 * kAsked; ++n) {
      const T* const column = ahead[n / 2].data[n % 2] + i * ahead[n / 2].pitch[n % 2];
      for (int64_t at = 0; at < V * kLanes<T>; at += kLine) prefetch(column + at);
    }
    for (int j = 0; j < J; ++j) {
      const Vec<T> c = splat(matrix[i * row_stride + j * column_stride]);
      for (int v = 0; v < V; ++v) sum[j][v] += c * x[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) store(out + j * out_pitch + v * kLanes<T>, sum[j][v]);
  }
}

// out = in · M for a panel of `rows` (a multiple of kRowAlignment) × r and M (r, columns) with any strides; not in
// place.
template <class T>
inline void multiply_panel(const T* in, int64_t pitch, int64_t rows, int64_t r, const T* matrix, int64_t row_stride,
                           int64_t column_stride, int64_t columns, T* out, int64_t out_pitch) {
  constexpr int J = kManyRegisters ? 8 : 4;
  for (int64_t k = 0; k < rows; k += kLanes<T>) {
    int64_t j = 0;
    for (; j + J <= columns; j += J) {
      multiply_block<T, J, 1>(in + k, pitch, r, matrix + j * column_stride, row_stride, column_stride,
                              out + j * out_pitch + k, out_pitch);
    }
    for (; j < columns; ++j) {
      multiply_block<T, 1, 1>(in + k, pitch, r, matrix + j * column_stride, row_stride, column_stride,
                              out + j * out_pitch + k, out_pitch);
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
