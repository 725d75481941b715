// Orthonormal polar factor of one tall matrix: X = QR, R = U diag(s) Vᵀ, the factor is Q (U Vᵀ).
#pragma once

#include "cpu/jacobi.h"
#include "cpu/qr.h"
#include "cpu/svd_product.h"

namespace lowrank::LOWRANK_ISA {

template <class T>
void polar(DType dtype, const PolarItem& item, int64_t r, const QrWork<T>& work, int threads) {
  const Panels<T> q{work.panels, item.rows, r};
  const int64_t pitch = small_pitch(r);
  load_panels(dtype, item.x, q, work, threads);
  if (!orthogonalize(q, work, threads)) {
    fill_nan<T>(dtype, item.out, item.rows, r);
    return;
  }
  normalize(work.r, r);
  // Row j of `columns` is column j of R, and of U after the SVD (completed, if R is deficient); so is row j of
  // `product` of U Vᵀ = Σ_l u_l v_lᵀ.
  double *columns = work.gram, *v = work.inverse, *product = work.r;
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = 0; i < pitch; ++i) columns[j * pitch + i] = i <= j ? work.r[i * pitch + j] : 0;
  }
  double s[kMaxRank];
  jacobi_svd(columns, v, s, r);
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = 0; i < pitch; ++i) product[j * pitch + i] = 0;
    for (int64_t l = 0; l < r; ++l) add_row(product + j * pitch, v[l * pitch + j], columns + l * pitch, 0, pitch);
  }
  expand(dtype, q, product, r, item.out, work, threads);
}

}  // namespace lowrank::LOWRANK_ISA
