// The moment step of grouped_adamw_, one range of elements of one parameter at a time.
#pragma once

#include "cpu/gram.h"
#include "cpu/in_place.h"
#include "cpu/kernels.h"
#include "cpu/panel.h"

namespace lowrank::LOWRANK_ISA {

// One fused pass over n elements. HasX: out = shrink · x - step; else out = step, for a map to be applied to. HasM,
// HasV: whether there are moments; `aligned` is the momentum as it comes in. HasMoved: moved = out - x. What there is
// not may be null; out may be x, and m may be `aligned`.
template <class T, bool HasX, bool HasM, bool HasV, bool HasMoved>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size_64, double scale_v_64, const T* x,
                                const T* LOWRANK_RESTRICT g, const T* aligned, T* m, T* LOWRANK_RESTRICT v, T* out,
                                T* LOWRANK_RESTRICT moved, int64_t n) {
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
      direction = aligned[i] + weight1 * (grad - aligned[i]);
      m[i] = direction;
    }
    if (HasV) {
      const T second = beta2 * v[i] + weight2 * grad * grad;
      v[i] = second;
      direction = direction / (std::sqrt(second) * scale_v + eps);
    }
    const T next = HasX ? shrink * x[i] - step_size * direction : step_size * direction;
    if (HasMoved) moved[i] = next - x[i];
    out[i] = next;
  }
}

template <class T, bool HasX = true, bool HasMoved = false>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size, double scale_v, const T* x, const T* g,
                                const T* aligned, T* m, T* v, T* out, T* moved, int64_t n) {
  const auto run = [&](auto has_m, auto has_v) {
    moment_step<T, HasX, decltype(has_m)::value, decltype(has_v)::value, HasMoved>(scalars, step_size, scale_v, x, g,
                                                                                   aligned, m, v, out, moved, n);
  };
  const auto with_m = [&](auto has_m) { v ? run(has_m, std::true_type()) : run(has_m, std::false_type()); };
  m ? with_m(std::true_type()) : with_m(std::false_type());
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
    moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(item.grad.data) + begin, m, m, v, x,
                static_cast<T*>(nullptr), end - begin);
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
      T *m_block = m ? m + (at - begin) : nullptr, *v_block = v ? v + (at - begin) : nullptr;
      moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(g), m_block, m_block, v_block, x,
                  static_cast<T*>(nullptr), n);
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
// new factor is left in panel p of x, how far it moved in that of `moved`; `scratch` is for the five other panels.
template <class T>
void adamw_mapped_panel(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t p,
                        const Panels<T>& new_x, const Panels<T>& moved, T* scratch) {
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
  T *x = new_x.panel(p), *old = moved.panel(p);
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
      moment_step<T, false>(scalars, item.step_size, item.scale_v, nullptr, g + at, m_column, m_column, v_column,
                            x + at, nullptr, padded);
    } else {
      moment_step(scalars, item.step_size, item.scale_v, static_cast<const T*>(old + at), g + at, m_column, m_column,
                  v_column, x + at, static_cast<T*>(nullptr), padded);
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
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t k = 0; k < padded; ++k) old[j * pitch + k] = x[j * pitch + k] - old[j * pitch + k];
  }
  store_panel(scalars.dtype, tall_view(item.param), first, rows, r, x, pitch, dense);
  if (item.m) store_panel(state, moment_view(item.m), first, rows, r, m, pitch, dense);
  if (item.v) store_panel(state, moment_view(item.v), first, rows, r, v, pitch, dense);
}

// Rows [first, first + rows) of the factor seen as tall, in panels: any storage type, strides and rank.
template <class T>
void adamw_mapped_in_panels(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                            double* drift) {
  const int64_t r = item.rank_dim == 1 ? item.columns : item.rows, area = kBlockRows * r;
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t height = rows - begin < kBlockRows ? rows - begin : kBlockRows;
    const Panels<T> x{scratch, height, r, mapped_panel_rows(r)}, moved{scratch + area, height, r, mapped_panel_rows(r)};
    for (int64_t p = 0; p < x.count(); ++p) {
      adamw_mapped_panel(scalars, item, first + begin + p * x.height(), p, x, moved, scratch + 2 * area);
    }
    if (drift) add_product_of_panels(x, moved, drift, r);
  }
}

