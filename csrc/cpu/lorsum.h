// LoRSum of one layer: alternating least squares on a sum of products of factors (backends/reference/lorsum.py).
//
// Each half sweep is U ← U⁰ (Λ H⁻¹) + Σ_j P_j (c_j (Q_jᵀV) H⁻¹) with H = VᵀV + Λ: what multiplies the tall matrices is
// formed first, so that U is written once. Factors are held column after column, whose lanes run along the rows; for
// G = SᵀX, and for dense matrices, that is how the memory of X, S and G lies already, and they are read in place.
#pragma once

#include "cpu/gram.h"
#include "cpu/kernels.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/qr.h"
#include "cpu/small.h"

namespace lowrank::LOWRANK_ISA {

// Columns of a (rows, ·) matrix, in place where vectors can be read from its memory, else by way of a tile.
template <class T>
struct Columns {
  View view;
  DType dtype;
  int64_t rows;

  bool in_place() const { return dtype == kDTypeOf<T> && view.row_stride == 1 && rows % kLanes<T> == 0; }

  // Part of them: whole vectors of rows, columns `pitch` apart.
  struct Part {
    const T* data;
    int64_t pitch, rows;
  };
  // At most kLorsumRows rows from `first` on, of `count` ≤ kLorsumColumns columns from `column` on.
  Part part(int64_t first, int64_t column, int64_t count, T* tile) const {
    const int64_t n = rows - first < kLorsumRows ? rows - first : kLorsumRows;
    if (in_place()) {
      return {static_cast<const T*>(view.data) + first + column * view.column_stride, view.column_stride, n};
    }
    View from = view;
    with_storage(dtype, view.data, [&](auto* data) { from.data = data + column * view.column_stride; });
    load_panel(dtype, from, first, n, count, tile, kLorsumRows, tile + kLorsumTile);
    return {tile, kLorsumRows, padded_rows(n)};
  }
};

// out (x_columns, pitch) += XᵀY; products and sums over the rows in A. SYMMETRIC, for Y = X: blocks on and above the
// diagonal only.
template <class A, bool SYMMETRIC = false, class T>
void contract(const T* x, int64_t x_pitch, int64_t x_columns, const T* y, int64_t y_pitch, int64_t y_columns,
              int64_t rows, double* out, int64_t pitch) {
  constexpr int I = kManyRegisters ? 4 : 3, J = 4, kSums = static_cast<int>(round_up(I * J, kLanes<A>));
  for (int64_t i0 = 0; i0 < x_columns; i0 += I) {
    const T* x_column[I];
    for (int i = 0; i < I; ++i) x_column[i] = x + (i0 + i < x_columns ? i0 + i : x_columns - 1) * x_pitch;
    for (int64_t j0 = SYMMETRIC ? i0 / J * J : 0; j0 < y_columns; j0 += J) {
      const T* y_column[J];
      for (int j = 0; j < J; ++j) y_column[j] = y + (j0 + j < y_columns ? j0 + j : y_columns - 1) * y_pitch;
      Vec<A> sum[kSums] = {};
      for (int64_t k = 0; k < rows; k += kLanes<A>) {
        Vec<A> a[I];
        LOWRANK_UNROLL
        for (int i = 0; i < I; ++i) {
          a[i] = load_as<A>(x_column[i] + k);
          prefetch(x_column[i] + I * x_pitch + k);
        }
        LOWRANK_UNROLL
        for (int j = 0; j < J; ++j) {  // one vector of Y at a time: registers are few
          const Vec<A> b = load_as<A>(y_column[j] + k);
          LOWRANK_UNROLL
          for (int i = 0; i < I; ++i) sum[i * J + j] += a[i] * b;
        }
      }
      reduce_gram_tile<A, I, J>(sum, i0, j0, x_columns - i0 < I ? x_columns - i0 : I, y_columns, out, pitch);
    }
  }
}

// J columns of out += X C: V vectors of rows. If kCopies, what is read of X is written to `dense`, too.
template <class T, int J, int V, bool kCopies>
LOWRANK_INLINE void expand_block(const T* x, int64_t x_pitch, int64_t x_columns, const T* c, int64_t c_pitch, T* out,
                                 int64_t out_pitch, T* dense) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[J][V] = {};  // of this tile: sums of sums round less than one long sum
  for (int64_t i = 0; i < x_columns; ++i) {
    Vec<T> a[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) {
      a[v] = load(x + i * x_pitch + v * L);
      if constexpr (kCopies) {
        prefetch(x + i * x_pitch + (V + v) * L);
        store(dense + (i * V + v) * L, a[v]);
      }
    }
    LOWRANK_UNROLL
    for (int j = 0; j < J; ++j) {
      const Vec<T> factor = splat(c[i * c_pitch + j]);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) sum[j][v] += factor * a[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < V; ++v) {
      T* at = out + j * out_pitch + v * L;
      store(at, load(at) + sum[j][v]);
    }
  }
}

