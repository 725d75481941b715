// Truncated SVD of left · rightᵀ for one pair of tall factors: two QRs, the SVD of the k × k core, two thin products.
#pragma once

#include "cpu/jacobi.h"
#include "cpu/qr.h"

namespace lowrank::LOWRANK_ISA {

// matrix ← matrix · 2^-e with its largest entry in [1/2, 1); returns e.
inline int normalize(double* matrix, int64_t n) {
  const int64_t pitch = small_pitch(n);
  double largest = 0;
  for (int64_t i = 0; i < n * pitch; ++i) largest = std::fabs(matrix[i]) > largest ? std::fabs(matrix[i]) : largest;
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  for (int64_t i = 0; i < n * pitch; ++i) matrix[i] = std::ldexp(matrix[i], -exponent);
  return exponent;
}

// out = Q · [the first `rank` rows of `small`, as columns].
template <class T>
void expand(DType dtype, const Panels<T>& q, const double* small, int64_t rank, const View& out, const QrWork<T>& work,
            int threads) {
  const int64_t k = q.r, pitch = small_pitch(k);
  for (int64_t i = 0; i < rank * pitch; ++i) work.factor[i] = static_cast<T>(small[i]);
  parallel_for(group_count(q.rows), threads, [&](int64_t g, int worker) {
    const Panels<T> rows = q.group(g);
    T* tile = work.tile + worker * work.tile_stride;
    for (int64_t p = 0; p < rows.count(); ++p) {
      multiply_panel(rows.panel(p), rows.height(), rows.padded_rows_of(p), k, work.factor, 1, pitch, rank, tile,
                     rows.height());
      store_panel(dtype, out, g * kGroupRows + p * rows.height(), rows.rows_of(p), rank, tile, rows.height(),
                  tile + rows.height() * k);
    }
  });
}

template <class T>
void svd_product(DType dtype, const SvdProductItem& item, int64_t k, int64_t rank, const QrWork<T>& left,
                 const QrWork<T>& right, int threads) {
  const Panels<T> q_left{left.panels, item.left_rows, k}, q_right{right.panels, item.right_rows, k};
  const int64_t pitch = small_pitch(k);
  T* out = static_cast<T*>(item.s);
  load_panels(dtype, item.left, q_left, left, threads);
  load_panels(dtype, item.right, q_right, right, threads);
  if (!orthogonalize(q_left, left, threads) || !orthogonalize(q_right, right, threads)) {
    fill_nan<T>(dtype, item.u, item.left_rows, rank);
    fill_nan<T>(dtype, item.v, item.right_rows, rank);
    for (int64_t j = 0; j < rank; ++j) out[j] = std::numeric_limits<T>::quiet_NaN();
    return;
  }
  const int exponent = normalize(left.r, k) + normalize(right.r, k);
  // Row j of `core` is column j of R_left R_rightᵀ = Σ_l R_right[j][l] · (column l of R_left), l ≥ j.
  double *core = left.gram, *v = left.inverse, *columns = right.gram;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < pitch; ++j) columns[i * pitch + j] = j < k ? left.r[j * pitch + i] : 0;
  }
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < pitch; ++i) core[j * pitch + i] = 0;
    for (int64_t l = j; l < k; ++l) add_row(core + j * pitch, right.r[j * pitch + l], columns + l * pitch, 0, pitch);
  }
  double s[kMaxRank];
  jacobi_svd(core, v, s, k);
  for (int64_t j = 0; j < rank; ++j) out[j] = static_cast<T>(std::ldexp(s[j], exponent));
  expand(dtype, q_left, core, rank, item.u, left, threads);
  expand(dtype, q_right, v, rank, item.v, right, threads);
}

}  // namespace lowrank::LOWRANK_ISA
