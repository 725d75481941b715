// Thin Gram products XᵀY of matrices in panels.
#pragma once

#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// Consecutive panels of a tall matrix: `rows` rows in all, r columns, each panel `step` rows high (and its column
// pitch).
template <class T>
struct Panels {
  T* data;
  int64_t rows;
  int64_t r;
  int64_t step = panel_rows(r);

  int64_t height() const { return step; }
  int64_t count() const { return (rows + height() - 1) / height(); }
  T* panel(int64_t p) const { return data + p * height() * r; }
  // Rows of panel p, without and with the zeros behind them.
  int64_t rows_of(int64_t p) const { return rows - p * height() < height() ? rows - p * height() : height(); }
  int64_t padded_rows_of(int64_t p) const { return padded_rows(rows_of(p)); }
  // Rows [group · kGroupRows, (group + 1) · kGroupRows).
  Panels group(int64_t g) const {
    const int64_t first = g * kGroupRows;
    return {data + first * r, rows - first < kGroupRows ? rows - first : kGroupRows, r, step};
  }
};

// Accumulators of a Gram product come in tiles of at most kGramI columns of x by kGramJ of y: a lane sums up every
// kLanes-th product. The tiles on the diagonal of a symmetric product are triangles of kGramJ columns.
constexpr int kGramI = kManyRegisters ? 4 : 3, kGramJ = 4, kGramTile = kGramJ * kGramJ;

// Columns of storage that are wanted next, of x and of y, so many bytes apart.
struct NextColumns {
  struct Part {
    const char* data = nullptr;
    int64_t pitch = 0;
  } x, y;
  int64_t element_bytes = 0;

  // For those of x that a tile on the diagonal is as wide as.
  LOWRANK_INLINE void ask(int64_t first, int64_t k) const {
    if (!x.data) return;
    for (int j = 0; j < kGramJ; ++j) prefetch(x.data + (first + j) * x.pitch + k * element_bytes);
  }
};

// tile[i * kGramJ + j] += x_i · y_j, lane by lane, over `rows` rows of I columns x and of the kGramJ columns y;
// products and sums in A. read(k, a, multiply) reads a vector of each x into `a`, and hands those of y to multiply(j,
// b), one at a time, as registers are few. Of a triangle entries with j < i are left alone.
template <class A, int I, bool Triangle, class Read>
LOWRANK_INLINE void gram_tile(int64_t rows, Vec<A>* LOWRANK_RESTRICT tile, const Read& read) {
  constexpr int J = kGramJ;
  Vec<A> sum[I][J];
  LOWRANK_UNROLL
  for (int i = 0; i < I; ++i) {
    LOWRANK_UNROLL
    for (int j = 0; j < J; ++j) sum[i][j] = tile[i * J + j];
  }
  for (int64_t k = 0; k < rows; k += kLanes<A>) {
    Vec<A> a[I];
    read(k, a, [&](int j, const Vec<A>& b) {
      LOWRANK_UNROLL
      for (int i = 0; i < I; ++i) {
        if (!Triangle || j >= i) sum[i][j] += a[i] * b;
      }
    });
  }
  LOWRANK_UNROLL
  for (int i = 0; i < I; ++i) {
    LOWRANK_UNROLL
    for (int j = 0; j < J; ++j) tile[i * J + j] = sum[i][j];
  }
}

// The same of I columns x and the columns y of T; ask(k) is called on the way.
template <class A, int I, class T, class Ask>
LOWRANK_INLINE void gram_rectangle(const T* const* x, const T* const* y, int64_t rows, Vec<A>* LOWRANK_RESTRICT tile,
                                   const Ask& ask) {
  gram_tile<A, I, false>(rows, tile, [&](int64_t k, Vec<A>* a, const auto& multiply) {
    ask(k);
    LOWRANK_UNROLL
    for (int i = 0; i < I; ++i) a[i] = load_as<A>(x[i] + k);
    LOWRANK_UNROLL
    for (int j = 0; j < kGramJ; ++j) multiply(j, load_as<A>(y[j] + k));
  });
}

// The same on the diagonal. If kCopies, the columns are written to `to`, as A, on the way, between products that wait
// for other parts of the core.
template <class A, bool kCopies, class T, class Ask>
LOWRANK_INLINE void gram_triangle(const T* const* y, int64_t rows, Vec<A>* LOWRANK_RESTRICT tile, A* const* to,
                                  const Ask& ask) {
  gram_tile<A, kGramJ, true>(rows, tile, [&](int64_t k, Vec<A>* a, const auto& multiply) {
    ask(k);
    LOWRANK_UNROLL
    for (int j = 0; j < kGramJ; ++j) {
      a[j] = load_as<A>(y[j] + k);
      if (kCopies) store(to[j] + k, a[j]);
      multiply(j, a[j]);
    }
  });
}

