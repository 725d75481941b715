// The thin products of an adapted layer: from tokens to the rank, back to the width, and sums over the tokens. Vectors
// run along the rank in the first and along the width in the others; a few tokens share what is read of the factors.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// Sums over the width, and over tokens, are taken over so many terms at a time and then over those sums.
constexpr int64_t kSummedWidth = 512, kSummedTokens = 256;
// Accumulators are kMoreTokens × 1 or kTokens × 2 vectors, in sums over tokens kSumRanks × kSumVectors.
constexpr int kTokens = kManyRegisters ? 12 : 6, kMoreTokens = 12, kSumRanks = kManyRegisters ? 8 : 4, kSumVectors = 3,
              kExpandTokens = 6, kExpandVectors = kManyRegisters ? 4 : 2;

// V vectors that lie one behind the other.
template <class T, int V>
LOWRANK_INLINE void load_vectors(const T* p, Vec<T>* vectors) {
  LOWRANK_UNROLL
  for (int v = 0; v < V; ++v) vectors[v] = load(p + v * kLanes<T>);
}

// sum (M, V vectors) += the outer product of M elements, so far apart, and V vectors.
template <class T, int M, int V>
LOWRANK_INLINE void add_outer_product(const T* elements, int64_t stride, const Vec<T>* vectors, Vec<T> (*sum)[V]) {
  LOWRANK_UNROLL
  for (int m = 0; m < M; ++m) {
    const Vec<T> element = splat(elements[m * stride]);
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] += element * vectors[v];
  }
}

// M tokens: columns of out, V vectors of them, = factor · x · panel.
template <class T, int M, int V>
LOWRANK_INLINE void project_tokens(const T* x, int64_t stride, int64_t width, const T* panel, int64_t pitch, T factor,
                                   T* out) {
  constexpr int L = kLanes<T>;
  Vec<T> total[M][V] = {};
  for (int64_t begin = 0; begin < width; begin += kSummedWidth) {
    const int64_t end = width - begin < kSummedWidth ? width : begin + kSummedWidth;
    Vec<T> sum[M][V] = {};
    for (int64_t i = begin; i < end; ++i) {
      Vec<T> p[V];
      load_vectors<T, V>(panel + i * pitch, p);
      add_outer_product<T, M, V>(x + i, stride, p, sum);
    }
    LOWRANK_UNROLL
    for (int m = 0; m < M; ++m) {
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) total[m][v] += sum[m][v];
    }
  }
  LOWRANK_UNROLL
  for (int m = 0; m < M; ++m) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) store(out + m * pitch + v * L, splat(factor) * total[m][v]);
  }
}

template <class T, int M, int V>
LOWRANK_INLINE void project_columns(const T* x, int64_t stride, int64_t rows, int64_t width, const T* panel,
                                    int64_t pitch, T factor, T* out) {
  int64_t t = 0;
  for (; t + M <= rows; t += M)
    project_tokens<T, M, V>(x + t * stride, stride, width, panel, pitch, factor, out + t * pitch);
  for (; t + 2 <= rows; t += 2)
    project_tokens<T, 2, V>(x + t * stride, stride, width, panel, pitch, factor, out + t * pitch);
  if (t < rows) project_tokens<T, 1, V>(x + t * stride, stride, width, panel, pitch, factor, out + t * pitch);
}

// out (rows, pitch) = factor · x · panel for x (rows, width) and panel (width, pitch), whose rows are whole vectors.
template <class T>
void project_rows(const T* x, int64_t stride, int64_t rows, int64_t width, const T* panel, int64_t pitch, T factor,
                  T* out) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  for (; k + 2 * L <= pitch; k += 2 * L)
    project_columns<T, kTokens, 2>(x, stride, rows, width, panel + k, pitch, factor, out + k);
  if (k < pitch) project_columns<T, kMoreTokens, 1>(x, stride, rows, width, panel + k, pitch, factor, out + k);
}

// M tokens: V vectors of y from column `first` on, += u · panel.
template <class T, int M, int V>
LOWRANK_INLINE void expand_tokens(const T* u, int64_t pitch, int64_t k, const T* const* panel, int64_t first, T* y,
                                  int64_t stride) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][V];
  LOWRANK_UNROLL
  for (int m = 0; m < M; ++m) load_vectors<T, V>(y + m * stride + first, sum[m]);
  for (int64_t i = 0; i < k; ++i) {
    Vec<T> p[V];
    load_vectors<T, V>(panel[i] + first, p);
    add_outer_product<T, M, V>(u + i, pitch, p, sum);
  }
  LOWRANK_UNROLL
  for (int m = 0; m < M; ++m) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) store(y + m * stride + first + v * L, sum[m][v]);
  }
}