// V vectors of rows of out += X C: all columns of C from j on, in blocks of J, the rest in blocks of J/2, … 1.
template <class T, int J, int V>
LOWRANK_INLINE void expand_columns(const T* dense, int64_t x_columns, const T* c, int64_t columns, int64_t j, T* out,
                                   int64_t out_pitch) {
  for (; j + J <= columns; j += J) {
    expand_block<T, J, V, false>(dense, V * kLanes<T>, x_columns, c + j, columns, out + j * out_pitch, out_pitch,
                                 nullptr);
  }
  if constexpr (J > 1) {
    if (j < columns) expand_columns<T, J / 2, V>(dense, x_columns, c, columns, j, out, out_pitch);
  }
}

// out (rows, columns) += X C with C (x_columns, columns), contiguous, of at most kMaxRank or kLorsumColumns rows. Rows
// outermost: the first block of columns copies what it reads, as columns whole pages apart share few lines of the
// first-level cache, and the others read that.
template <class T>
void expand(const T* x, int64_t x_pitch, int64_t x_columns, const T* c, int64_t columns, T* out, int64_t out_pitch,
            int64_t rows) {
  constexpr int L = kLanes<T>, J = kManyRegisters ? 8 : 4, V = kManyRegisters ? 2 : 3;
  static_assert(kLorsumColumns <= kMaxRank);
  alignas(kLineBytes) T dense[kMaxRank * V * L];
  const auto some_rows = [&](int64_t k, auto v) {
    constexpr int kRows = decltype(v)::value;
    const auto first = [&](auto j) {
      constexpr int kFirst = decltype(j)::value;
      expand_block<T, kFirst, kRows, true>(x + k, x_pitch, x_columns, c, columns, out + k, out_pitch, dense);
      expand_columns<T, J, kRows>(dense, x_columns, c, columns, kFirst, out + k, out_pitch);
    };
    columns >= J ? first(std::integral_constant<int, J>()) : first(std::integral_constant<int, 1>());
  };
  int64_t k = 0;
  for (; k + V * L <= rows; k += V * L) some_rows(k, std::integral_constant<int, V>());
  for (; k < rows; k += L) some_rows(k, std::integral_constant<int, 1>());
}

// H = gram + Λ as the inverse of its Cholesky factor, H⁻¹ = WWᵀ, and as Wᵀ.
struct Inverse {
  double *upper, *lower;
};

// out (rows, r) = c · sums (rows, r) · H⁻¹; of sums the rows are `pitch` apart. By W and then by Wᵀ: what rounding does
// to H⁻¹ itself, once formed, is as large as its inverse's largest entries and in all directions, where that of its
// factors lies in those that H hardly has. Several rows at a time, whose chains of additions overlap.
template <class T>
void apply_inverse(const double* sums, int64_t rows, double c, const Inverse& inverse, int64_t r, int64_t pitch,
                   T* out) {
  constexpr int R = 8, L = kLanes<double>;
  alignas(kLineBytes) double between[R * kMaxRank];
  for (int64_t t = 0; t < rows; t += R) {
    const double* from[R];
    for (int q = 0; q < R; ++q) from[q] = sums + (t + q < rows ? t + q : rows - 1) * pitch;
    const auto sum = [&](const double* map, int64_t begin, int64_t end, Vec<double>* total) {
      for (int64_t i = begin; i < end; ++i) {
        const Vec<double> row = load(map + i * pitch);
        for (int q = 0; q < R; ++q) total[q] += splat(from[q][i]) * row;
      }
    };
    for (int64_t j = 0; j < r; j += L) {
      Vec<double> total[R] = {};
      sum(inverse.upper + j, 0, j + L < r ? j + L : r, total);
      for (int q = 0; q < R; ++q) store(between + q * pitch + j, total[q]);
    }
    for (int q = 0; q < R; ++q) from[q] = between + q * pitch;
    for (int64_t j = 0; j < r; j += L) {
      Vec<double> total[R] = {};
      sum(inverse.lower + j, j, r, total);
      double values[L];
      for (int q = 0; q < R && t + q < rows; ++q) {
        store(values, splat(c) * total[q]);
        for (int64_t l = 0; l < L && j + l < r; ++l) out[(t + q) * r + j + l] = static_cast<T>(values[l]);
      }
    }
  }
}