// kGramJ columns from j0 on, of k that are so far apart. A column beyond the last one stands for the last one.
template <class T>
LOWRANK_INLINE void columns_from(T* data, int64_t pitch, int64_t j0, int64_t k, T** columns) {
  for (int j = 0; j < kGramJ; ++j) columns[j] = data + (j0 + j < k ? j0 + j : k - 1) * pitch;
}

// The tile of `height` columns of x and kGramJ columns of y, from (i0, j0) on, of XᵀY, whose columns are so far apart.
template <class A, class T, class Ask>
LOWRANK_INLINE void add_gram_tile(const T* x, int64_t x_pitch, const T* y, int64_t y_pitch, int64_t rows, int64_t k,
                                  int64_t i0, int64_t j0, int64_t height, Vec<A>* tile, const Ask& ask) {
  const T *x_columns[kGramI], *y_columns[kGramJ];
  for (int i = 0; i < kGramI; ++i) x_columns[i] = x + (i0 + (i < height ? i : 0)) * x_pitch;
  columns_from(y, y_pitch, j0, k, y_columns);
  switch (height) {
    case 1:
      return gram_rectangle<A, 1>(x_columns, y_columns, rows, tile, ask);
    case 2:
      return gram_rectangle<A, 2>(x_columns, y_columns, rows, tile, ask);
    case 3:
      return gram_rectangle<A, 3>(x_columns, y_columns, rows, tile, ask);
    default:
      return gram_rectangle<A, kGramI>(x_columns, y_columns, rows, tile, ask);
  }
}
template <class A, class T>
LOWRANK_INLINE void add_gram_tile(const T* x, int64_t x_pitch, const T* y, int64_t y_pitch, int64_t rows, int64_t k,
                                  int64_t i0, int64_t j0, int64_t height, Vec<A>* tile) {
  add_gram_tile<A>(x, x_pitch, y, y_pitch, rows, k, i0, j0, height, tile, [](int64_t) {});
}

// gram (·, pitch) += the sums over the lanes of the tile of I × J vectors from (i0, j0) on, of which `height` rows and
// the columns before k count, added up in double. The tile, which whole vectors of sums are read of, is used up.
template <class A, int I = kGramJ, int J = kGramJ>
LOWRANK_INLINE void reduce_gram_tile(Vec<A>* tile, int64_t i0, int64_t j0, int64_t height, int64_t k, double* gram,
                                     int64_t pitch) {
  constexpr int kSums = static_cast<int>(round_up(I * J, kLanes<A>));
  A sums[kSums];
  for (int s = 0; s < kSums; s += kLanes<A>) store(sums + s, sum_lanes_of_each<A>(tile + s));
  double* const corner = gram + i0 * pitch + j0;
  if (height == I && j0 + J <= k) {
    for (int i = 0; i < I; ++i) {
      for (int j = 0; j < J; ++j) corner[i * pitch + j] += static_cast<double>(sums[i * J + j]);
    }
    return;
  }
  for (int i = 0; i < I && i < height; ++i) {
    for (int j = 0; j < J && j0 + j < k; ++j) corner[i * pitch + j] += static_cast<double>(sums[i * J + j]);
  }
}

// body(i0, j0, height, index) for the tiles of an (r, k) product; of a symmetric one, those of its upper triangle, with
// a height of 0 for a triangle on the diagonal. One column alone would leave the core waiting for its sums.
template <class Body>
LOWRANK_INLINE void for_each_gram_tile(int64_t r, int64_t k, bool symmetric, const Body& body) {
  int64_t index = 0;
  for (int64_t j0 = 0; j0 < k; j0 += kGramJ) {
    if (symmetric) body(j0, j0, int64_t{0}, index++);
    const int64_t end = symmetric ? j0 : r;
    for (int64_t i0 = 0, height = 0; i0 < end; i0 += height) {
      const int64_t left = end - i0;
      height = left < kGramI ? left : left % kGramI == 1 ? kGramI - 1 : kGramI;
      body(i0, j0, height, index++);
    }
  }
}

