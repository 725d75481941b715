// QR of one tall matrix in panels: CholeskyQR with as many rounds as its conditioning asks for (mostly one), or
// Householder reflections where a Gram matrix cannot be trusted; and column signs that follow a previous Q.
#pragma once

#include "cpu/gram.h"
#include "cpu/householder.h"
#include "cpu/kernels.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/qr_thin.h"
#include "cpu/small.h"
#include "cpu/triangular.h"

namespace lowrank::LOWRANK_ISA {

// X ← X · diag(2^-exponents), exactly (in two halves, as 2^e alone may be out of range where the product is not).
template <class T>
void scale_columns(const Panels<T>& x, const int* exponents) {
  const int64_t pitch = x.height();
  for (int64_t p = 0; p < x.count(); ++p) {
    for (int64_t j = 0; j < x.r; ++j) {
      const int half = exponents[j] / 2;
      const Vec<T> first = splat(static_cast<T>(std::ldexp(1.0, -half)));
      const Vec<T> second = splat(static_cast<T>(std::ldexp(1.0, half - exponents[j])));
      T* column = x.panel(p) + j * pitch;
      for (int64_t k = 0; k < x.padded_rows_of(p); k += kLanes<T>) store(column + k, load(column + k) * first * second);
    }
  }
}

// exponents[j] = e with max|x_j| in [2^(e-1), 2^e), 0 for a zero column. False if an entry is NaN or infinite.
template <class T>
bool column_exponents(const Panels<T>& x, int* exponents) {
  // Without their sign, the bits of floating-point numbers are ordered as the numbers are, and those of infinity and
  // NaN come last: so one maximum over integers, which vectorizes, tells both.
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Bits infinity;
  std::memcpy(&infinity, &kInfinity, sizeof(T));
  for (int64_t j = 0; j < x.r; ++j) {
    Bits largest = 0;
    for (int64_t p = 0; p < x.count(); ++p) {
      const T* column = x.panel(p) + j * x.height();
      for (int64_t k = 0; k < x.rows_of(p); ++k) {
        Bits bits;
        std::memcpy(&bits, column + k, sizeof(T));
        bits &= ~Bits{0} >> 1;
        largest = bits > largest ? bits : largest;
      }
    }
    if (largest >= infinity) return false;
    T value;
    std::memcpy(&value, &largest, sizeof(T));
    exponents[j] = 0;
    if (largest > 0) std::frexp(value, &exponents[j]);
  }
  return true;
}

// work.gram = XᵀX (upper triangle), summed over groups in order.
template <class T>
void gram(const Panels<T>& x, const QrWork<T>& work, int threads) {
  const int64_t pitch = small_pitch(x.r), size = x.r * pitch, groups = group_count(x.rows);
  parallel_for(groups, threads, [&](int64_t g, int worker) {
    const Panels<T> rows = x.group(g);
    GramSums<T> sums(x.r, x.r, true, work.lanes + worker * gram_lanes(x.r, x.r));
    for (int64_t p = 0; p < rows.count(); ++p) {
      sums.add(rows.panel(p), rows.height(), rows.panel(p), rows.height(), rows.padded_rows_of(p));
    }
    double* partial = work.partial + g * size;
    std::memset(partial, 0, static_cast<size_t>(size) * sizeof(double));
    sums.add_to(partial, pitch);
  });
  for (int64_t i = 0; i < x.r; ++i) {
    for (int64_t j = 0; j < pitch; ++j) {
      double sum = 0;
      for (int64_t g = 0; g < groups && j >= i && j < x.r; ++g) sum += work.partial[g * size + i * pitch + j];
      work.gram[i * pitch + j] = sum;
    }
  }
}

// X becomes Q with orthonormal columns and work.r becomes R, upper triangular, with Q R = X. False, with the contents
// undefined, if X is not finite. `has_gram`: work.gram is XᵀX already. The rest of `work` is scratch.
template <class T>
bool orthogonalize(const Panels<T>& x, const QrWork<T>& work, int threads, bool has_gram = false) {
  // Up to here a second round corrects what the first one leaves to rounding; beyond, the Gram's own error is too
  // large.
  constexpr double kCorrectable = 0.005 / kUnit<T>;

  const int64_t r = x.r, pitch = small_pitch(r), groups = group_count(x.rows);
  double diagonal[kMaxRank];
  int exponents[kMaxRank] = {};
  if (!has_gram) gram(x, work, threads);
  bool scaled = !has_safe_squares<T>(work.gram, r);
  if (scaled) {
    if (!column_exponents(x, exponents)) return false;
    scale_columns(x, exponents);
    gram(x, work, threads);
  }
  for (int round = 0;; ++round) {
    for (int64_t j = 0; j < r; ++j) diagonal[j] = work.gram[j * pitch + j];
    double* upper = round == 0 ? work.r : work.gram;
    if (round == 0) std::memcpy(work.r, work.gram, static_cast<size_t>(r * pitch) * sizeof(double));
    double sensitive = std::numeric_limits<double>::infinity();
    if (cholesky_upper(upper, r, 16 * kUnit<T>)) sensitive = sensitivity(upper, diagonal, r, work.inverse);
    if (!(sensitive <= kCorrectable) || round == 3) {
      if (round == 0 && !scaled) {
        scaled = true;
        column_exponents(x, exponents);
        scale_columns(x, exponents);
      }
      householder_qr(x, upper);
      if (round > 0) multiply_upper(upper, r, work.r);
      break;
    }
    // U is well-conditioned (but for the scale of its rows) in the last round, mostly the only one: a product with its
    // inverse is then exact to rounding. Before, only substitution keeps Q U = X.
    const bool last = sensitive <= kAcceptedSensitivity;
    const double* const applied = last ? work.inverse : upper;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) work.factor[i * pitch + j] = static_cast<T>(applied[i * pitch + j]);
      work.reciprocals[i] = static_cast<T>(1 / upper[i * pitch + i]);
    }
    parallel_for(groups, threads, [&](int64_t g, int) {
      const Panels<T> rows = x.group(g);
      for (int64_t p = 0; p < rows.count(); ++p) {
        if (last) {
          multiply_upper_panel(rows.panel(p), rows.height(), rows.padded_rows_of(p), r, work.factor, pitch);
        } else {
          solve_panel(rows.panel(p), rows.height(), rows.padded_rows_of(p), r, work.factor, pitch, work.reciprocals);
        }
      }
    });
    if (round > 0) multiply_upper(upper, r, work.r);
    if (last) break;
    gram(x, work, threads);
  }
  if (scaled) {
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = i; j < r; ++j) work.r[i * pitch + j] = std::ldexp(work.r[i * pitch + j], exponents[j]);
    }
  }
  return true;
}

