// Householder QR of a matrix in panels, in place: the guarded path. Q is orthonormal to rounding whatever X is, and a
// rank-deficient X gives a full Q, always the same one.
#pragma once

#include "cpu/gram.h"

namespace lowrank::LOWRANK_ISA {

// dots[c] = ⟨v, x_c⟩ and then x_c += factors[c] · v are taken for C columns at once, from panel `first` on.
template <class T, int C>
LOWRANK_INLINE void dot_columns(const Panels<T>& x, int64_t v, int64_t column, int64_t first, double* dots) {
  const int64_t pitch = x.height();
  for (int c = 0; c < C; ++c) dots[c] = 0;
  for (int64_t p = first; p < x.count(); ++p) {
    const T *reflector = x.panel(p) + v * pitch, *columns = x.panel(p) + column * pitch;
    Vec<T> sums[C] = {};
    for (int64_t k = 0; k < x.padded_rows_of(p); k += kLanes<T>) {
      const Vec<T> a = load(reflector + k);
      for (int c = 0; c < C; ++c) sums[c] += a * load(columns + c * pitch + k);
    }
    for (int c = 0; c < C; ++c) dots[c] += static_cast<double>(sum_lanes<T>(sums[c]));
  }
}

template <class T, int C>
LOWRANK_INLINE void reflect_columns(const Panels<T>& x, int64_t v, double tau, int64_t column, int64_t first) {
  const int64_t pitch = x.height();
  double dots[C];
  dot_columns<T, C>(x, v, column, first, dots);
  for (int64_t p = first; p < x.count(); ++p) {
    const T* reflector = x.panel(p) + v * pitch;
    T* columns = x.panel(p) + column * pitch;
    for (int64_t k = 0; k < x.padded_rows_of(p); k += kLanes<T>) {
      const Vec<T> a = load(reflector + k);
      for (int c = 0; c < C; ++c) {
        T* at = columns + c * pitch + k;
        store(at, load(at) - splat(static_cast<T>(tau * dots[c])) * a);
      }
    }
  }
}

// (I - tau v vᵀ) on all columns after v; v is zero before row v, so panels before that row's are skipped.
template <class T>
void reflect_following(const Panels<T>& x, int64_t v, double tau) {
  int64_t column = v + 1;
  for (; column + 4 <= x.r; column += 4) reflect_columns<T, 4>(x, v, tau, column, v / x.height());
  for (; column < x.r; ++column) reflect_columns<T, 1>(x, v, tau, column, v / x.height());
}

// X becomes Q; upper = R (diagonal of any sign). Columns must be scaled to entries of at most about 1, so that their
// squares neither overflow nor vanish.
template <class T>
void householder_qr(const Panels<T>& x, double* upper) {
  const int64_t r = x.r, height = x.height(), pitch = small_pitch(r);
  const auto element = [&](int64_t row, int64_t column) -> T& {
    return x.panel(row / height)[column * height + row % height];
  };
  constexpr double kUnit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  double taus[kMaxRank], negligible[kMaxRank];
  for (int64_t j = 0; j < r; ++j) {
    dot_columns<T, 1>(x, j, j, 0, &negligible[j]);
    negligible[j] *= kUnit * kUnit / 16;
  }
  for (int64_t i = 0; i < r * pitch; ++i) upper[i] = 0;
  for (int64_t j = 0; j < r; ++j) {
    // The finished part of the column goes to R, and zeros take its place: then v has full columns like the others.
    for (int64_t i = 0; i < j; ++i) {
      upper[i * pitch + j] = static_cast<double>(element(i, j));
      element(i, j) = 0;
    }
    const double head = static_cast<double>(element(j, j));
    element(j, j) = 0;
    double tail = 0;  // squares of what is below the diagonal
    dot_columns<T, 1>(x, j, j, j / height, &tail);
    // What is left of a dependent column is rounding noise, the noise of noise, and so on into underflow, where tau
    // would be wrong: below a quarter of the column's own rounding error it is dropped, and H = I.
    taus[j] = 0;
    upper[j * pitch + j] = head;
    if (tail > negligible[j]) {
      const double length = std::sqrt(head * head + tail);
      const double beta = head > 0 ? -length : length;
      // v as it is stored decides tau = 2 / vᵀv, so that H is orthogonal to the rounding of tau alone.
      element(j, j) = static_cast<T>(head - beta);
      const double stored = static_cast<double>(element(j, j));
      taus[j] = 2 / (stored * stored + tail);
      upper[j * pitch + j] = beta;
      reflect_following(x, j, taus[j]);
    }
  }
  // Q = H_0 … H_{r-1} [I; 0], from the back; column j is v_j until its turn comes.
  for (int64_t j = r - 1; j >= 0; --j) {
    if (taus[j] != 0) reflect_following(x, j, taus[j]);
    const T factor = static_cast<T>(-taus[j] * static_cast<double>(element(j, j)));
    for (int64_t p = j / height; p < x.count(); ++p) {
      T* column = x.panel(p) + j * height;
      for (int64_t k = 0; k < x.padded_rows_of(p); k += kLanes<T>) store(column + k, splat(factor) * load(column + k));
    }
    element(j, j) += T(1);
  }
}

}  // namespace lowrank::LOWRANK_ISA