template <class T, int M>
LOWRANK_INLINE void expand_width(const T* u, int64_t pitch, int64_t k, const T* const* panel, int64_t width, T* y,
                                 int64_t stride) {
  constexpr int L = kLanes<T>, V = kExpandVectors;
  int64_t j = 0;
  for (; j + V * L <= width; j += V * L) expand_tokens<T, M, V>(u, pitch, k, panel, j, y, stride);
  for (; j + L <= width; j += L) expand_tokens<T, M, 1>(u, pitch, k, panel, j, y, stride);
  for (; j < width; ++j) {
    for (int m = 0; m < M; ++m) {
      T sum = y[m * stride + j];
      for (int64_t i = 0; i < k; ++i) sum += u[m * pitch + i] * panel[i][j];
      y[m * stride + j] = sum;
    }
  }
}

// y (rows, width) += u · panel for u (rows, k) and the k rows of the panel.
template <class T>
void expand_rows(const T* u, int64_t pitch, int64_t rows, int64_t k, const T* const* panel, int64_t width, T* y,
                 int64_t stride) {
  int64_t t = 0;
  for (; t + kExpandTokens <= rows; t += kExpandTokens)
    expand_width<T, kExpandTokens>(u + t * pitch, pitch, k, panel, width, y + t * stride, stride);
  for (; t < rows; ++t) expand_width<T, 1>(u + t * pitch, pitch, k, panel, width, y + t * stride, stride);
}

// out (M, V vectors) += uᵀ x over some tokens. If kCopies, what is read of x is written to `copy` on the way.
template <class T, int M, int V, bool kCopies>
LOWRANK_INLINE void sum_tokens(const T* u, int64_t pitch, const T* x, int64_t stride, int64_t tokens, T* out,
                               int64_t out_stride, T* copy) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][V] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<T> p[V];
    load_vectors<T, V>(x + t * stride, p);
    LOWRANK_UNROLL
    for (int v = 0; kCopies && v < V; ++v) store(copy + (t * V + v) * L, p[v]);
    add_outer_product<T, M, V>(u + t * pitch, 1, p, sum);
  }
  LOWRANK_UNROLL
  for (int m = 0; m < M; ++m) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) {
      T* const to = out + m * out_stride + v * L;
      store(to, load(to) + sum[m][v]);
    }
  }
}

// V vectors of columns. The first ranks copy them to the first-level cache for the others: at strides of whole pages
// the columns of many tokens share the few lines of a set.
template <class T, int V>
LOWRANK_INLINE void sum_columns(const T* u, int64_t pitch, int64_t r, const T* x, int64_t stride, int64_t tokens,
                                T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  T copy[kSummedTokens * V * L];
  for (int64_t begin = 0; begin < tokens; begin += kSummedTokens) {
    const int64_t count = tokens - begin < kSummedTokens ? tokens - begin : kSummedTokens;
    const T *from = x + begin * stride, *const weights = u + begin * pitch;
    int64_t k = 0, step = stride;
    if (r > kSumRanks) {
      sum_tokens<T, kSumRanks, V, true>(weights, pitch, from, stride, count, out, out_stride, copy);
      k = kSumRanks, from = copy, step = V * L;
    }
    for (; k + kSumRanks <= r; k += kSumRanks)
      sum_tokens<T, kSumRanks, V, false>(weights + k, pitch, from, step, count, out + k * out_stride, out_stride, copy);
    for (; k < r; ++k)
      sum_tokens<T, 1, V, false>(weights + k, pitch, from, step, count, out + k * out_stride, out_stride, copy);
  }
}

// Columns [first, last) of out (r, ·) = uᵀ x for u (tokens, r) and x (tokens, ·).
template <class T>
void sum_over_tokens(const T* u, int64_t pitch, int64_t r, const T* x, int64_t stride, int64_t tokens, int64_t first,
                     int64_t last, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < r; ++k) {
    for (int64_t j = first; j < last; ++j) out[k * out_stride + j] = T(0);
  }
  int64_t j = first;
  for (; j + kSumVectors * L <= last; j += kSumVectors * L)
    sum_columns<T, kSumVectors>(u, pitch, r, x + j, stride, tokens, out + j, out_stride);
  for (; j + L <= last; j += L) sum_columns<T, 1>(u, pitch, r, x + j, stride, tokens, out + j, out_stride);
  for (int64_t begin = 0; begin < tokens && j < last; begin += kSummedTokens) {
    const int64_t end = tokens - begin < kSummedTokens ? tokens : begin + kSummedTokens;
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t c = j; c < last; ++c) {
        T sum = 0;
        for (int64_t t = begin; t < end; ++t) sum += u[t * pitch + k] * x[t * stride + c];
        out[k * out_stride + c] += sum;
      }
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
