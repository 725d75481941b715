// Eigenvalues and eigenvectors of small symmetric matrices in double: Householder reflections to tridiagonal form, then
// implicit QL steps with Wilkinson's shift. A lane is a matrix. The matrices of a group go through the same steps, each
// with its own block of the tridiagonal matrix; what is not in a matrix's block stays as it is to the bit.
#pragma once

#include "cpu/lanes.h"

namespace lowrank::LOWRANK_ISA {

// Of a group of matrices of n rows, element by element, each a vector of lanes.
struct EighLanes {
  using V = Vec<double>;
  static constexpr int kWidth = kLanes<double>;
  int64_t n;
  double* matrix;    // (n, n): the upper triangle, then reflectors, then eigenvectors as rows
  double* diagonal;  // n
  double* off;       // n; the last one is no element, and scratch
  double* cosines;   // n
  double* sines;     // n

  EighLanes(int64_t size, double* scratch) : n(size), matrix(scratch) {
    diagonal = matrix + n * n * kWidth;
    off = diagonal + n * kWidth;
    cosines = off + n * kWidth;
    sines = cosines + n * kWidth;
  }
  double* at(int64_t i, int64_t j) const { return matrix + (i * n + j) * kWidth; }
  V d(int64_t i) const { return load(diagonal + i * kWidth); }
  V e(int64_t i) const { return load(off + i * kWidth); }
  void set_d(int64_t i, const V& v) const { store(diagonal + i * kWidth, v); }
  void set_e(int64_t i, const V& v) const { store(off + i * kWidth, v); }
};

// A becomes tridiagonal, (d, e), by H = I - u uᵀ for each column but the last two; u stays in its row of the matrix.
inline void tridiagonalize(const EighLanes& x) {
  constexpr int W = EighLanes::kWidth;
  using V = EighLanes::V;
  const int64_t n = x.n;
  double* const w = x.cosines;
  for (int64_t k = 0; k + 2 < n; ++k) {
    double* const u = x.at(k, 0);  // from k + 1 on
    x.set_d(k, load(u + k * W));
    V square{};
    for (int64_t i = k + 1; i < n; ++i) square += load(u + i * W) * load(u + i * W);
    const V head = load(u + (k + 1) * W), norm = square_root<double>(square);
    // A column whose squares vanish beside entries of 1 is zero, to far more digits than there are.
    const auto some = greater<double>(square, splat(1e-290));
    const V opposite = select<double>(greater<double>(V{}, head), norm, V{} - norm);
    const V twice = square + absolute<double>(head) * norm;  // half of ‖u‖² before it is scaled to 2
    const V scale = select<double>(some, splat(1.0) / square_root<double>(twice), V{});
    x.set_e(k, select<double>(some, opposite, head));
    store(u + (k + 1) * W, head - opposite);
    for (int64_t i = k + 1; i < n; ++i) store(u + i * W, load(u + i * W) * scale);
    // w = A u - (uᵀA u / 2) u; A ← H A H = A - u wᵀ - w uᵀ
    for (int64_t i = k + 1; i < n; ++i) store(w + i * W, V{});
    V overlap{};
    for (int64_t i = k + 1; i < n; ++i) {
      const double* row = x.at(i, 0);
      const V ui = load(u + i * W);
      V sum = load(row + i * W) * ui;
      for (int64_t j = i + 1; j < n; ++j) {
        const V a = load(row + j * W);
        sum += a * load(u + j * W);
        store(w + j * W, load(w + j * W) + a * ui);
      }
      store(w + i * W, load(w + i * W) + sum);
    }
    for (int64_t i = k + 1; i < n; ++i) overlap += load(u + i * W) * load(w + i * W);
    overlap *= splat(0.5);
    for (int64_t i = k + 1; i < n; ++i) store(w + i * W, load(w + i * W) - overlap * load(u + i * W));
    for (int64_t i = k + 1; i < n; ++i) {
      double* row = x.at(i, 0);
      const V ui = load(u + i * W), wi = load(w + i * W);
      for (int64_t j = i; j < n; ++j) {
        store(row + j * W, load(row + j * W) - ui * load(w + j * W) - wi * load(u + j * W));
      }
    }
  }
  for (int64_t k = n < 2 ? 0 : n - 2; k < n; ++k) {
    x.set_d(k, load(x.at(k, k)));
    x.set_e(k, k + 1 < n ? load(x.at(k, k + 1)) : V{});
  }
}

// The reflectors become Qᵀ, Q = H_0 H_1 …, A = Q T Qᵀ: from the last on, H_k is applied to the block after it.
inline void form_vectors(const EighLanes& x) {
  constexpr int W = EighLanes::kWidth;
  using V = EighLanes::V;
  const int64_t n = x.n;
  const V one = splat(1.0);
  for (int64_t k = n - 1; k >= 0; --k) {
    // Row k holds u from k + 1 on (nothing in the last two); rows and columns from k + 1 on hold a block of Qᵀ.
    double* const u = x.at(k, 0);
    for (int64_t i = k + 1; i < n; ++i) {
      store(x.at(i, k), V{});
      if (k + 2 >= n) continue;
      double* row = x.at(i, 0);
      V even{}, odd{};
      int64_t j = k + 1;
      for (; j + 2 <= n; j += 2) {
        even += load(row + j * W) * load(u + j * W);
        odd += load(row + (j + 1) * W) * load(u + (j + 1) * W);
      }
      if (j < n) even += load(row + j * W) * load(u + j * W);
      const V dot = even + odd;
      for (j = k + 1; j < n; ++j) store(row + j * W, load(row + j * W) - dot * load(u + j * W));
    }
    for (int64_t j = k + 1; j < n; ++j) store(u + j * W, V{});
    store(u + k * W, one);
  }
}

// Rows of the matrix from `last` down to `first` are rotated, each with the one after it, C elements at a time.
template <int C>
LOWRANK_INLINE void rotate_columns(const EighLanes& x, int64_t first, int64_t last, int64_t column) {
  constexpr int W = EighLanes::kWidth;
  using V = EighLanes::V;
  V carried[C];
  for (int c = 0; c < C; ++c) carried[c] = load(x.at(last, column + c));
  for (int64_t i = last - 1; i >= first; --i) {
    const V cosine = load(x.cosines + i * W), sine = load(x.sines + i * W);
    LOWRANK_UNROLL
    for (int c = 0; c < C; ++c) {
      const V z = load(x.at(i, column + c));
      store(x.at(i + 1, column + c), sine * z + cosine * carried[c]);
      carried[c] = cosine * z - sine * carried[c];
    }
  }
  for (int c = 0; c < C; ++c) store(x.at(first, column + c), carried[c]);
}

// T becomes diagonal, and the rows of the matrix, if asked for, eigenvectors. False for lanes that did not converge.
inline void diagonalize(const EighLanes& x, bool vectors, bool* converged) {
  constexpr int W = EighLanes::kWidth;
  using V = EighLanes::V;
  const int64_t n = x.n;
  V size{};
  for (int64_t i = 0; i < n; ++i) {
    const V here = absolute<double>(x.d(i)) + absolute<double>(x.e(i));
    size = select<double>(greater<double>(here, size), here, size);
  }
  const V negligible = splat(0x1p-53) * size, one = splat(1.0);
  for (int64_t step = 0, start = 0;; ++step) {
    // The first block of each matrix that is not diagonal: rows begin … end, with end > begin; 0 and 0 if there is
    // none. Of it, what the shift is made of.
    V begin = splat(-1.0), end{}, top{}, next{}, coupling = one, bottom{};
    auto open = greater<double>(V{}, begin);
    for (int64_t i = start; i + 1 < n; ++i) {
      const V value = x.e(i), here = x.d(i), below = x.d(i + 1);
      const auto coupled = greater<double>(absolute<double>(value), negligible);
      x.set_e(i, select<double>(coupled, value, V{}));
      const auto inside = open & coupled, first = inside & greater<double>(V{}, begin);
      begin = select<double>(first, splat(static_cast<double>(i)), begin);
      top = select<double>(first, here, top);
      next = select<double>(first, below, next);
      coupling = select<double>(first, value, coupling);
      end = select<double>(inside, splat(static_cast<double>(i + 1)), end);
      bottom = select<double>(inside, below, bottom);
      open = open & (coupled | greater<double>(V{}, begin));
    }
    alignas(64) double from[W], to[W];
    store(from, begin);
    store(to, end);
    int64_t first = n, last = 0;
    for (int lane = 0; lane < W; ++lane) {
      converged[lane] = to[lane] == 0;
      if (converged[lane]) continue;
      first = static_cast<int64_t>(from[lane]) < first ? static_cast<int64_t>(from[lane]) : first;
      last = static_cast<int64_t>(to[lane]) > last ? static_cast<int64_t>(to[lane]) : last;
    }
    if (last == 0 || step == 30 * n) return;
    start = first;
    const V theta = (next - top) / (coupling + coupling);
    const V root = square_root<double>(theta * theta + one);
    V g = bottom - top + coupling / (theta + select<double>(greater<double>(V{}, theta), V{} - root, root));
    V cosine = one, sine = one, p{};
    for (int64_t i = last - 1; i >= first; --i) {
      const V index = splat(static_cast<double>(i));
      const auto active = greater<double>(end, index) & greater<double>(index + splat(0.5), begin);
      const auto at_begin = active & greater<double>(begin + splat(0.5), index);
      const V value = x.e(i), here = x.d(i), f = sine * value, b = cosine * value;
      const V square = f * f + g * g;
      // Where both vanish the rest of the block has become independent: it is left alone.
      const auto some = greater<double>(square, splat(1e-300));
      const V r = square_root<double>(square), reciprocal = one / select<double>(some, r, one);
      const V s = select<double>(some, f * reciprocal, V{}), c = select<double>(some, g * reciprocal, one);
      const V shifted = x.d(i + 1) - p;
      const V change = (here - shifted) * s + splat(2.0) * c * b;
      const V moved = s * change;
      // The last coupling of the block is to what follows it: none.
      const V new_e = select<double>(greater<double>(end, index + splat(1.5)), r, V{});
      x.set_e(i + 1, select<double>(active, new_e, x.e(i + 1)));
      x.set_d(i + 1, select<double>(active, shifted + moved, x.d(i + 1)));
      p = select<double>(active, moved, p);
      g = select<double>(active, c * change - b, g);
      cosine = select<double>(active, c, cosine);
      sine = select<double>(active, s, sine);
      x.set_d(i, select<double>(at_begin, here - p, here));
      x.set_e(i, select<double>(at_begin, g, value));
      store(x.cosines + i * W, select<double>(active, c, one));
      store(x.sines + i * W, select<double>(active, s, V{}));
    }
    if (!vectors) continue;
    constexpr int C = kManyRegisters ? 8 : 4;
    int64_t column = 0;
    for (; column + C <= n; column += C) rotate_columns<C>(x, first, last, column);
    for (; column < n; ++column) rotate_columns<1>(x, first, last, column);
  }
}

// Sorted and scaled back; NaN where a matrix is not finite or did not converge.
template <class T>
void store_eigen(const EighLanes& x, const LaneFacts& facts, const bool* converged, int64_t count, T* values,
                 T* vectors) {
  constexpr int W = EighLanes::kWidth;
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  const int64_t n = x.n;
  int64_t order[kMaxRank];
  for (int64_t lane = 0; lane < count; ++lane) {
    const double* found = x.diagonal + lane;
    for (int64_t i = 0; i < n; ++i) {
      int64_t j = i;
      for (; j > 0 && found[order[j - 1] * W] > found[i * W]; --j) order[j] = order[j - 1];
      order[j] = i;
    }
    const bool good = facts.finite[lane] && converged[lane];
    const PowerOfTwo scaled(facts.exponents[lane]);
    for (int64_t j = 0; j < n; ++j) {
      values[lane * n + j] = good ? static_cast<T>(scaled(found[order[j] * W])) : kNaN;
    }
    for (int64_t j = 0; j < n && vectors; ++j) {
      const double* row = x.at(order[j], 0) + lane;
      T* to = vectors + lane * n * n + j;
      for (int64_t i = 0; i < n; ++i) to[i * n] = good ? static_cast<T>(row[i * W]) : kNaN;
    }
  }
}

// Matrices [first, first + count) of a stack, of which the lower triangles are read, become eigenvalues, and vectors if
// these are asked for; neither sorted nor scaled back.
template <class T>
LaneFacts decompose(const Stack& xs, int64_t first, int64_t count, bool vectors, const EighLanes& x, bool* converged) {
  const Stack transposed{xs.data, xs.matrix_stride, xs.column_stride, xs.row_stride};
  const LaneFacts facts = load_lanes<T>(transposed, first, count, x.n, 0, x.matrix);
  tridiagonalize(x);
  if (vectors) form_vectors(x);
  diagonalize(x, vectors, converged);
  return facts;
}

template <class T>
void eigh(const Stack& xs, void* values, void* vectors, int64_t first, int64_t count, int64_t r, double* scratch) {
  constexpr int W = EighLanes::kWidth;
  const EighLanes x(r, scratch);
  for (; count > 0; first += W, count -= W) {
    const int64_t here = count < W ? count : W;
    bool converged[W];
    const LaneFacts facts = decompose<T>(xs, first, here, vectors != nullptr, x, converged);
    store_eigen(x, facts, converged, here, static_cast<T*>(values) + first * r,
                vectors ? static_cast<T*>(vectors) + first * r * r : nullptr);
  }
}

}  // namespace lowrank::LOWRANK_ISA
