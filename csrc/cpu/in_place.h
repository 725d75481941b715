// Products of a thin factor with r × r matrices, and with itself, where the factor lies: no panel is copied.
//
// A wide factor (r, d) has its lanes along d, a tall one (d, r) has them along r, so that both are read and written as
// they are stored. Wide ones must have unit stride along d, tall ones dense rows of a multiple of four elements;
// panel.h takes the rest.
#pragma once

#include "cpu/gram.h"
#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

// W elements, at most a whole vector: of a tall factor r may be less than that.
#if defined(__GNUC__)
// Vectors wider than the portable kernels' registers are passed to nobody: all is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
template <class T, int W>
struct Part {
  typedef T Vector __attribute__((vector_size(W * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(W * sizeof(T)), aligned(alignof(T)), may_alias));
  static LOWRANK_INLINE Vector load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static LOWRANK_INLINE void store(T* p, const Vector& v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static LOWRANK_INLINE Vector splat(T value) { return value - Vector{}; }
};
#else
template <class T, int W>
struct Part {
  static_assert(W == kLanes<T>, "only the portable kernels, whose vectors divide four elements, are compiled here");
  typedef Vec<T> Vector;
  static Vector load(const T* p) { return LOWRANK_ISA::load(p); }
  static void store(T* p, const Vector& v) { LOWRANK_ISA::store(p, v); }
  static Vector splat(T value) { return LOWRANK_ISA::splat(value); }
};
#endif

// Calls f(std::integral_constant<int, W>) with the longest part of a vector that divides r, a multiple of four.
template <class T, class F>
LOWRANK_INLINE void with_part(int64_t r, const F& f) {
  constexpr int L = kLanes<T>;
  if constexpr (L >= 16) {
    if (r % 8 != 0) return f(std::integral_constant<int, L / 4>());
  }
  if constexpr (L >= 8) {
    if (r % L != 0) return f(std::integral_constant<int, L / 2>());
  }
  f(std::integral_constant<int, L>());
}

// Calls f(std::integral_constant<int, N>) for asking for what N = 0, 1 or 2 Aheads say.
template <class F>
LOWRANK_INLINE void with_asked(int asked, const F& f) {
  if (asked == 0) return f(std::integral_constant<int, 0>());
  asked == 1 ? f(std::integral_constant<int, 1>()) : f(std::integral_constant<int, 2>());
}

// K rows of out = in · M for a tall `in` (dense rows of r; of R, if that is not 0, which saves address registers), V
// parts of W columns of M.
template <class T, int W, int V, int K, int R, int kAsked>
LOWRANK_INLINE void map_rows_block(const T* in, int64_t rank, const T* map, T* out, const Ahead<T>* ahead) {
  using P = Part<T, W>;
  const int64_t r = R > 0 ? R : rank;
  typename P::Vector sum[K][V];
  LOWRANK_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) sum[k][v] = typename P::Vector{};
  }
  for (int64_t i = 0; i < r; ++i) {
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    LOWRANK_UNROLL
    for (int n = 0; n < 2 * kAsked; ++n) {  // in all, of K rows of r
      for (int64_t at = i * K; at < (i + 1) * K; at += kLine) prefetch(ahead[n / 2].data[n % 2] + at);
    }
    typename P::Vector m[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) m[v] = P::load(map + i * r + v * W);
    LOWRANK_UNROLL
    for (int k = 0; k < K; ++k) {
      const typename P::Vector element = P::splat(in[k * r + i]);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) sum[k][v] += element * m[v];
    }
  }
  LOWRANK_UNROLL
  for (int k = 0; k < K; ++k) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) P::store(out + k * r + v * W, sum[k][v]);
  }
}

// How many rows are mapped at a time: as many sums, of one part of all or of two parts of half of them.
constexpr int kMappedRows = 12;

