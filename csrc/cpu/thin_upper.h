// Q = X W for a tall X and an upper triangular W, straight from memory to memory, and on the way how far each column of
// Q goes along that of a previous Q, which Q may be written over: the second reading of qr_thin.h.
#pragma once

#include "cpu/in_place.h"
#include "cpu/thin_product.h"

namespace lowrank::LOWRANK_ISA {

// Rows of X that are worked on at a time: they stay in the first-level cache while block after block of W's columns is
// applied to them, from the last on: where Q is X, those before them are not overwritten yet.
constexpr int64_t upper_strip(int64_t r) { return r <= 32 ? 128 : r <= 64 ? 64 : 32; }

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

// Dense columns: `rank` of them, or R, if that is not 0, which saves address registers.
template <class T, int J, int R, bool kStreams, bool kAligns>
inline void upper_columns(const T* x, int64_t x_stride, int64_t rows, int64_t rank, const T* upper, const T* previous,
                          int64_t previous_stride, T* q, int64_t q_stride, double* along) {
  constexpr int L = kLanes<T>, V = 2;
  const int64_t r = R > 0 ? R : rank;
  const int64_t whole = rows / (V * L) * (V * L), strip = upper_strip(r);
  Vec<T> dots[kMaxRank];
  for (int64_t j = 0; j < r; ++j) dots[j] = Vec<T>{};
  for (int64_t k = 0; k < whole; k += strip) {
    const int64_t count = whole - k < strip ? whole - k : strip;
    for (int64_t j0 = r - J; j0 >= 0; j0 -= J) {
      upper_columns_block<T, J, V, kStreams, kAligns>(x + k, x_stride, count, r, j0, upper, previous + k,
                                                      previous_stride, q + k, q_stride, dots + j0,
                                                      [&](int64_t j, int64_t at) {
                                                        if (kAligns)
                                                          prefetch(previous + j * previous_stride + k + strip + at);
                                                      });
    }
  }
  for (int64_t j = 0; kAligns && j < r; ++j) along[j] += static_cast<double>(sum_lanes<T>(dots[j]));
  for (int64_t k = whole; k < rows; ++k) {
    for (int64_t j = r - 1; j >= 0; --j) {
      T sum = 0;
      for (int64_t i = 0; i <= j; ++i) sum += x[i * x_stride + k] * upper[i * r + j];
      if constexpr (kAligns) along[j] += static_cast<double>(sum * previous[j * previous_stride + k]);
      q[j * q_stride + k] = sum;
    }
  }
}

// Columns [j0, j0 + J) of K rows of Q, in parts of W; the elements of a row are next to each other.
template <class T, int J, int W, int K, bool kStreams, bool kAligns>
LOWRANK_INLINE void upper_rows_block(const T* x, int64_t x_stride, int64_t r, int64_t j0, const T* upper,
                                     const T* previous, int64_t previous_stride, T* q, int64_t q_stride,
                                     typename Part<T, W>::Vector* dots) {
  using P = Part<T, W>;
  constexpr int kParts = J / W;
  static_assert(kParts <= 2);
  typename P::Vector sum[kParts][K] = {};
  for (int64_t i = 0; i < j0; ++i) {
    LOWRANK_UNROLL
    for (int p = 0; p < kParts; ++p) {
      const typename P::Vector row = P::load(upper + i * r + j0 + p * W);
      LOWRANK_UNROLL
      for (int n = 0; n < K; ++n) sum[p][n] += P::splat(x[n * x_stride + i]) * row;
    }
  }
  if constexpr (kParts == 2) {
    // Of the second half of the block one part is left: too few chains of sums unless the first half goes beside it.
    typename P::Vector late[K] = {};
    LOWRANK_UNROLL
    for (int i = 0; i < W; ++i) {
      const T* const map = upper + (j0 + i) * r + j0;
      const typename P::Vector row[2] = {P::load(map), P::load(map + W)}, last = P::load(map + W * r + W);
      LOWRANK_UNROLL
      for (int n = 0; n < K; ++n) {
        const typename P::Vector element = P::splat(x[n * x_stride + j0 + i]);
        sum[0][n] += element * row[0];
        sum[1][n] += element * row[1];
        late[n] += P::splat(x[n * x_stride + j0 + W + i]) * last;
      }
    }
    LOWRANK_UNROLL
    for (int n = 0; n < K; ++n) sum[1][n] += late[n];
  } else {
    LOWRANK_UNROLL
    for (int i = 0; i < J; ++i) {
      const typename P::Vector row = P::load(upper + (j0 + i) * r + j0);
      LOWRANK_UNROLL
      for (int n = 0; n < K; ++n) sum[0][n] += P::splat(x[n * x_stride + j0 + i]) * row;
    }
  }
  LOWRANK_UNROLL
  for (int p = 0; p < kParts; ++p) {
    LOWRANK_UNROLL
    for (int n = 0; n < K; ++n) {
      if constexpr (kAligns) dots[p] += sum[p][n] * P::load(previous + n * previous_stride + j0 + p * W);
      T* const to = q + n * q_stride + j0 + p * W;
      if constexpr (kStreams) {
        stream(to, sum[p][n]);
      } else {
        P::store(to, sum[p][n]);
      }
    }
  }
}

template <class T, int J, int R, bool kStreams, bool kAligns>
inline void upper_rows(const T* x, int64_t x_stride, int64_t rows, int64_t rank, const T* upper, const T* previous,
                       int64_t previous_stride, T* q, int64_t q_stride, double* along) {
  constexpr int W = J < 8 ? J : 8, K = W == J ? 8 : 4;
  constexpr int64_t kRowsAhead = 64;
  const int64_t r = R > 0 ? R : rank;
  const int64_t strip = R == J ? rows : upper_strip(r);  // of one block all rows are one strip
  for (int64_t first = 0; first < rows; first += strip) {
    const int64_t end = rows - first < strip ? rows : first + strip;
    for (int64_t j0 = r - J; j0 >= 0; j0 -= J) {
      typename Part<T, W>::Vector dots[J / W] = {};
      int64_t k = first;
      for (; k + K <= end; k += K) {
        for (int n = 0; kAligns && n < K; ++n) prefetch(previous + (k + kRowsAhead + n) * previous_stride + j0);
        upper_rows_block<T, J, W, K, kStreams, kAligns>(x + k * x_stride, x_stride, r, j0, upper,
                                                        previous + k * previous_stride, previous_stride,
                                                        q + k * q_stride, q_stride, dots);
      }
      for (; k < end; ++k) {
        upper_rows_block<T, J, W, 1, false, kAligns>(x + k * x_stride, x_stride, r, j0, upper,
                                                     previous + k * previous_stride, previous_stride, q + k * q_stride,
                                                     q_stride, dots);
      }
      for (int j = 0; kAligns && j < J; ++j) along[j0 + j] += static_cast<double>(dots[j / W][j % W]);
    }
  }
}
#endif

// Whether multiply_thin_upper takes X, Q and a previous Q, if there is one, of these strides.
inline bool is_thin_upper(const View& x, const View& previous, const View& q, int64_t r) {
#if defined(__GNUC__)
  const auto all = [&](int64_t View::* stride) {
    return x.*stride == 1 && q.*stride == 1 && (!previous.data || previous.*stride == 1);
  };
  return r % 4 == 0 && (all(&View::column_stride) || all(&View::row_stride));
#else
  (void)x, (void)previous, (void)q, (void)r;
  return false;
#endif
}

// Rows [first, first + rows) of Q = X W, W (r, r) dense; along[j] += ⟨q_j, previous_j⟩ if there is a previous Q.
template <class T, bool kStreams>
inline void multiply_thin_upper(const View& x, const View& previous, const View& q, int64_t first, int64_t rows,
                                int64_t r, const T* upper, double* along) {
#if defined(__GNUC__)
  const bool in_rows = x.column_stride == 1 && q.column_stride == 1;
  const auto multiply = [&](auto block, auto known, auto aligns) {
    constexpr int J = decltype(block)::value, R = decltype(known)::value;
    constexpr bool kAligns = decltype(aligns)::value;
    const auto* const from = static_cast<const T*>(x.data) + first * x.row_stride;
    const auto* const old = kAligns ? static_cast<const T*>(previous.data) + first * previous.row_stride : nullptr;
    T* const to = static_cast<T*>(q.data) + first * q.row_stride;
    if (in_rows) {
      upper_rows<T, J, R, kStreams, kAligns>(from, x.row_stride, rows, r, upper, old, previous.row_stride, to,
                                             q.row_stride, along);
    } else {
      constexpr int kColumns = kManyRegisters && J >= 8 ? 8 : 4;
      upper_columns<T, kColumns, R, kStreams, kAligns>(from, x.column_stride, rows, r, upper, old,
                                                       previous.column_stride, to, q.column_stride, along);
    }
  };
  const auto of_rank = [&](auto aligns) {
    const auto in_blocks = [&](auto block) {
      r == decltype(block)::value ? multiply(block, block, aligns)
                                  : multiply(block, std::integral_constant<int, 0>(), aligns);
    };
    if (r % 16 == 0) return in_blocks(std::integral_constant<int, 16>());
    r % 8 == 0 ? in_blocks(std::integral_constant<int, 8>()) : in_blocks(std::integral_constant<int, 4>());
  };
  previous.data ? of_rank(std::true_type()) : of_rank(std::false_type());
  if constexpr (kStreams) stream_fence();
#else
  (void)x, (void)previous, (void)q, (void)first, (void)rows, (void)r, (void)upper, (void)along;
#endif
}

}  // namespace lowrank::LOWRANK_ISA
