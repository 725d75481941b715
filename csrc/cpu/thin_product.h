// Y = X M for a tall X of r ≤ 16 columns and a small M, straight from memory to memory: M (or the sums) stays in
// registers, X is read once and Y written once, whichever of the two ways X is stored.
#pragma once

#include "cpu/simd.h"

namespace lowrank::LOWRANK_ISA {

#if defined(__GNUC__)
// A row of R elements.
template <class T, int R>
struct RowTypes {
  typedef T Row __attribute__((vector_size(R * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(R * sizeof(T)), aligned(alignof(T)), may_alias));
};

// Rows of R elements next to each other, `stride` apart: each is a sum of rows of M (R, R). K rows at a time.
template <class T, int R, int K, bool kStreams>
inline void multiply_rows(const T* x, int64_t stride, int64_t rows, const T* matrix, T* out, int64_t out_stride) {
  using Row = typename RowTypes<T, R>::Row;
  using Unaligned = typename RowTypes<T, R>::Unaligned;
  Row m[R];
  LOWRANK_UNROLL
  for (int i = 0; i < R; ++i) m[i] = *reinterpret_cast<const Unaligned*>(matrix + i * R);
  int64_t k = 0;
  for (; k + K <= rows; k += K) {
    Row sum[K];
    LOWRANK_UNROLL
    for (int q = 0; q < K; ++q) sum[q] = x[(k + q) * stride] * m[0];
    LOWRANK_UNROLL
    for (int i = 1; i < R; ++i) {
      LOWRANK_UNROLL
      for (int q = 0; q < K; ++q) sum[q] += x[(k + q) * stride + i] * m[i];
    }
    LOWRANK_UNROLL
    for (int q = 0; q < K; ++q) {
      T* const to = out + (k + q) * out_stride;
      if constexpr (kStreams) {
        stream(to, sum[q]);
      } else {
        *reinterpret_cast<Unaligned*>(to) = sum[q];
      }
    }
  }
  for (; k < rows; ++k) {
    Row sum = x[k * stride] * m[0];
    LOWRANK_UNROLL
    for (int i = 1; i < R; ++i) sum += x[k * stride + i] * m[i];
    *reinterpret_cast<Unaligned*>(out + k * out_stride) = sum;
  }
}

// Columns of X dense, `stride` apart: lanes run along the rows, V vectors at a time. So many columns are more than the
// hardware follows: memory is asked for a later step (at the end for what lies there, which costs nothing).
template <class T, int R, int V, bool kStreams>
inline void multiply_columns(const T* x, int64_t stride, int64_t rows, const T* matrix, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>, kStepsAhead = 4;
  int64_t k = 0;
  for (; k + V * L <= rows; k += V * L) {
    Vec<T> sum[R][V] = {};
    for (int i = 0; i < R; ++i) {
      const T* const from = x + i * stride + k;
      Vec<T> column[V];
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) column[v] = load(from + v * L);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) prefetch(from + (kStepsAhead * V + v) * L);
      LOWRANK_UNROLL
      for (int j = 0; j < R; ++j) {
        LOWRANK_UNROLL
        for (int v = 0; v < V; ++v) sum[j][v] += matrix[i * R + j] * column[v];
      }
    }
    LOWRANK_UNROLL
    for (int j = 0; j < R; ++j) {
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) {
        T* const to = out + j * out_stride + k + v * L;
        if constexpr (kStreams) {
          stream(to, sum[j][v]);
        } else {
          store(to, sum[j][v]);
        }
      }
    }
  }
  for (; k < rows; ++k) {
    T row[R] = {};
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < R; ++j) row[j] += matrix[i * R + j] * x[i * stride + k];
    }
    for (int j = 0; j < R; ++j) out[j * out_stride + k] = row[j];
  }
}
#endif

// Whether multiply_thin takes X and Y of these strides.
inline bool is_thin(const View& x, const View& out, int64_t r) {
#if defined(__GNUC__)
  const bool in_rows = x.column_stride == 1 && out.column_stride == 1;
  const bool in_columns = x.row_stride == 1 && out.row_stride == 1;
  return (r == 4 || r == 8 || r == 16) && (in_rows || in_columns);
#else
  (void)x, (void)out, (void)r;
  return false;
#endif
}

// Whether rows of Y from a multiple of a vector's lanes on can be streamed.
inline bool can_stream(const View& out, int64_t r, int64_t element_bytes) {
  const int64_t run = (out.column_stride == 1 ? r : LOWRANK_VECTOR_BYTES / element_bytes) * element_bytes;
  const int64_t stride = (out.column_stride == 1 ? out.row_stride : out.column_stride) * element_bytes;
  const int64_t piece = run < LOWRANK_VECTOR_BYTES ? run : LOWRANK_VECTOR_BYTES;
  return reinterpret_cast<uintptr_t>(out.data) % piece == 0 && stride % piece == 0;
}

// Rows [first, first + rows) of Y = X M; M is (r, r), dense. Y may be X.
template <class T, bool kStreams>
inline void multiply_thin(const View& x, const View& out, int64_t first, int64_t rows, int64_t r, const T* matrix) {
#if defined(__GNUC__)
  const T* const source = static_cast<const T*>(x.data) + first * x.row_stride;
  T* const target = static_cast<T*>(out.data) + first * out.row_stride;
  if (x.column_stride == 1 && out.column_stride == 1) {
    const auto multiply = r == 16  ? multiply_rows<T, 16, 4, kStreams>
                          : r == 8 ? multiply_rows<T, 8, 8, kStreams>
                                   : multiply_rows<T, 4, 8, kStreams>;
    multiply(source, x.row_stride, rows, matrix, target, out.row_stride);
  } else {
    constexpr int V = kManyRegisters ? 16 : 8;  // registers for sums
    const auto multiply = r == 16  ? multiply_columns<T, 16, 1, kStreams>
                          : r == 8 ? multiply_columns<T, 8, V / 8, kStreams>
                                   : multiply_columns<T, 4, V / 4, kStreams>;
    multiply(source, x.column_stride, rows, matrix, target, out.column_stride);
  }
  if constexpr (kStreams) stream_fence();
#else
  (void)x, (void)out, (void)first, (void)rows, (void)r, (void)matrix;
#endif
}

}  // namespace lowrank::LOWRANK_ISA