// out = in · M for `rows` dense rows of a tall factor, at most kMappedRows.
template <class T>
inline void map_rows(const T* in, int64_t rows, int64_t r, const T* map, T* out, const Ahead<T>* ahead, int asked) {
  constexpr int K = kMappedRows;
  with_part<T>(r, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const auto whole = [&](auto known) {
      constexpr int R = decltype(known)::value;
      with_asked(asked,
                 [&](auto count) { map_rows_block<T, W, 1, K, R, decltype(count)::value>(in, r, map, out, ahead); });
      for (int64_t j = W; j < r; j += W) map_rows_block<T, W, 1, K, R, 0>(in, r, map + j, out + j, ahead);
    };
    const auto in_pairs = [&](auto known) {
      constexpr int R = decltype(known)::value;
      for (int64_t k = 0; k < K; k += K / 2) {
        with_asked(asked, [&](auto count) {
          constexpr int kAsked = decltype(count)::value;
          Ahead<T> later[2];
          for (int n = 0; n < kAsked; ++n) {
            later[n] = ahead[n];
            for (const T*& data : later[n].data) data += k * r;
          }
          map_rows_block<T, W, 2, K / 2, R, kAsked>(in + k * r, r, map, out + k * r, later);
        });
        for (int64_t j = 2 * W; j < r; j += 2 * W)
          map_rows_block<T, W, 2, K / 2, R, 0>(in + k * r, r, map + j, out + k * r + j, ahead);
      }
    };
    if (rows == K) {
      if (r == W) return whole(std::integral_constant<int, W>());
      if (r == 2 * W) return in_pairs(std::integral_constant<int, 2 * W>());
      if (r % (2 * W) == 0) return in_pairs(std::integral_constant<int, 0>());
      return whole(std::integral_constant<int, 0>());
    }
    const auto few = [&](auto count, int64_t k) {
      constexpr int kCount = decltype(count)::value;
      for (int64_t j = 0; j < r; j += W)
        map_rows_block<T, W, 1, kCount, 0, 0>(in + k * r, r, map + j, out + k * r + j, ahead);
    };
    int64_t k = 0;
    for (; k + 4 <= rows; k += 4) few(std::integral_constant<int, 4>(), k);
    for (; k < rows; ++k) few(std::integral_constant<int, 1>(), k);
  });
}

// out = M · in for V vectors of columns of a wide factor, whose rows are `pitch` apart; `transposed` is Mᵀ.
template <class T, int V>
inline void map_columns(const T* in, int64_t pitch, int64_t r, const T* transposed, T* out, int64_t out_pitch,
                        const Ahead<T>* ahead, int asked) {
  constexpr int J = kManyRegisters ? 8 : 4;
  int64_t j = 0;
  if (r >= J && asked == 1) multiply_block<T, J, V, 1>(in, pitch, r, transposed, r, 1, out, out_pitch, ahead), j = J;
  if (r >= J && asked == 2) multiply_block<T, J, V, 2>(in, pitch, r, transposed, r, 1, out, out_pitch, ahead), j = J;
  for (; j + J <= r; j += J)
    multiply_block<T, J, V>(in, pitch, r, transposed + j, r, 1, out + j * out_pitch, out_pitch);
  for (; J > 4 && j + 4 <= r; j += 4)
    multiply_block<T, 4, V>(in, pitch, r, transposed + j, r, 1, out + j * out_pitch, out_pitch);
  for (; j < r; ++j) multiply_block<T, 1, V>(in, pitch, r, transposed + j, r, 1, out + j * out_pitch, out_pitch);
}

// Rows of storage that are wanted next, `pitch` bytes apart.
struct NextRows {
  const char* data = nullptr;
  int64_t pitch = 0;
};

// to[j] += the elements of v, in double.
template <class A, int W>
LOWRANK_INLINE void add_widened(const typename Part<A, W>::Vector& v, double* to) {
  A values[W];
  Part<A, W>::store(values, v);
  if constexpr (W % kLanes<double> == 0) {
    for (int j = 0; j < W; j += kLanes<double>) store(to + j, load(to + j) + load_as<double>(values + j));
  } else {
    for (int j = 0; j < W; ++j) to[j] += static_cast<double>(values[j]);
  }
}

