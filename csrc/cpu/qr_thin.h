// QR of a thin well-conditioned matrix from where it lies to where Q lies, without panels: XᵀX and Xᵀ(previous Q) in
// one reading, Q = X (U⁻¹ with the columns' signs) in another. One round of qr.h's CholeskyQR, which mostly is enough.
#pragma once

#include "cpu/gram_rows.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/small.h"
#include "cpu/thin_product.h"

namespace lowrank::LOWRANK_ISA {

// The rounding error of an entry of a Gram matrix, relative.
template <class T>
constexpr double kUnit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

// Sums of squares outside of this range have lost digits to overflow or underflow.
template <class T>
constexpr T kSmallestSquare = sizeof(T) == 4 ? T(1e-24) : T(1e-200);
template <class T>
constexpr T kLargestSquare = sizeof(T) == 4 ? T(1e30) : T(1e200);

template <class T>
inline bool has_safe_squares(const double* gram, int64_t r) {
  const int64_t pitch = small_pitch(r);
  for (int64_t j = 0; j < r; ++j) {
    const double square = gram[j * pitch + j];
    if (!(square >= kSmallestSquare<T> && square <= kLargestSquare<T>)) return false;
  }
  return true;
}

// How far the Q of a CholeskyQR round with this U and this Gram diagonal may be from orthonormal, in units of the
// rounding error of the Gram's entries: √r · max_j ‖D U⁻¹ e_j‖², D = diag(‖x_i‖). U⁻¹ is left in `inverse`.
inline double sensitivity(const double* upper, const double* diagonal, int64_t r, double* inverse) {
  const int64_t pitch = small_pitch(r);
  invert_upper(upper, r, inverse);
  double squares[small_pitch(kMaxRank)] = {};
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < pitch; ++j) {
      squares[j] += diagonal[i] * inverse[i * pitch + j] * inverse[i * pitch + j];
    }
  }
  double largest = 0;
  for (int64_t j = 0; j < r; ++j) largest = squares[j] > largest ? squares[j] : largest;
  return std::sqrt(static_cast<double>(r)) * largest;
}

// A round leaves ‖QᵀQ - I‖ at about sensitivity · kUnit: accepted up to here (1e-6 in float, 2e-15 in double).
constexpr double kAcceptedSensitivity = 16;

// R, of which `upper` has the upper triangle, goes to where it is wanted. A column of Q keeps the direction of the
// previous one; without one, or on a tie, R's diagonal is not negative: flip[i] tells whether row i changes its sign.
template <class T>
void write_r(const QrItem& item, int64_t r, const double* upper, const bool* flip) {
  const int64_t pitch = small_pitch(r);
  T* out = static_cast<T*>(item.r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      const double value = j < i ? 0 : upper[i * pitch + j];
      out[i * r + j] = static_cast<T>(flip[i] ? -value : value);
    }
  }
}

template <class T>
inline bool is_thin_qr(DType dtype, const QrItem& item, int64_t r) {
  if (dtype != kDTypeOf<T> || !is_thin(item.x, item.q, r)) return false;
  return !item.previous.data ||
         (item.x.column_stride == 1 ? item.previous.column_stride : item.previous.row_stride) == 1;
}

