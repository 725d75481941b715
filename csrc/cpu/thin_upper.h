// Q = X W for a tall X of r ≤ 16 columns and an upper triangular W, straight from memory to memory, and on the way how
// far each column of Q goes along that of a previous Q, which Q may be written over: the second reading of qr_thin.h.
#pragma once

#include "cpu/in_place.h"
#include "cpu/thin_product.h"

namespace lowrank::LOWRANK_ISA {

#if defined(__GNUC__)
// Columns [j0, j0 + J) of Q, V vectors of rows at a time, of columns that are so far apart; dots[j], lane by lane, +=
// q_j · previous_j. ask(j, k) is called once for each line of Q.
template <class T, int J, int V, bool kStreams, bool kAligns, class Ask>
LOWRANK_INLINE void upper_columns_block(const T* x, int64_t x_stride, int64_t rows, int64_t r, int64_t j0,
                                        const T* upper, const T* previous, int64_t previous_stride, T* q,
                                        int64_t q_stride, Vec<T>* dots, const Ask& ask) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  Vec<T> dot[J];
  LOWRANK_UNROLL
  for (int j = 0; j < J; ++j) dot[j] = dots[j];
  for (int64_t k = 0; k < rows; k += V * L) {
    Vec<T> sum[J][V] = {};
    for (int64_t i = 0; i < j0; ++i) {
      Vec<T> column[V];
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) column[v] = load(x + i * x_stride + k + v * L);
      LOWRANK_UNROLL
      for (int j = 0; j < J; ++j) {
        LOWRANK_UNROLL
        for (int v = 0; v < V; ++v) sum[j][v] += upper[i * r + j0 + j] * column[v];
      }
    }
    LOWRANK_UNROLL
    for (int i = 0; i < J; ++i) {
      Vec<T> column[V];
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) column[v] = load(x + (j0 + i) * x_stride + k + v * L);
      LOWRANK_UNROLL
      for (int j = i; j < J; ++j) {
        LOWRANK_UNROLL
        for (int v = 0; v < V; ++v) sum[j][v] += upper[(j0 + i) * r + j0 + j] * column[v];
      }
    }
    LOWRANK_UNROLL
    for (int j = 0; j < J; ++j) {
      for (int64_t line = k; line < k + V * L; line += kLine) ask(j0 + j, line);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) {
        if constexpr (kAligns) dot[j] += sum[j][v] * load(previous + (j0 + j) * previous_stride + k + v * L);
        T* const to = q + (j0 + j) * q_stride + k + v * L;
        if constexpr (kStreams) {
          stream(to, sum[j][v]);
        } else {
          store(to, sum[j][v]);
        }
      }
    }
  }
  LOWRANK_UNROLL
  for (int j = 0; j < J; ++j) dots[j] = dot[j];
}

// Dense columns, in strips whose X stays in the first-level cache.
template <class T, int R, bool kStreams, bool kAligns>
inline void upper_columns(const T* x, int64_t x_stride, int64_t rows, const T* upper, const T* previous,
                          int64_t previous_stride, T* q, int64_t q_stride, double* along) {
  constexpr int L = kLanes<T>, kWidest = kManyRegisters ? 8 : 4, J = R < kWidest ? R : kWidest, V = 2;
  constexpr int64_t kStrip = 128;
  const int64_t whole = rows / (V * L) * (V * L);
  Vec<T> dots[R] = {};
  for (int64_t k = 0; k < whole; k += kStrip) {
    const int64_t count = whole - k < kStrip ? whole - k : kStrip;
    // From the last columns on: where Q is X, those before them are not overwritten yet.
    for (int64_t j0 = R - J; j0 >= 0; j0 -= J) {
      upper_columns_block<T, J, V, kStreams, kAligns>(x + k, x_stride, count, R, j0, upper, previous + k,
                                                      previous_stride, q + k, q_stride, dots + j0,
                                                      [&](int64_t j, int64_t at) {
                                                        if (kAligns)
                                                          prefetch(previous + j * previous_stride + k + kStrip + at);
                                                      });
    }
  }
  if constexpr (kAligns) {
    for (int j = 0; j < R; ++j) along[j] += static_cast<double>(sum_lanes<T>(dots[j]));
  }
  for (int64_t k = whole; k < rows; ++k) {
    for (int j = R - 1; j >= 0; --j) {
      T sum = 0;
      for (int i = 0; i <= j; ++i) sum += x[i * x_stride + k] * upper[i * R + j];
      if constexpr (kAligns) along[j] += static_cast<double>(sum * previous[j * previous_stride + k]);
      q[j * q_stride + k] = sum;
    }
  }
}

