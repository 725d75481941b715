// Included by kernels_*.cpp with LOWRANK_ISA and LOWRANK_VECTOR_BYTES defined.
#include "cpu/adamw.h"
#include "cpu/cholesky_lanes.h"
#include "cpu/damped_inverse.h"
#include "cpu/eigh.h"
#include "cpu/gram_rows.h"
#include "cpu/lora_linear.h"
#include "cpu/lorsum.h"
#include "cpu/panel.h"
#include "cpu/polar.h"
#include "cpu/preconditioner.h"
#include "cpu/qr.h"
#include "cpu/solve.h"
#include "cpu/svd_product.h"
#include "cpu/sylvester.h"

namespace lowrank::LOWRANK_ISA {

template <class T>
const Kernels<T>& table() {
  static constexpr Kernels<T> kernels = {
      adamw_range<T>,
      adamw_mapped_rows<T>,
      gram_rows<T>,
      solve<T>,
      solve_squares,
      qr<T>,
      svd_product<T>,
      polar<T>,
      eigh<T>,
      damped_inverse<T>,
      preconditioner<T>,
      sylvester,
      lorsum<T>,
      columns_from_rows<T>,
      rows_from_columns<T>,
      project_rows<T>,
      expand_rows<T>,
      sum_over_tokens<T>,
      kLanes<T>,
  };
  return kernels;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace lowrank::LOWRANK_ISA