// The same for a factor that may stay where it is. `rows` are whole vectors of a wide one.
template <class T, bool kTall>
void adamw_mapped_in_place(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                           double* drift) {
  const int64_t r = kTall ? item.columns : item.rows, height = kTall ? in_place_rows(r) : in_place_columns(r);
  const int64_t area = height * r;
  T *mapped_g = scratch, *mapped_m = mapped_g + area, *other = mapped_m + area, *moved = other + area;
  T* const maps = moved + area;
  // As map_rows and map_columns want them.
  const auto prepare = [&](const void* map, T* out) -> const T* {
    const T* in = static_cast<const T*>(map);
    if (kTall || !map) return in;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) out[i * r + j] = in[j * r + i];
    }
    return out;
  };
  const T *grad_map = prepare(item.grad_map, maps), *momentum_map = prepare(item.momentum_map, maps + r * r);
  const T* param_map = prepare(item.param_map, maps + 2 * r * r);
  const T* direction_map = prepare(item.direction_map, maps + 3 * r * r);
  const T sign = scalars.maximize ? T(-1) : T(1), shrink = static_cast<T>(1 - scalars.lr * scalars.weight_decay);

  // Rows [from, from + n): `runs` runs of `length` elements, which are so far apart in x, in g, in the moments and in
  // scratch.
  const auto step_rows = [&](int64_t from, int64_t n) {
    const int64_t runs = kTall ? 1 : r, width = kTall ? r : 1, length = n * width, start = (first + from) * width;
    const int64_t x_pitch = item.param.row_stride, g_pitch = item.grad.row_stride, m_pitch = item.columns;
    T *x = static_cast<T*>(item.param.data) + start, *g = static_cast<T*>(item.grad.data) + start;
    T *m = item.m ? static_cast<T*>(item.m) + start : nullptr, *v = item.v ? static_cast<T*>(item.v) + start : nullptr;
    // The rows after these, while maps are applied. (Of wide factors nothing: it makes them slower.)
    const int64_t rest = rows - from - n, following = (rest < height ? rest : height) * width;
    const int64_t maps_here = (grad_map != nullptr) + (param_map != nullptr) + (m && momentum_map);
    Prefetcher ahead(following * static_cast<int64_t>(sizeof(T)), maps_here * n * r / kMappedRows);
    if (kTall && following > 0) {
      for (const T* data :
           {static_cast<const T*>(g), static_cast<const T*>(m), static_cast<const T*>(v), static_cast<const T*>(x)})
        ahead.add(data ? data + length : nullptr);
    }
    const auto apply = [&](const T* map, const T* in, int64_t pitch, T* out) {
      if constexpr (kTall) {
        map_rows(in, n, r, map, out, ahead);
      } else {
        map_columns(in, pitch, n, r, map, out, height);
      }
    };
    const T *gradient = g, *momentum = m;
    int64_t gradient_pitch = g_pitch, momentum_pitch = m_pitch;
    if (grad_map) apply(grad_map, g, g_pitch, mapped_g), gradient = mapped_g, gradient_pitch = height;
    if (param_map) {  // it is not ascended along: -T x, where the moment step turns the sign of g
      apply(param_map, x, x_pitch, other);
      for (int64_t k = 0; k < runs; ++k) {
        for (int64_t i = 0; i < length; ++i) {
          mapped_g[k * height + i] = gradient[k * gradient_pitch + i] + sign * other[k * height + i];
        }
      }
      gradient = mapped_g, gradient_pitch = height;
    }
    if (m && momentum_map) apply(momentum_map, m, m_pitch, mapped_m), momentum = mapped_m, momentum_pitch = height;
    const auto step_runs = [&](auto has_x, auto has_moved) {
      for (int64_t k = 0; k < runs; ++k) {
        T *m_run = m ? m + k * m_pitch : nullptr, *v_run = v ? v + k * m_pitch : nullptr, *x_run = x + k * x_pitch;
        const T *g_run = gradient + k * gradient_pitch, *aligned = m ? momentum + k * momentum_pitch : nullptr;
        T* const out = decltype(has_x)::value ? x_run : mapped_m + k * height;
        moment_step<T, decltype(has_x)::value, decltype(has_moved)::value>(scalars, item.step_size, item.scale_v, x_run,
                                                                           g_run, aligned, m_run, v_run, out,
                                                                           moved + k * height, length);
      }
    };
    if (!direction_map) {
      drift ? step_runs(std::true_type(), std::true_type()) : step_runs(std::true_type(), std::false_type());
    } else {
      step_runs(std::false_type(), std::false_type());
      apply(direction_map, mapped_m, height, other);
      for (int64_t k = 0; k < runs; ++k) {
        for (int64_t i = 0; i < length; ++i) {
          const T old = x[k * x_pitch + i], next_x = shrink * old - other[k * height + i];
          moved[k * height + i] = next_x - old;
          x[k * x_pitch + i] = next_x;
        }
      }
    }
    if (!drift) return;
    if constexpr (kTall) {
      add_product_of_rows(static_cast<const T*>(x), static_cast<const T*>(moved), n, r, false, drift);
    } else {
      add_product_of_columns(static_cast<const T*>(x), x_pitch, static_cast<const T*>(moved), height, n, r, drift);
    }
  };
  for (int64_t from = 0; from < rows; from += height) step_rows(from, rows - from < height ? rows - from : height);
}

// Rows [first, first + rows) with r × r maps. Their share of the drift (r, r), if there is one, is added to while the
// rows are in the cache: products in T over some rows, the sums of those in double.
template <class T>
void adamw_mapped_rows(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                       double* drift) {
  const bool tall = item.rank_dim == 1;
  const auto dense = [&](const View& view) {
    return view.column_stride == 1 && (!tall || view.row_stride == item.columns);
  };
  const bool own_type = scalars.dtype == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  int64_t in_place = 0;
  if (own_type && dense(item.param) && dense(item.grad)) {
    in_place = tall ? (item.columns % 4 == 0 ? rows : 0) : rows / kLanes<T> * kLanes<T>;
  }
  if (in_place > 0) {
    tall ? adamw_mapped_in_place<T, true>(scalars, item, first, in_place, scratch, drift)
         : adamw_mapped_in_place<T, false>(scalars, item, first, in_place, scratch, drift);
  }
  if (in_place < rows) adamw_mapped_in_panels(scalars, item, first + in_place, rows - in_place, scratch, drift);
}

}  // namespace lowrank::LOWRANK_ISA