// gram[i][j] += Σ_k x[k][i] · y_v[k][j] for I columns of x and V parts of W columns, x and all y in dense rows of r;
// the parts of gram are at gram + i · r + offset[v]. At every row, a row of each of kAsked `next` is asked for.
template <class A, int W, int I, int V, int kAsked>
LOWRANK_INLINE void gram_rows_block(const A* x, const A* const* y, int64_t rows, int64_t r, double* gram,
                                    const int64_t* offset, const NextRows* next) {
  using P = Part<A, W>;
  typename P::Vector sum[I][V];
  LOWRANK_UNROLL
  for (int i = 0; i < I; ++i) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v] = typename P::Vector{};
  }
  for (int64_t k = 0; k < rows; ++k) {
    LOWRANK_UNROLL
    for (int n = 0; n < kAsked; ++n) prefetch(next[n].data + k * next[n].pitch);
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) {
      const typename P::Vector b = P::load(y[v] + k * r);
      LOWRANK_UNROLL
      for (int i = 0; i < I; ++i) sum[i][v] += P::splat(x[k * r + i]) * b;
    }
  }
  LOWRANK_UNROLL
  for (int i = 0; i < I; ++i) {
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) add_widened<A, W>(sum[i][v], gram + i * r + offset[v]);
  }
}

// The same of 2W columns of x and of y, as far as I columns of each half of x go: those of the second half are left out
// with y's first half, which is below the diagonal.
template <class A, int W, int I, int kAsked>
LOWRANK_INLINE void gram_rows_halves(const A* x, const A* y, int64_t rows, int64_t r, double* gram,
                                     const NextRows* next) {
  using P = Part<A, W>;
  typename P::Vector sum[3][I];
  LOWRANK_UNROLL
  for (int n = 0; n < 3; ++n) {
    LOWRANK_UNROLL
    for (int i = 0; i < I; ++i) sum[n][i] = typename P::Vector{};
  }
  for (int64_t k = 0; k < rows; ++k) {
    const A* const row = x + k * r;
    LOWRANK_UNROLL
    for (int n = 0; n < kAsked; ++n) prefetch(next[n].data + k * next[n].pitch);
    const typename P::Vector first = P::load(y + k * r), second = P::load(y + k * r + W);
    LOWRANK_UNROLL
    for (int i = 0; i < I; ++i) {
      const typename P::Vector element = P::splat(row[i]);
      sum[0][i] += element * first;
      sum[1][i] += element * second;
    }
    LOWRANK_UNROLL
    for (int i = 0; i < I; ++i) sum[2][i] += P::splat(row[W + i]) * second;
  }
  LOWRANK_UNROLL
  for (int i = 0; i < I; ++i) {
    add_widened<A, W>(sum[0][i], gram + i * r);
    add_widened<A, W>(sum[1][i], gram + i * r + W);
    add_widened<A, W>(sum[2][i], gram + (W + i) * r + W);
  }
}

// The same of 2H columns of x and of y, at least the upper triangle: the lower left quarter is left out. A row of
// `next` is asked for at every row.
template <class A, int H>
LOWRANK_INLINE void gram_rows_diagonal(const A* x, const A* y, int64_t rows, int64_t r, double* gram,
                                       const NextRows& next) {
  using Whole = Part<A, 2 * H>;
  using Half = Part<A, H>;
  typename Whole::Vector upper[H] = {};
  typename Half::Vector lower[H] = {};
  for (int64_t k = 0; k < rows; ++k) {
    const A* const row = x + k * r;
    prefetch(next.data + k * next.pitch);
    const typename Whole::Vector all = Whole::load(y + k * r);
    const typename Half::Vector second = Half::load(y + k * r + H);
    LOWRANK_UNROLL
    for (int i = 0; i < H; ++i) upper[i] += Whole::splat(row[i]) * all;
    LOWRANK_UNROLL
    for (int i = 0; i < H; ++i) lower[i] += Half::splat(row[H + i]) * second;
  }
  LOWRANK_UNROLL
  for (int i = 0; i < H; ++i) {
    add_widened<A, 2 * H>(upper[i], gram + i * r);
    add_widened<A, H>(lower[i], gram + (H + i) * r + H);
  }
}