// W for H = gram + Λ, and Λ, a diagonal matrix: λ, but in no column less than the rounding error of its diagonal entry,
// and 1 in a zero column. False if H is not positive definite: something is not finite.
inline bool invert(const double* gram, int64_t r, double proximal, double relative, double* ridge, double* factor,
                   const Inverse& inverse) {
  const int64_t pitch = small_pitch(r);
  std::memcpy(factor, gram, static_cast<size_t>(r * pitch) * sizeof(double));
  std::memset(ridge, 0, static_cast<size_t>(r * pitch) * sizeof(double));
  for (int64_t i = 0; i < r; ++i) {
    const double floor = relative * gram[i * pitch + i];
    double& own = ridge[i * pitch + i];
    own = floor > proximal ? floor : proximal;
    if (own == 0) own = 1;
    factor[i * pitch + i] += own;
  }
  if (!cholesky_upper(factor, r, 0)) return false;
  invert_upper(factor, r, inverse.upper);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < pitch; ++j) inverse.lower[i * pitch + j] = j < r ? inverse.upper[j * pitch + i] : 0;
  }
  return true;
}

// One of the two factors: start and present value, column after column.
template <class T>
struct Factor {
  View view, out;
  int64_t rows, padded, pitch;  // rows, with the zeros behind them, and from column to column
  T *start, *now;
  double* gram;  // of the present value
};

constexpr int64_t kThinColumns = 32;

template <class T>
class Lorsum {
 public:
  Lorsum(const LorsumScalars& scalars, const LorsumItem& item, const LorsumWork<T>& work, int threads)
      : s_(scalars), item_(item), work_(work), threads_(threads), r_(scalars.r), pitch_(small_pitch(r_)) {
    const int64_t rows[2] = {item.d_out, item.d_in};
    T* next = work.factors;
    for (int side = 0; side < 2; ++side) {
      Factor<T>& f = factor_[side];
      f = {side ? item.v : item.u, side ? item.out_v : item.out_u, rows[side], padded_rows(rows[side]),
           lorsum_pitch(rows[side])};
      f.start = next;
      f.now = next + r_ * f.pitch;
      next += 2 * r_ * f.pitch;
      f.gram = work.small + side * r_ * pitch_;
      if (side == 1 || !is_product()) pack(f.view, s_.dtype, f.rows, r_, f.start, f.pitch);
    }
    T* packed = work.packed;
    for (int64_t j = 0; j < s_.terms; ++j) {
      const LorsumTerm& term = item.terms[j];
      for (int side = 0; side < 2; ++side) {
        Columns<T>& columns = columns_[side][j] = {side ? term.right : term.left, term.dtype, factor_[side].rows};
        if (term.dense || term.k > kMaxRank || (columns.in_place() && !is_start(j, side))) continue;
        // Thin factors are gathered once; the start, which often is a term, is there already.
        const Factor<T>& f = factor_[side];
        T* at = f.start;
        if (!is_start(j, side)) {
          at = packed;
          packed += term.k * f.pitch;
          pack(columns.view, term.dtype, f.rows, term.k, at, f.pitch);
        }
        columns = {{at, 1, f.pitch}, kDTypeOf<T>, f.padded};
      }
    }
  }

