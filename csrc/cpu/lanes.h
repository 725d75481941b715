// Small matrices side by side: a lane is a matrix, and each element a vector of lanes. So neither short rows nor square
// roots and divisions that wait for each other leave the vector units idle. What a lane gets depends on its matrix
// alone, to the bit.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/sizes.h"

namespace lowrank::LOWRANK_ISA {

// Element (i, j) of all matrices of a group is at (i * n + j) * kLanes<double>.
LOWRANK_INLINE double* lanes_at(double* matrices, int64_t n, int64_t i, int64_t j) {
  return matrices + (i * n + j) * kLanes<double>;
}

// body(j, std::integral_constant<int, J>) for j from `first` to `end`, four at a time, then one by one.
template <class Body>
LOWRANK_INLINE void by_fours(int64_t first, int64_t end, const Body& body) {
  for (; first + 4 <= end; first += 4) body(first, std::integral_constant<int, 4>());
  for (; first < end; ++first) body(first, std::integral_constant<int, 1>());
}

// inverse = U⁻¹, the upper triangle.
inline void invert_upper_lanes(double* u, int64_t n, const double* reciprocals, double* inverse) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  for (int64_t i = n - 1; i >= 0; --i) {
    const V reciprocal = load(reciprocals + i * W);
    store(lanes_at(inverse, n, i, i), reciprocal);
    // Column j needs U(i, k) for k up to j: what four columns share, then the rest of each.
    by_fours(i + 1, n, [&](int64_t j, auto count) {
      constexpr int J = decltype(count)::value;
      V sum[J] = {};
      for (int64_t k = i + 1; k <= j; ++k) {
        const V value = load(lanes_at(u, n, i, k));
        for (int c = 0; c < J; ++c) sum[c] += value * load(lanes_at(inverse, n, k, j + c));
      }
      for (int c = 1; c < J; ++c) {
        for (int64_t k = j + 1; k <= j + c; ++k) {
          sum[c] += load(lanes_at(u, n, i, k)) * load(lanes_at(inverse, n, k, j + c));
        }
      }
      for (int c = 0; c < J; ++c) store(lanes_at(inverse, n, i, j + c), V{} - reciprocal * sum[c]);
    });
  }
}

// What is known of the matrices of a group: scaled by 2^-exponent, their largest entries are at most 1.
struct LaneFacts {
  int exponents[kLanes<double>];
  bool finite[kLanes<double>];
};

// 2^exponent for -1022 ≤ exponent ≤ 1023.
LOWRANK_INLINE double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// x · 2^exponent, in two halves, as the power alone may be out of range where the product is not.
class PowerOfTwo {
 public:
  explicit PowerOfTwo(int exponent) : half(power_of_two(exponent / 2)), rest(power_of_two(exponent - exponent / 2)) {}
  double operator()(double x) const { return x * half * rest; }

  const double half, rest;
};

// The upper triangles of `count` matrices of T, (n, n) in `to`, scaled; the scale is taken from their entries, but from
// `least` at least. Zero takes the place of a matrix that is not finite, and of what is missing in the group.
template <class T>
LaneFacts load_lanes(const Stack& stack, int64_t first, int64_t count, int64_t n, double least, double* to) {
  constexpr int W = kLanes<double>;
  using V = Vec<double>;
  LaneFacts facts;
  for (int lane = 0; lane < W; ++lane) {
    const T* source = static_cast<const T*>(stack.data) + (first + lane) * stack.matrix_stride;
    for (int64_t i = 0; i < n; ++i) {
      double* const row = to + i * n * W + lane;
      for (int64_t j = 0; j < n; ++j) {
        row[j * W] = lane < count ? static_cast<double>(source[i * stack.row_stride + j * stack.column_stride]) : 0;
      }
    }
  }
  V sum{}, largest = splat(least);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const V value = load(to + (i * n + j) * W), size = absolute<double>(value);
      sum += value - value;  // NaN from the first infinity or NaN on
      if (j >= i) largest = select<double>(greater<double>(size, largest), size, largest);
    }
  }
  const auto finite = greater<double>(splat(0.5), sum);
  alignas(64) double half[W], rest[W];
  for (int lane = 0; lane < W; ++lane) {
    facts.finite[lane] = sum[lane] == 0;
    facts.exponents[lane] = 0;
    if (facts.finite[lane] && largest[lane] > 0) std::frexp(largest[lane], &facts.exponents[lane]);
    const PowerOfTwo scale(-facts.exponents[lane]);
    half[lane] = scale.half;
    rest[lane] = scale.rest;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      double* const at = to + (i * n + j) * W;
      store(at, select<double>(finite, load(at) * load(half) * load(rest), V{}));
    }
  }
  return facts;
}

// `count` (n, n) matrices into the lanes of `to`; an identity takes the place of what is missing in the group.
template <class S>
LOWRANK_INLINE void gather_lanes(const S* matrices, int64_t n, int64_t count, double* to) {
  constexpr int W = kLanes<double>;
  const int64_t area = n * n;
  int64_t e = 0;
  for (; e + W <= area; e += W) {  // of each matrix W elements, of W elements each matrix's
    Vec<double> v[W] = {};
    for (int lane = 0; lane < count; ++lane) v[lane] = load_as<double>(matrices + lane * area + e);
    perfect_shuffles<double, W, log2_of(W)>(v);
    for (int i = 0; i < W; ++i) store(to + (e + i) * W, v[i]);
  }
  for (; e < area; ++e) {
    for (int lane = 0; lane < W; ++lane) {
      to[e * W + lane] = lane < count ? static_cast<double>(matrices[lane * area + e]) : 0;
    }
  }
  for (int64_t lane = count; lane < W; ++lane) {
    for (int64_t i = 0; i < n; ++i) lanes_at(to, n, i, i)[lane] = 1;
  }
}

template <class T>
LOWRANK_INLINE void scatter_lanes(double* lanes, int64_t n, int64_t count, double weight, bool transposed, T* to) {
  constexpr int W = kLanes<double>;
  const auto from = [&](int64_t i, int64_t j) {
    return transposed ? lanes_at(lanes, n, j, i) : lanes_at(lanes, n, i, j);
  };
  for (int64_t i = 0; i < n; ++i) {
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      Vec<double> v[W];
      for (int c = 0; c < W; ++c) v[c] = splat(weight) * load(from(i, j + c));
      perfect_shuffles<double, W, log2_of(W)>(v);
      for (int lane = 0; lane < count; ++lane) store_as<double>(to + (lane * n + i) * n + j, v[lane]);
    }
    for (; j < n; ++j) {
      for (int lane = 0; lane < count; ++lane) {
        to[(lane * n + i) * n + j] = static_cast<T>(weight * from(i, j)[lane]);
      }
    }
  }
}

// An (n, n) matrix of double into one lane, and back.
LOWRANK_INLINE void set_lane(const View& from, int64_t n, int64_t lane, double* to) {
  const double* const data = static_cast<const double*>(from.data);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      lanes_at(to, n, i, j)[lane] = data[i * from.row_stride + j * from.column_stride];
    }
  }
}
LOWRANK_INLINE void get_lane(double* from, int64_t n, int64_t lane, const View& to) {
  double* const data = static_cast<double*>(to.data);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      data[i * to.row_stride + j * to.column_stride] = lanes_at(from, n, i, j)[lane];
    }
  }
}

}  // namespace lowrank::LOWRANK_ISA
