// QR of a thin well-conditioned matrix from where it lies to where Q lies, without panels: one reading gives XᵀX,
// another Q = X U⁻¹ and the signs of its columns. One round of qr.h's CholeskyQR, which mostly is enough.
#pragma once

#include "cpu/gram_rows.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/small.h"
#include "cpu/thin_upper.h"

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

// How far an entry of QᵀQ of a CholeskyQR round with this U and this Gram diagonal may be from the identity, in units
// of the rounding error of the Gram's entries, whose signs are random: max_j ‖D U⁻¹ e_j‖², D = diag(‖x_i‖). U⁻¹ is left
// in `inverse`.
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
  return largest;
}

// A round leaves ‖QᵀQ - I‖_max at some 4 · sensitivity · kUnit: accepted up to here (1e-6 in float, 2e-15 in double).
constexpr double kAcceptedSensitivity = 4;

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

// Changes the sign of rows [first, first + rows) of the columns of Q that `flip` names.
template <class T>
void flip_columns(const View& q, int64_t first, int64_t rows, int64_t r, const bool* flip) {
  for (int64_t i = first; i < first + rows; ++i) {
    T* const row = static_cast<T*>(q.data) + i * q.row_stride;
    for (int64_t j = 0; j < r; ++j)
      row[j * q.column_stride] = flip[j] ? -row[j * q.column_stride] : row[j * q.column_stride];
  }
}

// False, with XᵀX in work.gram (its upper triangle) and nothing written but `work`, if X asks for more than one round.
template <class T>
bool thin_qr(DType dtype, const QrItem& item, int64_t r, const QrWork<T>& work, int threads) {
  const int64_t pitch = small_pitch(r), area = r * r, groups = group_count(item.rows);
  const auto end_of = [&](int64_t g) { return g == groups - 1 ? item.rows : (g + 1) * kGroupRows; };
  GramItem own{item.x, {}, item.rows}, then{item.previous, {}, item.rows};
  if (item.previous.data) own.next = &then;
  parallel_for(groups, threads, [&](int64_t g, int worker) {
    double* const sums = work.partial + g * area;
    std::memset(sums, 0, static_cast<size_t>(area) * sizeof(double));
    gram_rows_in<T, T>(dtype, own, r, r, g * kGroupRows, end_of(g) - g * kGroupRows,
                       work.lanes + worker * gram_scratch(r, r), sums);
  });
  double* const total = work.partial;
  for (int64_t g = 1; g < groups; ++g) {
    for (int64_t e = 0; e < area; ++e) total[e] += work.partial[g * area + e];
  }
  double diagonal[kMaxRank];
  for (int64_t i = 0; i < r; ++i) {
    diagonal[i] = total[i * r + i];
    for (int64_t j = 0; j < pitch; ++j) work.gram[i * pitch + j] = j < i || j >= r ? 0 : total[i * r + j];
  }
  if (!has_safe_squares<T>(work.gram, r)) return false;
  std::memcpy(work.r, work.gram, static_cast<size_t>(r * pitch) * sizeof(double));
  if (!cholesky_upper(work.r, r, 16 * kUnit<T>)) return false;
  if (!(sensitivity(work.r, diagonal, r, work.inverse) <= kAcceptedSensitivity)) return false;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) work.factor[i * r + j] = j < i ? T(0) : static_cast<T>(work.inverse[i * pitch + j]);
  }

  const bool in_place = item.q.data == item.x.data || item.q.data == item.previous.data;  // then lines are in the cache
  const bool streams = work.streams && !in_place && can_stream(item.q, r, sizeof(T));
  const auto multiply = streams ? multiply_thin_upper<T, true> : multiply_thin_upper<T, false>;
  // Which columns change their sign is known when all of Q is. The first rows mostly tell: where they are wrong, the
  // column is gone over once more.
  constexpr int64_t kSample = 64;
  const int64_t sample = item.rows < kSample ? item.rows : kSample;
  double* const along = work.partial;  // (1 + groups, r): of the first rows and of each group's others
  bool flip[kMaxRank] = {}, again[kMaxRank] = {};
  const auto settle = [&](double* sums, bool* which, int64_t rows) {
    bool any = false;
    for (int64_t j = 0; j < r; ++j) any |= which[j] = sums[j] < 0;
    if (!any) return;
    flip_columns<T>(item.q, 0, rows, r, which);
    for (int64_t j = 0; j < r; ++j) {
      if (!which[j]) continue;
      flip[j] = !flip[j];
      sums[j] = -sums[j];
      for (int64_t i = 0; i <= j; ++i) work.factor[i * r + j] = -work.factor[i * r + j];
    }
  };
  std::fill_n(along, (1 + groups) * r, 0.0);
  multiply_thin_upper<T, false>(item.x, item.previous, item.q, 0, sample, r, work.factor, along);
  settle(along, again, sample);
  parallel_for(groups, threads, [&](int64_t g, int) {
    const int64_t first = g == 0 ? sample : g * kGroupRows;
    multiply(item.x, item.previous, item.q, first, end_of(g) - first, r, work.factor, along + (1 + g) * r);
  });
  for (int64_t g = 1; g <= groups; ++g) {
    for (int64_t j = 0; j < r; ++j) along[j] += along[g * r + j];
  }
  settle(along, again, item.rows);
  write_r<T>(item, r, work.r, flip);
  return true;
}

}  // namespace lowrank::LOWRANK_ISA