  void run() {
    if (is_product()) {
      sweep_one_side(0, factor_[1].start, nullptr, nullptr);
      store_factor(factor_[0]);
      return;
    }
    bool good = true;
    const int first = s_.u_first ? 0 : 1;
    sum_gram(factor_[1 - first], factor_[1 - first].start);
    for (int turn = 0; turn < 2 * s_.sweeps && good; ++turn) {
      const int side = (turn + first) % 2;
      good = half_sweep(side, turn == 0 ? factor_[1 - side].start : factor_[1 - side].now);
    }
    // A Gram is finite exactly if its factor is: squares of floats do not overflow in double.
    for (const Factor<T>& f : factor_) {
      for (int64_t j = 0; j < r_; ++j) good = good && std::isfinite(f.gram[j * pitch_ + j]);
    }
    for (const Factor<T>& f : factor_) {
      if (!good) {
        fill_nan<T>(s_.dtype, f.out, f.rows, r_);
      } else {
        store_factor(f);
      }
    }
  }

 private:
  void store_factor(const Factor<T>& f) const {
    for (int64_t begin = 0; begin < f.rows; begin += kLorsumRows) {
      const int64_t n = f.rows - begin < kLorsumRows ? f.rows - begin : kLorsumRows;
      for (int64_t j = 0; j < r_; j += kLorsumColumns) {
        const int64_t count = r_ - j < kLorsumColumns ? r_ - j : kLorsumColumns;
        View out = f.out;
        with_storage(s_.dtype, out.data, [&](auto* data) { out.data = data + j * out.column_stride; });
        store_panel(s_.dtype, out, begin, n, count, f.now + j * f.pitch + begin, f.pitch, work_.tile + kLorsumTile);
      }
    }
  }

  // Whether the factor of a term is the start.
  bool is_start(int64_t j, int side) const {
    const LorsumTerm& term = item_.terms[j];
    if (is_product() && side == 0) return false;
    if (term.dense || term.dtype != s_.dtype || term.k != r_) return false;
    const View &a = side ? term.right : term.left, &b = factor_[side].view;
    return a.data == b.data && a.row_stride == b.row_stride && a.column_stride == b.column_stride;
  }
  // Factors that are contracted in double: what they have in common with V may cancel. Of the tokens of SᵀX there are
  // more.
  bool is_thin(const LorsumTerm& term) const { return term.k <= (r_ > kThinColumns ? r_ : kThinColumns); }
  bool is_product() const { return s_.sweeps == 0; }

  void pack(const View& view, DType dtype, int64_t rows, int64_t columns, T* out, int64_t pitch) const {
    for (int64_t begin = 0; begin < rows; begin += kLorsumRows) {
      const int64_t n = rows - begin < kLorsumRows ? rows - begin : kLorsumRows;
      for (int64_t j = 0; j < columns; j += kLorsumColumns) {
        const int64_t count = columns - j < kLorsumColumns ? columns - j : kLorsumColumns;
        View from = view;
        with_storage(dtype, view.data, [&](auto* data) { from.data = data + j * view.column_stride; });
        load_panel(dtype, from, begin, n, count, out + j * pitch + begin, pitch, work_.tile + kLorsumTile);
      }
    }
  }

