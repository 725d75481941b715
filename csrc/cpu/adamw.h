// The moment step of grouped_adamw_, one range of elements of one parameter at a time.
#pragma once

#include "cpu/gram.h"
#include "cpu/kernels.h"
#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

// One fused pass over n elements. HasX: out = shrink · x - step; else out = step, for a map to be applied to. HasM,
// HasV: whether there are moments. What there is not may be null; out may be x.
template <class T, bool HasX, bool HasM, bool HasV>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size_64, double scale_v_64, const T* x,
                                const T* LOWRANK_RESTRICT g, T* LOWRANK_RESTRICT m, T* LOWRANK_RESTRICT v, T* out,
                                int64_t n) {
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
    out[i] = HasX ? shrink * x[i] - step_size * direction : step_size * direction;
  }
}

template <class T, bool HasX = true>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size, double scale_v, const T* x, const T* g,
                                T* m, T* v, T* out, int64_t n) {
  if (m && v) {
    moment_step<T, HasX, true, true>(scalars, step_size, scale_v, x, g, m, v, out, n);
  } else if (m) {
    moment_step<T, HasX, true, false>(scalars, step_size, scale_v, x, g, m, v, out, n);
  } else if (v) {
    moment_step<T, HasX, false, true>(scalars, step_size, scale_v, x, g, m, v, out, n);
  } else {
    moment_step<T, HasX, false, false>(scalars, step_size, scale_v, x, g, m, v, out, n);
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
    moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(item.grad.data) + begin, m, v, x,
                end - begin);
    return;
  }
  constexpr int64_t kBlock = 1024;
  T x[kBlock], g[kBlock];
  with_storage(scalars.dtype, item.param.data, [&](auto* param) {
    auto* grad = static_cast<decltype(param)>(item.grad.data);
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = end - at < kBlock ? end - at : kBlock;
      for_each_run(param, item.param, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { widen_run(p, stride, length, x + i); });
      for_each_run(grad, item.grad, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { widen_run(p, stride, length, g + i); });
      moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(g), m ? m + (at - begin) : nullptr,
                  v ? v + (at - begin) : nullptr, x, n);
      for_each_run(param, item.param, item.columns, at, n,
                   [&](int64_t i, auto* p, int64_t stride, int64_t length) { narrow_run(x + i, length, p, stride); });
    }
  });
}

// x ← x rounded to its storage type and back: the factor as the next step will read it.
template <class T>
LOWRANK_INLINE void round_to_storage(DType dtype, T* x, int64_t n) {
  with_storage(dtype, x, [&](auto* tag) {
    using S = std::remove_pointer_t<decltype(tag)>;
    if constexpr (sizeof(S) < sizeof(T)) {
      for (int64_t i = 0; i < n; ++i) {
        S stored;
        narrow(x[i], &stored);
        x[i] = static_cast<T>(widen(stored));
      }
    }
  });
}

// With r × r maps: one panel of x.rows_of(p) rows of the factor seen as a tall (d, r) matrix, from row `first` on. The
// new factor is left in panel p of x, the old one in that of `old`; `scratch` is for the five other panels.
template <class T>
void adamw_mapped_panel(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t p,
                        const Panels<T>& new_x, const Panels<T>& old_x, T* scratch) {
  const bool tall = item.rank_dim == 1;
  const int64_t r = new_x.r, pitch = new_x.height(), area = pitch * r;
  const int64_t rows = new_x.rows_of(p), padded = new_x.padded_rows_of(p);
  const auto tall_view = [&](const View& view) {
    return tall ? view : View{view.data, view.column_stride, view.row_stride};
  };
  const auto moment_view = [&](void* data) { return tall_view(View{data, item.columns, 1}); };
  // x M for a tall factor; M x for its transpose, which in tall terms is x Mᵀ.
  const int64_t map_row_stride = tall ? r : 1, map_column_stride = tall ? 1 : r;
  const auto apply = [&](const void* map, const T* in, T* out) {
    multiply_panel(in, pitch, padded, r, static_cast<const T*>(map), map_row_stride, map_column_stride, r, out, pitch);
  };
  T *x = new_x.panel(p), *old = old_x.panel(p);
  T *g = scratch, *m = g + area, *v = m + area, *mapped = v + area, *dense = mapped + area;
  const DType state = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

  load_panel(scalars.dtype, tall_view(item.param), first, rows, r, old, pitch, dense);
  load_panel(scalars.dtype, tall_view(item.grad), first, rows, r, g, pitch, dense);
  if (item.grad_map) {
    apply(item.grad_map, g, mapped);
    std::swap(g, mapped);
  }
  if (item.param_map) {  // it is not ascended along: -T x, where the moment step turns the sign of g
    apply(item.param_map, old, mapped);
    const T sign = scalars.maximize ? T(-1) : T(1);
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < padded; ++k) g[j * pitch + k] += sign * mapped[j * pitch + k];
    }
  }
  if (item.m) {
    load_panel(state, moment_view(item.m), first, rows, r, m, pitch, dense);
    if (item.momentum_map) {
      apply(item.momentum_map, m, mapped);
      std::swap(m, mapped);
    }
  }
  if (item.v) load_panel(state, moment_view(item.v), first, rows, r, v, pitch, dense);
  for (int64_t j = 0; j < r; ++j) {
    const int64_t at = j * pitch;
    T *m_column = item.m ? m + at : nullptr, *v_column = item.v ? v + at : nullptr;
    if (item.direction_map) {
      moment_step<T, false>(scalars, item.step_size, item.scale_v, nullptr, g + at, m_column, v_column, x + at, padded);
    } else {
      moment_step(scalars, item.step_size, item.scale_v, static_cast<const T*>(old + at), g + at, m_column, v_column,
                  x + at, padded);
    }
  }
  if (item.direction_map) {
    apply(item.direction_map, x, mapped);
    const T shrink = static_cast<T>(1 - scalars.lr * scalars.weight_decay);
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < padded; ++k) x[j * pitch + k] = shrink * old[j * pitch + k] - mapped[j * pitch + k];
    }
  }
  if (scalars.dtype != state) round_to_storage(scalars.dtype, x, area);
  store_panel(scalars.dtype, tall_view(item.param), first, rows, r, x, pitch, dense);
  if (item.m) store_panel(state, moment_view(item.m), first, rows, r, m, pitch, dense);
  if (item.v) store_panel(state, moment_view(item.v), first, rows, r, v, pitch, dense);
}

// Rows [first, first + rows) with r × r maps. grams, if given: the new factor's Gram (upper triangle) and its
// cross-Gram with the old one, (2, r, r), are added to while both are in the cache.
template <class T>
void adamw_mapped_rows(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                       double* grams) {
  const int64_t r = item.rank_dim == 1 ? item.columns : item.rows, area = kBlockRows * r;
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t height = rows - begin < kBlockRows ? rows - begin : kBlockRows;
    const Panels<T> x{scratch, height, r, mapped_panel_rows(r)}, old{scratch + area, height, r, mapped_panel_rows(r)};
    for (int64_t p = 0; p < x.count(); ++p) {
      adamw_mapped_panel(scalars, item, first + begin + p * x.height(), p, x, old, scratch + 2 * area);
    }
    if (grams) {
      add_gram(scalars.wide_grams, x, x, true, grams, r);
      add_gram(scalars.wide_grams, x, old, false, grams + r * r, r);
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
