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

// Calls f(has_m, has_v): which moments there are.
template <class F>
LOWRANK_INLINE void with_moments(const void* m, const void* v, const F& f) {
  const auto with_m = [&](auto has_m) { v ? f(has_m, std::true_type()) : f(has_m, std::false_type()); };
  m ? with_m(std::true_type()) : with_m(std::false_type());
}

template <class T, bool HasX = true>
LOWRANK_INLINE void moment_step(const AdamWScalars& scalars, double step_size, double scale_v, const T* x, const T* g,
                                const T* aligned, T* m, T* v, T* out, int64_t n) {
  with_moments(m, v, [&](auto has_m, auto has_v) {
    moment_step<T, HasX, decltype(has_m)::value, decltype(has_v)::value, false>(
        scalars, step_size, scale_v, x, g, aligned, m, v, out, static_cast<T*>(nullptr), n);
  });
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
      T *m_block = m ? m + (at - begin) : nullptr, *v_block = v ? v + (at - begin) : nullptr;
      moment_step(scalars, item.step_size, item.scale_v, x, static_cast<const T*>(g), m_block, m_block, v_block, x, n);
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
  constexpr DType state = kDTypeOf<T>;

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
                            x + at, padded);
    } else {
      moment_step(scalars, item.step_size, item.scale_v, static_cast<const T*>(old + at), g + at, m_column, m_column,
                  v_column, x + at, padded);
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
    for (int64_t k = 0; k < rows; ++k) old[j * pitch + k] = x[j * pitch + k] - old[j * pitch + k];
    for (int64_t k = rows; k < padded; ++k) x[j * pitch + k] = old[j * pitch + k] = 0;  // with eps = 0 it was 0/0
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

// Whether a factor can be stepped where it is: its rows, or its whole vectors.
template <class T>
bool stays_in_place(const AdamWScalars& scalars, const AdamWItem& item) {
  const bool tall = item.rank_dim == 1;
  const auto dense = [&](const View& view) {
    return view.column_stride == 1 && (!tall || view.row_stride == item.columns);
  };
  return scalars.dtype == kDTypeOf<T> && dense(item.param) && dense(item.grad) && (!tall || item.columns % 4 == 0);
}

// The same for a factor that may stay where it is. `rows` are whole vectors of a wide one.
//
// Strips of a few rows go from maps to moments while they are in registers and the first-level cache, and the strip
// after the next is asked for meanwhile (the next one would come too late); the drift is added up over blocks of
// strips.
template <class T, bool kTall>
void adamw_mapped_in_place(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                           double* drift) {
  constexpr int64_t L = kLanes<T>, kStrip = kTall ? kMappedRows : 2 * L;
  static_assert(kStrip <= kStripRows, "scratch is laid out for strips of so many rows");
  const int64_t r = kTall ? item.columns : item.rows, block = kTall ? in_place_rows(r) : in_place_columns(r);
  const int64_t width = kTall ? r : 1, runs = kTall ? 1 : r;  // a strip of n rows is so many runs of n · width
  T *mapped_g = scratch, *mapped_m = mapped_g + kStrip * r, *other = mapped_m + kStrip * r, *moved = other + kStrip * r;
  T* const maps = moved + block * r;
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
  const int64_t known = item.height() - first;  // rows from here on
  const bool has_next = item.next && item.next->height() >= 2 * kStrip && stays_in_place<T>(scalars, *item.next);
  const AdamWItem* const then = has_next ? item.next : &item;
  const int64_t x_pitch = item.param.row_stride, g_pitch = item.grad.row_stride, m_pitch = item.columns;
  const auto from_row = [&](void* data, int64_t row) {
    return data ? static_cast<T*>(data) + (first + row) * width : nullptr;
  };

  // `count` rows from row `at` on; how they moved goes to moved_strip, whose runs are moved_pitch apart.
  const auto step_strip = [&](auto count, int64_t at, T* moved_strip, int64_t moved_pitch) {
    const int64_t n = count, length = n * width;
    T *x = from_row(item.param.data, at), *g = from_row(item.grad.data, at);
    T *m = from_row(item.m, at), *v = from_row(item.v, at);
    // What a later strip reads is asked for by the maps of g and of m of this one, or by the one that there is.
    constexpr int64_t kStripsAhead = 2;
    const bool own = at + n + kStripsAhead * kStrip <= known;
    const AdamWItem& wanted = own ? item : *then;
    const int64_t row = at + kStripsAhead * kStrip - (own ? 0 : known);
    const bool asks = own || (has_next && row >= 0), both = grad_map && m && momentum_map;
    const auto there = [&](void* data) { return static_cast<const T*>(data) + (own ? first + row : row) * width; };
    const Ahead<T> of_grad{{there(wanted.grad.data), there(wanted.param.data)},
                           {wanted.grad.row_stride, wanted.param.row_stride}};
    const T *const next_m = m ? there(wanted.m) : of_grad.data[0], *const next_v = v ? there(wanted.v) : next_m;
    const int64_t next_m_pitch = m ? wanted.columns : wanted.grad.row_stride;
    const Ahead<T> ahead[2] = {of_grad, {{next_m, next_v}, {next_m_pitch, v ? wanted.columns : next_m_pitch}}};
    const auto apply = [&](const T* map, const T* in, int64_t pitch, T* out, const Ahead<T>* of, int asked) {
      if constexpr (kTall) {
        map_rows(in, n, r, map, out, of, asked);
      } else {
        map_columns<T, decltype(count)::value / L>(in, pitch, r, map, out, n, of, asked);
      }
    };
    const T *gradient = g, *momentum = m;
    int64_t gradient_pitch = g_pitch, momentum_pitch = m_pitch;
    if (grad_map) {
      apply(grad_map, g, g_pitch, mapped_g, ahead, !asks ? 0 : both ? 1 : 2);
      gradient = mapped_g, gradient_pitch = n;
    }
    if (param_map) {  // it is not ascended along: -T x, where the moment step turns the sign of g
      apply(param_map, x, x_pitch, other, ahead, 0);
      for (int64_t k = 0; k < runs; ++k) {
        for (int64_t i = 0; i < length; ++i) {
          mapped_g[k * n + i] = gradient[k * gradient_pitch + i] + sign * other[k * n + i];
        }
      }
      gradient = mapped_g, gradient_pitch = n;
    }
    if (m && momentum_map) {
      apply(momentum_map, m, m_pitch, mapped_m, ahead + (both ? 1 : 0), !asks ? 0 : both ? 1 : 2);
      momentum = mapped_m, momentum_pitch = n;
    }
    const auto step_runs = [&](auto has_x, auto has_moved) {
      with_moments(m, v, [&](auto has_m, auto has_v) {
        constexpr bool kX = decltype(has_x)::value, kM = decltype(has_m)::value, kV = decltype(has_v)::value;
        for (int64_t k = 0; k < runs; ++k) {
          T* const x_run = x + k * x_pitch;
          moment_step<T, kX, kM, kV, decltype(has_moved)::value>(
              scalars, item.step_size, item.scale_v, x_run, gradient + k * gradient_pitch,
              kM ? momentum + k * momentum_pitch : nullptr, kM ? m + k * m_pitch : nullptr,
              kV ? v + k * m_pitch : nullptr, kX ? x_run : mapped_m + k * n, moved_strip + k * moved_pitch, length);
        }
      });
    };
    if (!direction_map) {
      drift ? step_runs(std::true_type(), std::true_type()) : step_runs(std::true_type(), std::false_type());
      return;
    }
    step_runs(std::false_type(), std::false_type());
    apply(direction_map, mapped_m, n, other, ahead, 0);
    for (int64_t k = 0; k < runs; ++k) {
      for (int64_t i = 0; i < length; ++i) {
        const T old = x[k * x_pitch + i], next_x = shrink * old - other[k * n + i];
        moved_strip[k * moved_pitch + i] = next_x - old;
        x[k * x_pitch + i] = next_x;
      }
    }
  };

  for (int64_t from = 0; from < rows; from += block) {
    const int64_t n = rows - from < block ? rows - from : block;
    int64_t at = 0;
    for (; at + kStrip <= n; at += kStrip) {
      step_strip(std::integral_constant<int64_t, kStrip>(), from + at, moved + at * width, block);
    }
    if (at < n) {
      if constexpr (kTall) {
        step_strip(n - at, from + at, moved + at * width, block);
      } else {
        step_strip(std::integral_constant<int64_t, L>(), from + at, moved + at, block);
      }
    }
    if (!drift) continue;
    const T* const x = from_row(item.param.data, from);
    if constexpr (kTall) {
      add_product_of_rows(x, static_cast<const T*>(moved), n, r, false, drift);
    } else {
      add_product_of_columns(x, x_pitch, static_cast<const T*>(moved), block, n, r, drift);
    }
  }
}

// Rows [first, first + rows) with r × r maps. Their share of the drift (r, r), if there is one, is added to while the
// rows are in the cache: products in T over some rows, the sums of those in double.
template <class T>
void adamw_mapped_rows(const AdamWScalars& scalars, const AdamWItem& item, int64_t first, int64_t rows, T* scratch,
                       double* drift) {
  const bool tall = item.rank_dim == 1;
  const int64_t in_place = !stays_in_place<T>(scalars, item) ? 0 : tall ? rows : rows / kLanes<T> * kLanes<T>;
  if (in_place > 0) {
    tall ? adamw_mapped_in_place<T, true>(scalars, item, first, in_place, scratch, drift)
         : adamw_mapped_in_place<T, false>(scalars, item, first, in_place, scratch, drift);
  }
  if (in_place < rows) adamw_mapped_in_panels(scalars, item, first + in_place, rows - in_place, scratch, drift);
}

}  // namespace lowrank::LOWRANK_ISA