template <class T>
void load_panels(DType dtype, const View& view, const Panels<T>& x, const QrWork<T>& work, int threads) {
  parallel_for(group_count(x.rows), threads, [&](int64_t g, int worker) {
    const Panels<T> rows = x.group(g);
    for (int64_t p = 0; p < rows.count(); ++p) {
      load_panel(dtype, view, g * kGroupRows + p * rows.height(), rows.rows_of(p), x.r, rows.panel(p), rows.height(),
                 work.tile + worker * work.tile_stride);
    }
  });
}

// sums[j] = ⟨q_j, previous_j⟩ over one group of rows; `tile` holds one panel and its staging area.
template <class T>
void align_group(DType dtype, const View& previous, int64_t first, const Panels<T>& q, T* tile, double* sums) {
  constexpr int L = kLanes<T>;
  const int64_t pitch = q.height();
  Vec<T> lanes[(kMaxRank + L - 1) / L * L];
  for (int64_t j = 0; j < round_up(q.r, L); ++j) lanes[j] = Vec<T>{};
  for (int64_t p = 0; p < q.count(); ++p) {
    load_panel(dtype, previous, first + p * pitch, q.rows_of(p), q.r, tile, pitch, tile + pitch * q.r);
    for (int64_t j = 0; j < q.r; ++j) {
      Vec<T> even = lanes[j], odd = {};
      for (int64_t k = 0; k < q.padded_rows_of(p); k += 2 * L) {
        even += load(q.panel(p) + j * pitch + k) * load(tile + j * pitch + k);
        odd += load(q.panel(p) + j * pitch + k + L) * load(tile + j * pitch + k + L);
      }
      lanes[j] = even + odd;
    }
  }
  for (int64_t j = 0; j < q.r; j += L) {
    const Vec<T> totals = sum_lanes_of_each<T>(lanes + j);
    for (int64_t l = 0; l < L && j + l < q.r; ++l) sums[j + l] = static_cast<double>(totals[l]);
  }
}

template <class T>
void fill_nan(DType dtype, const View& view, int64_t rows, int64_t columns) {
  with_storage(dtype, view.data, [&](auto* data) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        narrow(std::numeric_limits<T>::quiet_NaN(), data + i * view.row_stride + j * view.column_stride);
      }
    }
  });
}

template <class T>
void qr(DType dtype, const QrItem& item, int64_t r, const QrWork<T>& work, int threads) {
  bool thin = false;
  if constexpr (sizeof(T) == 4) {
    thin = dtype == kDTypeOf<T> && is_thin_upper(item.x, item.previous, item.q, r);
    if (thin && thin_qr(dtype, item, r, work, threads)) return;
  }
  const Panels<T> x{work.panels, item.rows, r};
  const int64_t pitch = small_pitch(r), groups = group_count(item.rows);
  load_panels(dtype, item.x, x, work, threads);
  if (!orthogonalize(x, work, threads, thin)) {
    fill_nan<T>(dtype, item.q, item.rows, r);
    std::fill_n(static_cast<T*>(item.r), r * r, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  double* alignment = work.partial;  // (groups, r)
  if (item.previous.data) {
    parallel_for(groups, threads, [&](int64_t g, int worker) {
      align_group(dtype, item.previous, g * kGroupRows, x.group(g), work.tile + worker * work.tile_stride,
                  alignment + g * r);
    });
  }
  bool flip[kMaxRank], any = false;
  for (int64_t j = 0; j < r; ++j) {
    double sum = 0;
    for (int64_t g = 0; g < groups && item.previous.data; ++g) sum += alignment[g * r + j];
    flip[j] = sum == 0 ? work.r[j * pitch + j] < 0 : sum < 0;
    any |= flip[j];
  }
  parallel_for(groups, threads, [&](int64_t g, int worker) {
    const Panels<T> rows = x.group(g);
    for (int64_t p = 0; p < rows.count(); ++p) {
      T* panel = rows.panel(p);
      for (int64_t j = 0; j < r && any; ++j) {
        for (int64_t k = 0; k < rows.rows_of(p) && flip[j]; ++k)
          panel[j * rows.height() + k] = -panel[j * rows.height() + k];
      }
      store_panel(dtype, item.q, g * kGroupRows + p * rows.height(), rows.rows_of(p), r, panel, rows.height(),
                  work.tile + worker * work.tile_stride);
    }
  });
  write_r<T>(item, r, work.r, flip);
}

}  // namespace lowrank::LOWRANK_ISA