// A Gram product over panels that come one after the other, each in the first-level cache: the accumulators stay
// vectors until the last panel.
template <class A>
class GramSums {
 public:
  // `memory` holds gram_lanes(r, k) doubles.
  GramSums(int64_t r, int64_t k, bool symmetric, double* memory)
      : r_(r), k_(k), symmetric_(symmetric), tiles_(reinterpret_cast<Vec<A>*>(memory)) {
    for_each_gram_tile(r_, k_, symmetric_, [&](int64_t, int64_t, int64_t, int64_t index) {
      for (int s = 0; s < kGramTile; ++s) tiles_[index * kGramTile + s] = Vec<A>{};
      tiles_count_ = index + 1;
    });
  }
  // `rows` rows (whole vectors) of columns that are so far apart; `next` is asked for.
  template <class T>
  void add(const T* x, int64_t x_pitch, const T* y, int64_t y_pitch, int64_t rows, const NextColumns& next = {}) {
    for_each_gram_tile(r_, k_, symmetric_, [&](int64_t i0, int64_t j0, int64_t height, int64_t index) {
      Vec<A>* const tile = tiles_ + index * kGramTile;
      with_share(next, index, [&](const auto& ask) {
        if (height > 0) return add_gram_tile<A>(x, x_pitch, y, y_pitch, rows, k_, i0, j0, height, tile, ask);
        const T* columns[kGramJ];
        columns_from(y, y_pitch, j0, k_, columns);
        gram_triangle<A, false>(columns, rows, tile, static_cast<A* const*>(nullptr), ask);
      });
    });
  }
  // The same of XᵀX and columns of T, which the triangles on the diagonal copy to `panel`, as A, for all others.
  template <class T>
  void add_copying(const T* x, int64_t stride, int64_t rows, A* panel, int64_t pitch, const NextColumns& next) {
    for_each_gram_tile(r_, r_, true, [&](int64_t i0, int64_t j0, int64_t height, int64_t index) {
      Vec<A>* const tile = tiles_ + index * kGramTile;
      if (height > 0) return add_gram_tile<A>(panel, pitch, panel, pitch, rows, r_, i0, j0, height, tile);
      const T* columns[kGramJ];
      A* copies[kGramJ];
      columns_from(x, stride, j0, r_, columns);
      columns_from(panel, pitch, j0, r_, copies);
      gram_triangle<A, true>(columns, rows, tile, copies, [&](int64_t k) { next.ask(j0, k); });
    });
  }
  void add_to(double* gram, int64_t pitch) {
    for_each_gram_tile(r_, k_, symmetric_, [&](int64_t i0, int64_t j0, int64_t height, int64_t index) {
      const int64_t rows = height > 0 ? height : r_ - j0 < kGramJ ? r_ - j0 : kGramJ;
      reduce_gram_tile<A>(tiles_ + index * kGramTile, i0, j0, rows, k_, gram, pitch);
    });
  }

 private:
  // Calls f(ask), where ask(k) asks for the share that a tile has of what is wanted next: memory answers so many
  // requests at a time only.
  template <class F>
  LOWRANK_INLINE void with_share(const NextColumns& next, int64_t index, const F& f) {
    const int64_t columns = symmetric_ ? r_ : r_ + k_, share = (columns + tiles_count_ - 1) / tiles_count_;
    const int64_t first = index * share;
    if (!next.x.data || first >= columns) return f([](int64_t) {});
    const auto ask = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const char* wanted[kCount];
      for (int n = 0; n < kCount; ++n) {
        const int64_t column = first + n < columns ? first + n : first;
        wanted[n] = column < r_ ? next.x.data + column * next.x.pitch : next.y.data + (column - r_) * next.y.pitch;
      }
      f([&](int64_t k) {
        LOWRANK_UNROLL
        for (int n = 0; n < kCount; ++n) prefetch(wanted[n] + k * next.element_bytes);
      });
    };
    if (share == 1) return ask(std::integral_constant<int, 1>());
    if (share == 2) return ask(std::integral_constant<int, 2>());
    share <= 4 ? ask(std::integral_constant<int, 4>()) : ask(std::integral_constant<int, 8>());
  }

  int64_t r_, k_;
  bool symmetric_;
  Vec<A>* tiles_;
  int64_t tiles_count_ = 0;
};

// product (r, r) += XᵀY of columns that are so far apart, over `rows` rows (whole vectors).
template <class T>
void add_product_of_columns(const T* x, int64_t x_pitch, const T* y, int64_t y_pitch, int64_t rows, int64_t r,
                            double* product) {
  for_each_gram_tile(r, r, false, [&](int64_t i0, int64_t j0, int64_t height, int64_t) {
    Vec<T> tile[kGramTile] = {};
    add_gram_tile<T>(x, x_pitch, y, y_pitch, rows, r, i0, j0, height, tile);
    reduce_gram_tile<T>(tile, i0, j0, height, r, product, r);
  });
}

// The same of panels of one height.
template <class T>
void add_product_of_panels(const Panels<T>& x, const Panels<T>& y, double* product, int64_t r) {
  for_each_gram_tile(r, r, false, [&](int64_t i0, int64_t j0, int64_t height, int64_t) {
    Vec<T> tile[kGramTile] = {};
    for (int64_t p = 0; p < x.count(); ++p) {
      add_gram_tile<T>(x.panel(p), x.height(), y.panel(p), y.height(), x.padded_rows_of(p), r, i0, j0, height, tile);
    }
    reduce_gram_tile<T>(tile, i0, j0, height, r, product, r);
  });
}

}  // namespace lowrank::LOWRANK_ISA