// Rows of R elements next to each other, in parts of W: K rows at a time.
template <class T, int R, int W, int K, bool kStreams, bool kAligns>
LOWRANK_INLINE void upper_rows_block(const T* x, int64_t x_stride, const T* upper, const T* previous,
                                     int64_t previous_stride, T* q, int64_t q_stride,
                                     typename Part<T, W>::Vector* dots) {
  using P = Part<T, W>;
  constexpr int kParts = R / W;
  typename P::Vector sum[kParts][K] = {};
  LOWRANK_UNROLL
  for (int i = 0; i < R; ++i) {
    LOWRANK_UNROLL
    for (int p = i / W; p < kParts; ++p) {
      const typename P::Vector row = P::load(upper + i * R + p * W);
      LOWRANK_UNROLL
      for (int n = 0; n < K; ++n) sum[p][n] += P::splat(x[n * x_stride + i]) * row;
    }
  }
  LOWRANK_UNROLL
  for (int p = 0; p < kParts; ++p) {
    LOWRANK_UNROLL
    for (int n = 0; n < K; ++n) {
      if constexpr (kAligns) dots[p] += sum[p][n] * P::load(previous + n * previous_stride + p * W);
      T* const to = q + n * q_stride + p * W;
      if constexpr (kStreams) {
        stream(to, sum[p][n]);
      } else {
        P::store(to, sum[p][n]);
      }
    }
  }
}

template <class T, int R, bool kStreams, bool kAligns>
inline void upper_rows(const T* x, int64_t x_stride, int64_t rows, const T* upper, const T* previous,
                       int64_t previous_stride, T* q, int64_t q_stride, double* along) {
  constexpr int W = R < 8 ? R : 8, K = W == R ? 8 : 4;
  constexpr int64_t kRowsAhead = 64;
  typename Part<T, W>::Vector dots[R / W] = {};
  int64_t k = 0;
  for (; k + K <= rows; k += K) {
    for (int n = 0; kAligns && n < K; ++n) prefetch(previous + (k + kRowsAhead + n) * previous_stride);
    upper_rows_block<T, R, W, K, kStreams, kAligns>(x + k * x_stride, x_stride, upper, previous + k * previous_stride,
                                                    previous_stride, q + k * q_stride, q_stride, dots);
  }
  for (; k < rows; ++k) {
    upper_rows_block<T, R, W, 1, false, kAligns>(x + k * x_stride, x_stride, upper, previous + k * previous_stride,
                                                 previous_stride, q + k * q_stride, q_stride, dots);
  }
  for (int j = 0; kAligns && j < R; ++j) along[j] += static_cast<double>(dots[j / W][j % W]);
}
#endif

// Rows [first, first + rows) of Q = X W, W (r, r) dense; along[j] += ⟨q_j, previous_j⟩ if there is a previous Q.
template <class T, bool kStreams>
inline void multiply_thin_upper(const View& x, const View& previous, const View& q, int64_t first, int64_t rows,
                                int64_t r, const T* upper, double* along) {
#if defined(__GNUC__)
  const auto multiply = [&](auto rank, auto aligns) {
    constexpr int R = decltype(rank)::value;
    constexpr bool kAligns = decltype(aligns)::value;
    const auto* const from = static_cast<const T*>(x.data) + first * x.row_stride;
    const auto* const old = kAligns ? static_cast<const T*>(previous.data) + first * previous.row_stride : nullptr;
    T* const to = static_cast<T*>(q.data) + first * q.row_stride;
    if (x.column_stride == 1 && q.column_stride == 1) {
      upper_rows<T, R, kStreams, kAligns>(from, x.row_stride, rows, upper, old, previous.row_stride, to, q.row_stride,
                                          along);
    } else {
      upper_columns<T, R, kStreams, kAligns>(from, x.column_stride, rows, upper, old, previous.column_stride, to,
                                             q.column_stride, along);
    }
  };
  const auto of_rank = [&](auto aligns) {
    if (r == 16) return multiply(std::integral_constant<int, 16>(), aligns);
    r == 8 ? multiply(std::integral_constant<int, 8>(), aligns) : multiply(std::integral_constant<int, 4>(), aligns);
  };
  previous.data ? of_rank(std::true_type()) : of_rank(std::false_type());
  if constexpr (kStreams) stream_fence();
#else
  (void)x, (void)previous, (void)q, (void)first, (void)rows, (void)r, (void)upper, (void)along;
#endif
}

}  // namespace lowrank::LOWRANK_ISA