// product (r, r) += XᵀY of dense rows, or (`upper`) at least its upper triangle: outer products, so that nothing is
// summed across lanes. next_x, next_y (of an upper triangle next_x alone): rows of r elements of T that are wanted
// next, if any are.
template <class A, class T = A>
inline void add_product_of_rows(const A* x, const A* y, int64_t rows, int64_t r, bool upper, double* product,
                                const T* next_x = nullptr, const T* next_y = nullptr) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  const int64_t pitch = r * static_cast<int64_t>(sizeof(T));
  const auto rows_at = [&](const T* data) { return NextRows{reinterpret_cast<const char*>(data), pitch}; };
  with_part<A>(r, [&](auto width) {
    constexpr int W = decltype(width)::value, I = W < 8 || !kManyRegisters ? 4 : 8, S = W < I ? I : W;
    constexpr bool kHalves = kManyRegisters && W >= 8;
    // Sums of a lone part are too few to keep the core busy if they are of four columns: they are of eight at a time.
    constexpr bool kLoneTogether = !kManyRegisters && S == 2 * I;
    constexpr bool kTwoParts = !kManyRegisters && W >= I;
    int64_t passes = 0;  // they ask for the lines of a row of x and of y in turn, or (`upper`) of x
    const auto asking_for_x = [&](const auto& form) {  // a pass of an upper triangle
      if (!next_x || passes * kLine >= r) return form(std::integral_constant<int, 0>(), nullptr);
      const NextRows wanted = rows_at(next_x + passes * kLine);
      form(std::integral_constant<int, 1>(), &wanted);
    };
    for (int64_t i0 = 0, step = S; i0 < r; i0 += step) {
      if constexpr (kHalves) {
        const NextRows asked = next_x ? rows_at(next_x + i0) : NextRows{reinterpret_cast<const char*>(x), 0};
        if (upper) gram_rows_diagonal<A, W / 2>(x + i0, y + i0, rows, r, product + i0 * (r + 1), asked);
      }
      const bool two_parts = kTwoParts && upper && r - i0 >= 2 * W;
      step = two_parts ? 2 * W : S;
      if constexpr (kTwoParts) {
        for (int64_t i = i0; two_parts && i < i0 + W; i += I, ++passes) {
          asking_for_x([&](auto asked, const NextRows* next) {
            gram_rows_halves<A, W, I, decltype(asked)::value>(x + i, y + i0, rows, r, product + i * r + i0, next);
          });
        }
      }
      const auto block = [&](auto height, auto count, int64_t i, int64_t j) {
        constexpr int V = decltype(count)::value, kHeight = decltype(height)::value;
        const A* parts[V];
        int64_t offsets[V];
        for (int v = 0; v < V; ++v) parts[v] = y + j + v * W, offsets[v] = j + v * W;
        const auto form = [&](auto asked, const NextRows* next) {
          gram_rows_block<A, W, kHeight, V, decltype(asked)::value>(x + i, parts, rows, r, product + i * r, offsets,
                                                                    next);
        };
        const int64_t line = passes / 2 * kLine;  // of x and of y
        if (upper && !kHalves) {
          asking_for_x(form);
        } else if (upper || !next_x || line >= r) {
          form(std::integral_constant<int, 0>(), nullptr);
        } else {
          const NextRows wanted[2] = {rows_at(next_x + line), rows_at(next_y + line)};
          if (r == kHeight) {  // there is one pass; where nothing is widened before it, it reads no faster than memory
            form(std::integral_constant<int, std::is_same_v<A, T> ? 0 : 2>(), wanted);
          } else {
            form(std::integral_constant<int, 1>(), wanted + passes % 2);
          }
        }
        ++passes;
      };
      const int64_t first = !upper ? 0 : kHalves ? i0 + W : two_parts ? i0 + 2 * W : i0;
      const int64_t paired = first + (r - first) / (2 * W) * (2 * W);
      for (int64_t i = i0; i < i0 + step; i += I) {
        const std::integral_constant<int, I> height;
        for (int64_t j = first; j < paired; j += 2 * W) block(height, std::integral_constant<int, 2>(), i, j);
        for (int64_t j = paired; j < r && !kLoneTogether; j += W) block(height, std::integral_constant<int, 1>(), i, j);
      }
      if constexpr (kLoneTogether) {
        for (int64_t i = i0; paired < r && i < i0 + step; i += S) {
          block(std::integral_constant<int, S>(), std::integral_constant<int, 1>(), i, paired);
        }
      }
    }
  });
}

}  // namespace lowrank::LOWRANK_ISA