  // gram = XᵀX of a factor, over chunks of rows, and then over the chunks in order.
  void sum_gram(const Factor<T>& f, const T* x) const {
    const int64_t chunks = lorsum_chunks(f.rows);
    parallel_for(chunks, threads_, [&](int64_t chunk, int) { chunk_gram(f, x, chunk); });
    add_grams(f, chunks);
  }
  void chunk_gram(const Factor<T>& f, const T* x, int64_t chunk) const {
    const int64_t begin = chunk * kLorsumRows, n = f.padded - begin < kLorsumRows ? f.padded - begin : kLorsumRows;
    double* gram = work_.grams + chunk * r_ * pitch_;
    std::memset(gram, 0, static_cast<size_t>(r_ * pitch_) * sizeof(double));
    contract<double, true>(x + begin, f.pitch, r_, x + begin, f.pitch, r_, n, gram, pitch_);
  }
  void add_grams(const Factor<T>& f, int64_t chunks) const {
    std::memcpy(f.gram, work_.grams, static_cast<size_t>(r_ * pitch_) * sizeof(double));
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t e = 0; e < r_ * pitch_; ++e) f.gram[e] += work_.grams[chunk * r_ * pitch_ + e];
    }
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t j = 0; j < i; ++j) f.gram[i * pitch_ + j] = f.gram[j * pitch_ + i];
    }
  }

  // What a term contributes to the factor of `side`: coefficients for P (a row for each column of P), or, of a dense
  // matrix whose rows lie contiguous along the other side, rows of the result itself.
  enum class Path { kFactors, kDenseColumns, kDenseRows };
  Path path_of(int64_t j, int side) const {
    const LorsumTerm& term = item_.terms[j];
    if (!term.dense) return Path::kFactors;
    const int64_t along = side ? term.left.column_stride : term.left.row_stride;
    const int64_t across = side ? term.left.row_stride : term.left.column_stride;
    return along != 1 && across == 1 ? Path::kDenseRows : Path::kDenseColumns;
  }
  View dense_view(int64_t j, bool transposed) const {
    const View& d = item_.terms[j].left;
    return transposed ? View{d.data, d.column_stride, d.row_stride} : d;
  }
  int64_t coefficient_rows(int64_t j, int side) const {
    const Path way = path_of(j, side);
    return way == Path::kFactors ? item_.terms[j].k : factor_[way == Path::kDenseRows ? side : 1 - side].rows;
  }

  bool half_sweep(int side, const T* other) {
    const Factor<T>& g = factor_[1 - side];
    double *ridge = work_.small + 2 * r_ * pitch_, *factor = ridge + r_ * pitch_;
    const Inverse inverse{factor + r_ * pitch_, factor + 2 * r_ * pitch_};
    // With λ = 0 the ridge stands for λ → 0 and for right-hand sides that were rounded to T.
    double relative = 4 * static_cast<double>(r_) * std::numeric_limits<double>::epsilon();
    const double own = static_cast<double>(std::numeric_limits<T>::epsilon());
    if (s_.proximal == 0 && own > relative) relative = own;
    if (!invert(g.gram, r_, s_.proximal, relative, ridge, factor, inverse)) return false;
    sweep_one_side(side, other, ridge, &inverse);
    return true;
  }

  // now = start ΛH⁻¹ + Σ_j P_j (c_j (Q_jᵀ other) H⁻¹), and its Gram; or, without Λ and H⁻¹, the sum of products alone.
  void sweep_one_side(int side, const T* other, const double* ridge, const Inverse* inverse) {
    const Factor<T>& f = factor_[side];
    T* const start_map = work_.coefficients;
    if (inverse != nullptr) apply_inverse(ridge, r_, 1, *inverse, r_, pitch_, start_map);
    int64_t blocks = 0;
    T* next = start_map + r_ * r_;
    for (int64_t j = 0; j < s_.terms; ++j) {
      first_block_[j] = blocks;
      coefficients_[j] = next;
      blocks += (coefficient_rows(j, side) + kLorsumColumns - 1) / kLorsumColumns;
      next += coefficient_rows(j, side) * r_;
    }
    parallel_for(blocks, threads_, [&](int64_t block, int worker) {
      int64_t j = s_.terms - 1;
      while (first_block_[j] > block) --j;
      form_coefficients(j, side, (block - first_block_[j]) * kLorsumColumns, other, inverse, worker);
    });
    for (int64_t j = 0; j < s_.terms; ++j) {  // what multiplies the start goes with it
      if (!is_start(j, side)) continue;
      for (int64_t e = 0; e < r_ * r_; ++e) start_map[e] += coefficients_[j][e];
    }
    const int64_t chunks = lorsum_chunks(f.rows);
    parallel_for(chunks, threads_, [&](int64_t chunk, int worker) {
      form_rows(side, chunk * kLorsumRows, start_map, worker);
      if (!is_product()) chunk_gram(f, f.now, chunk);
    });
    if (!is_product()) add_grams(f, chunks);
  }

  // Rows [first, first + kLorsumColumns) of c (QᵀV) H⁻¹, of c V H⁻¹ or of c (D V) H⁻¹.
  void form_coefficients(int64_t j, int side, int64_t first, const T* other, const Inverse* inverse, int worker) const {
    const LorsumTerm& term = item_.terms[j];
    const Factor<T>& g = factor_[1 - side];
    const Path way = path_of(j, side);
    const int64_t rows = coefficient_rows(j, side);
    const int64_t count = rows - first < kLorsumColumns ? rows - first : kLorsumColumns;
    T* tile = work_.tile + worker * work_.tile_stride;
    double* sums = work_.sums + worker * work_.sums_stride;
    std::memset(sums, 0, static_cast<size_t>(count * pitch_) * sizeof(double));
    if (way == Path::kDenseColumns) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < r_; ++i) sums[t * pitch_ + i] = static_cast<double>(other[i * g.pitch + first + t]);
      }
    } else if (inverse != nullptr && other == g.start && is_start(j, 1 - side)) {  // VᵀV is there
      std::memcpy(sums, g.gram + first * pitch_, static_cast<size_t>(count * pitch_) * sizeof(double));
    } else {
      const Columns<T> dense{dense_view(j, side == 0), term.dtype, g.rows};
      const Columns<T>& q = way == Path::kFactors ? columns_[1 - side][j] : dense;
      for (int64_t begin = 0; begin < q.rows; begin += kLorsumRows) {
        const auto part = q.part(begin, first, count, tile);
        if (way == Path::kFactors && is_thin(term)) {
          contract<double>(part.data, part.pitch, count, other + begin, g.pitch, r_, part.rows, sums, pitch_);
        } else {
          contract<T>(part.data, part.pitch, count, other + begin, g.pitch, r_, part.rows, sums, pitch_);
        }
      }
    }
    T* out = coefficients_[j] + first * r_;
    if (inverse != nullptr) {
      apply_inverse(sums, count, term.c, *inverse, r_, pitch_, out);
      return;
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < r_; ++i) out[t * r_ + i] = static_cast<T>(term.c * sums[t * pitch_ + i]);
    }
  }

  // The new factor, rows [begin, begin + kLorsumRows).
  void form_rows(int side, int64_t begin, const T* start_map, int worker) const {
    const Factor<T>& f = factor_[side];
    const int64_t n = f.padded - begin < kLorsumRows ? f.padded - begin : kLorsumRows;
    T *out = f.now + begin, *tile = work_.tile + worker * work_.tile_stride;
    for (int64_t i = 0; i < r_; ++i) std::memset(out + i * f.pitch, 0, static_cast<size_t>(n) * sizeof(T));
    if (!is_product()) expand(f.start + begin, f.pitch, r_, start_map, r_, out, f.pitch, n);
    for (int64_t j = 0; j < s_.terms; ++j) {
      if (is_start(j, side)) continue;
      const Path way = path_of(j, side);
      const T* c = coefficients_[j];
      if (way == Path::kDenseRows) {
        const int64_t end = f.rows - begin < n ? f.rows - begin : n;
        for (int64_t i = 0; i < r_; ++i) {
          for (int64_t k = 0; k < end; ++k) out[i * f.pitch + k] += c[(begin + k) * r_ + i];
        }
        continue;
      }
      const Columns<T> dense{dense_view(j, side == 1), item_.terms[j].dtype, f.rows};
      const Columns<T>& p = way == Path::kFactors ? columns_[side][j] : dense;
      const int64_t columns = coefficient_rows(j, side);
      for (int64_t first = 0; first < columns; first += kLorsumColumns) {
        const int64_t count = columns - first < kLorsumColumns ? columns - first : kLorsumColumns;
        const auto part = p.part(begin, first, count, tile);
        expand(part.data, part.pitch, count, c + first * r_, r_, out, f.pitch, part.rows);
      }
    }
  }

  const LorsumScalars& s_;
  const LorsumItem& item_;
  const LorsumWork<T>& work_;
  int threads_;
  int64_t r_, pitch_;
  Factor<T> factor_[2];
  Columns<T> columns_[2][kMaxLorsumTerms];
  int64_t first_block_[kMaxLorsumTerms];
  T* coefficients_[kMaxLorsumTerms];
};

template <class T>
void lorsum(const LorsumScalars& scalars, const LorsumItem& item, const LorsumWork<T>& work, int threads) {
  Lorsum<T>(scalars, item, work, threads).run();
}

}  // namespace lowrank::LOWRANK_ISA
