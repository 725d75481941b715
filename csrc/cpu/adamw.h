// The moment step of grouped_adamw_, one range of elements of one parameter at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

// One fused pass over n elements. HasM, HasV: whether there are moments. m and v may be null where there are none.
template <class T, bool HasM, bool HasV>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size_64, double scale_v_64,
                                T* LOWRANK_RESTRICT x, const T* LOWRANK_RESTRICT g, T* LOWRANK_RESTRICT m,
                                T* LOWRANK_RESTRICT v, int64_t n) {
  const T sign = scalars.maximize ? T(-1) : T(1);
  const T weight1 = static_cast<T>(1 - scalars.beta1);
  const T beta2 = static_cast<T>(scalars.beta2), weight2 = static_cast<T>(1 - scalars.beta2);
  const T eps = static_cast<T>(scalars.eps), shrink = static_cast<T>(1 - scalars.lr * scalars.weight_decay);
  const T step_size = static_cast<T>(step_size_64), scale_v = static_cast<T>(scale_v_64);
#if defined(__GNUC__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    const T grad = sign * g[i];
    T direction = grad;
    if (HasM) {
      direction = m[i] + weight1 * (grad - m[i]);
      m[i] = direction;
    }
    if (HasV) {
      const T second = beta2 * v[i] + weight2 * grad * grad;
      v[i] = second;
      direction = direction / (std::sqrt(second) * scale_v + eps);
    }
    x[i] = shrink * x[i] - step_size * direction;
  }
}

template <class T>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size, double scale_v, T* x, const T* g, T* m,
                                T* v, int64_t n) {
  if (m && v) {
    moment_step<T, true, true>(scalars, step_size, scale_v, x, g, m, v, n);
  } else if (m) {
    moment_step<T, true, false>(scalars, step_size, scale_v, x, g, m, v, n);
  } else if (v) {
    moment_step<T, false, true>(scalars, step_size, scale_v, x, g, m, v, n);
  } else {
    moment_step<T, false, false>(scalars, step_size, scale_v, x, g, m, v, n);
  }
}

// Calls f(offset into the block, pointer, stride, length) for the runs that elements [begin, begin + n) of a row-major
// numbering of `view` (with `columns` columns) consist of.
template <class S, class F>
LOWRANK_INLINE void for_each_run(S* data, const View& view, int64_t columns, int64_t begin, int64_t n, const F& f) {
  int64_t row = begin / columns, column = begin - row * columns;
  for (int64_t done = 0; done < n;) {
    const int64_t length = n - done < columns - column ? n - done : columns - column;
    f(done, data + row * view.row_stride + column * view.column_stride, view.column_stride, length);
    done += length;
    column = 0;
    ++row;
  }
}

template <class T>
void adamw_range(const AdamWScalars& scalars, const AdamWItem& item, int64_t begin, int64_t end) {
  T* m = item.m ? static_cast<T*>(item.m) + begin : nullptr;
  T* v = item.v ? static_cast<T*>(item.v) + begin : nullptr;
  const bool dense =
      (item.param.column_stride == 1 && item.grad.column_stride == 1) &&
      (item.rows == 1 || (item.param.row_stride == item.columns && item.grad.row_stride == item.columns));
  if (dense && (scalars.dtype == DType::kFloat32 || scalars.dtype == DType::kFloat64)) {
    T* x = static_cast<T*>(item.param.data) + begin;
    moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(item.grad.data) + begin, m, v,
                end - begin);
    return;
  }
  constexpr int64_t kBlock = 1024;
  T x[kBlock], g[kBlock];
  with_storage<T>(scalars.dtype, item.param.data, [&](auto* param) {
    auto* grad = static_cast<decltype(param)>(item.grad.data);
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = end - at < kBlock ? end - at : kBlock;
      for_each_run(param, item.param, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { widen_run(p, stride, length, x + i); });
      for_each_run(grad, item.grad, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { widen_run(p, stride, length, g + i); });
      moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(g), m ? m + (at - begin) : nullptr,
                  v ? v + (at - begin) : nullptr, n);
      for_each_run(param, item.param, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { narrow_run(x + i, length, p, stride); });
    }
  });
}

// With r × r maps: rows [first, first + rows) of the factor seen as a tall (d, r) matrix, one panel.
template <class T>
void adamw_mapped_panel(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch) {
  const bool tall = item.rank_dim == 1;
  const int64_t r = tall ? item.columns : item.rows;
  const auto tall_view = [&](const View& view) {
    return tall ? view : View{view.data, view.column_stride, view.row_stride};
  };
  const auto moment_view = [&](void* data) { return tall_view(View{data, item.columns, 1}); };
  // x M for a tall factor; M x for its transpose, which in tall terms is x Mᵀ.
  const int64_t map_row_stride = tall ? r : 1, map_column_stride = tall ? 1 : r;
  const int64_t pitch = padded_rows(rows), area = pitch * r;
  T *x = scratch, *g = x + area, *m = g + area, *v = m + area, *mapped = v + area, *dense = mapped + area;
  const DType state = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

  load_panel(scalars.dtype, tall_view(item.param), first, rows, r, x, pitch, dense);
  load_panel(scalars.dtype, tall_view(item.grad), first, rows, r, g, pitch, dense);
  if (item.grad_map) {
    multiply_panel(g, pitch, pitch, r, static_cast<const T*>(item.grad_map), map_row_stride, map_column_stride, r,
                   mapped, pitch);
    std::swap(g, mapped);
  }
  if (item.m) {
    load_panel(state, moment_view(item.m), first, rows, r, m, pitch, dense);
    if (item.momentum_map) {
      multiply_panel(m, pitch, pitch, r, static_cast<const T*>(item.momentum_map), map_row_stride, map_column_stride, r,
                     mapped, pitch);
      std::swap(m, mapped);
    }
  }
  if (item.v) load_panel(state, moment_view(item.v), first, rows, r, v, pitch, dense);
  moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(g), item.m ? m : nullptr,
              item.v ? v : nullptr, area);
  store_panel(scalars.dtype, tall_view(item.param), first, rows, r, x, pitch, dense);
  if (item.m) store_panel(state, moment_view(item.m), first, rows, r, m, pitch, dense);
  if (item.v) store_panel(state, moment_view(item.v), first, rows, r, v, pitch, dense);
}

}  // namespace lowrank::LOWRANK_ISA