// gram and cross (r, r) += the upper triangles of XᵀX and, if there is a previous Q, XᵀQ, of some rows: of a block of
// both after the other, while it is in the first-level cache and memory is asked for the next.
template <class T>
void add_products(DType dtype, const QrItem& item, int64_t r, int64_t first, int64_t rows, double* scratch,
                  double* gram, double* cross) {
  const View &x = item.x, &previous = item.previous;
  const bool aligns = previous.data != nullptr;
  const auto from = [&](const View& view, int64_t row) {
    return static_cast<const T*>(view.data) + row * view.row_stride;
  };
  const int64_t block = gram_panel_rows(r);
  int64_t done = 0;
  if (x.row_stride == 1) {
    const int64_t whole = rows / kLanes<T> * kLanes<T>;
    constexpr int64_t kBytes = sizeof(T);
    GramSums<T> own(r, r, true, scratch), with(r, r, true, scratch + gram_lanes(r, r));
    const auto add = [&](GramSums<T>& sums, const View& y, int64_t row, int64_t count) {
      NextColumns next;
      if (row + count < first + whole)
        next = {{reinterpret_cast<const char*>(from(y, row + count)), y.column_stride * kBytes}, {}, kBytes};
      sums.add(from(x, row), x.column_stride, from(y, row), y.column_stride, count, next);
    };
    for (; done < whole; done += block) {
      const int64_t count = whole - done < block ? whole - done : block;
      add(own, x, first + done, count);
      if (aligns) add(with, previous, first + done, count);
    }
    done = whole;
    own.add_to(gram, r);
    if (aligns) with.add_to(cross, r);
  } else if (x.row_stride == r && (!aligns || previous.row_stride == r)) {
    const auto add = [&](const View& y, int64_t row, int64_t count, double* sums) {
      const T* const next = row + 2 * count <= first + rows ? from(y, row + count) : nullptr;
      add_product_of_rows(from(x, row), from(y, row), count, r, true, sums, next);
    };
    for (; done < rows; done += block) {
      const int64_t count = rows - done < block ? rows - done : block;
      add(x, first + done, count, gram);
      if (aligns) add(previous, first + done, count, cross);
    }
    done = rows;
  }
  if (done == rows) return;
  gram_rows_in<T, T>(dtype, {x, {}}, r, r, first + done, rows - done, scratch, gram);
  if (aligns) gram_rows_in<T, T>(dtype, {x, previous}, r, r, first + done, rows - done, scratch, cross);
}

// False, with nothing written but `work`, if X asks for more than one round.
template <class T>
bool thin_qr(DType dtype, const QrItem& item, int64_t r, const QrWork<T>& work, int threads) {
  const int64_t pitch = small_pitch(r), area = r * r, groups = group_count(item.rows);
  const auto rows_of = [&](int64_t g) {
    return item.rows - g * kGroupRows < kGroupRows ? item.rows - g * kGroupRows : kGroupRows;
  };
  parallel_for(groups, threads, [&](int64_t g, int worker) {
    double *const sums = work.partial + g * 2 * area, *const scratch = work.lanes + worker * gram_scratch(r, r);
    std::memset(sums, 0, static_cast<size_t>(2 * area) * sizeof(double));
    add_products<T>(dtype, item, r, g * kGroupRows, rows_of(g), scratch, sums, sums + area);
  });
  double *const gram = work.partial, *const cross = gram + area;
  for (int64_t g = 1; g < groups; ++g) {
    for (int64_t e = 0; e < 2 * area; ++e) gram[e] += work.partial[g * 2 * area + e];
  }
  double diagonal[kMaxRank];
  for (int64_t i = 0; i < r; ++i) {
    diagonal[i] = gram[i * r + i];
    for (int64_t j = 0; j < pitch; ++j) work.r[i * pitch + j] = j < i || j >= r ? 0 : gram[i * r + j];
  }
  if (!has_safe_squares<T>(work.r, r) || !cholesky_upper(work.r, r, 16 * kUnit<T>)) return false;
  if (!(sensitivity(work.r, diagonal, r, work.inverse) <= kAcceptedSensitivity)) return false;

  bool flip[kMaxRank];
  for (int64_t j = 0; j < r; ++j) {
    double along = 0;  // ⟨q_j, previous_j⟩
    for (int64_t i = 0; i <= j; ++i) along += work.inverse[i * pitch + j] * cross[i * r + j];
    flip[j] = along < 0;
    for (int64_t i = 0; i < r; ++i) {
      const double value = i > j ? 0 : work.inverse[i * pitch + j];
      work.factor[i * r + j] = static_cast<T>(flip[j] ? -value : value);
    }
  }
  const bool in_place = item.q.data == item.x.data || item.q.data == item.previous.data;  // then lines are in the cache
  const bool streams = work.streams && !in_place && can_stream(item.q, r, sizeof(T));
  const auto multiply = streams ? multiply_thin<T, true> : multiply_thin<T, false>;
  parallel_for(groups, threads,
               [&](int64_t g, int) { multiply(item.x, item.q, g * kGroupRows, rows_of(g), r, work.factor); });
  write_r<T>(item, r, work.r, flip);
  return true;
}

}  // namespace lowrank::LOWRANK_ISA
