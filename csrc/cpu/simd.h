// Vectors of floating-point numbers through the compiler's vector extension. Included once per instruction set (see
// kernels.h), with LOWRANK_ISA the namespace and LOWRANK_VECTOR_BYTES the width of a register.
#pragma once

#include "cpu/common.h"

#if defined(__GNUC__) && defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lowrank::LOWRANK_ISA {

#if defined(__GNUC__)
template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Vector __attribute__((vector_size(LOWRANK_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(LOWRANK_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorTypes<double> {
  typedef double Vector __attribute__((vector_size(LOWRANK_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(LOWRANK_VECTOR_BYTES), aligned(8), may_alias));
};
template <class T>
using Vec = typename VectorTypes<T>::Vector;

template <class T>
LOWRANK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}
template <class T>
LOWRANK_INLINE void store(T* p, const Vec<T>& v) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = v;
}
template <class T>
LOWRANK_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0 keeps the sign of a zero
}
#else
// Compilers without the extension get an array and loops, and vectorize what they can.
template <class T>
struct Vec {
  T lane[LOWRANK_VECTOR_BYTES / sizeof(T)] = {};
  T operator[](int i) const { return lane[i]; }
  T& operator[](int i) { return lane[i]; }
#define LOWRANK_OPERATOR(op)                                                                  \
  friend Vec operator op(Vec a, const Vec& b) {                                               \
    for (size_t i = 0; i < LOWRANK_VECTOR_BYTES / sizeof(T); ++i) a.lane[i] op## = b.lane[i]; \
    return a;                                                                                 \
  }                                                                                           \
  Vec& operator op## = (const Vec& b) { return *this = *this op b; }
  LOWRANK_OPERATOR(+)
  LOWRANK_OPERATOR(-)
  LOWRANK_OPERATOR(*)
  LOWRANK_OPERATOR(/)
#undef LOWRANK_OPERATOR
};
template <class T>
LOWRANK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(v.lane, p, sizeof(v.lane));
  return v;
}
template <class T>
LOWRANK_INLINE void store(T* p, const Vec<T>& v) {
  std::memcpy(p, v.lane, sizeof(v.lane));
}
template <class T>
LOWRANK_INLINE Vec<T> splat(T value) {
  Vec<T> v;
  for (T& x : v.lane) x = value;
  return v;
}
#endif

template <class T>
constexpr int kLanes = static_cast<int>(LOWRANK_VECTOR_BYTES / sizeof(T));

// Lane by lane: comparisons, and what depends on them.
#if defined(__GNUC__)
template <class T>
using Mask = decltype(Vec<T>{} > Vec<T>{});
template <class T>
LOWRANK_INLINE Mask<T> greater(const Vec<T>& a, const Vec<T>& b) {
  return a > b;
}
template <class T>
LOWRANK_INLINE Vec<T> select(const Mask<T>& mask, const Vec<T>& yes, const Vec<T>& no) {
  return mask ? yes : no;
}
#else
template <class T>
struct Mask {
  bool lane[LOWRANK_VECTOR_BYTES / sizeof(T)] = {};
  friend Mask operator&(Mask a, const Mask& b) {
    for (size_t i = 0; i < LOWRANK_VECTOR_BYTES / sizeof(T); ++i) a.lane[i] = a.lane[i] && b.lane[i];
    return a;
  }
  friend Mask operator|(Mask a, const Mask& b) {
    for (size_t i = 0; i < LOWRANK_VECTOR_BYTES / sizeof(T); ++i) a.lane[i] = a.lane[i] || b.lane[i];
    return a;
  }
};
template <class T>
LOWRANK_INLINE Mask<T> greater(const Vec<T>& a, const Vec<T>& b) {
  Mask<T> mask;
  for (int i = 0; i < kLanes<T>; ++i) mask.lane[i] = a[i] > b[i];
  return mask;
}
template <class T>
LOWRANK_INLINE Vec<T> select(const Mask<T>& mask, Vec<T> yes, const Vec<T>& no) {
  for (int i = 0; i < kLanes<T>; ++i) yes[i] = mask.lane[i] ? yes[i] : no[i];
  return yes;
}
#endif
template <class T>
LOWRANK_INLINE Vec<T> absolute(const Vec<T>& v) {
  return select<T>(greater<T>(Vec<T>{}, v), Vec<T>{} - v, v);
}
template <class T>
LOWRANK_INLINE Vec<T> square_root(const Vec<T>& v) {
  Vec<T> out;
  for (int i = 0; i < kLanes<T>; ++i) out[i] = std::sqrt(v[i]);
  return out;
}

// kLanes<A> elements of type T at p, as a vector of A: T itself, or float widened to double.
template <class A, class T>
LOWRANK_INLINE Vec<A> load_as(const T* p) {
  if constexpr (sizeof(A) == sizeof(T)) {
    return load(p);
  } else {
#if defined(__GNUC__)
// GCC converts each half of a vector by itself (six instructions) where the processor has one for all.
#if defined(__SSE2__) && LOWRANK_VECTOR_BYTES == 64
    return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));  // without a mask GCC warns of its own header
#elif defined(__SSE2__) && LOWRANK_VECTOR_BYTES == 32
    return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    typedef T Narrow __attribute__((vector_size(kLanes<A> * sizeof(T)), aligned(alignof(T)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vec<A>);
#endif
#else
    Vec<A> v;
    for (int i = 0; i < kLanes<A>; ++i) v[i] = static_cast<A>(p[i]);
    return v;
#endif
  }
}

// A vector of A as kLanes<A> elements of type T at p.
template <class A, class T>
LOWRANK_INLINE void store_as(T* p, const Vec<A>& v) {
  if constexpr (sizeof(A) == sizeof(T)) {
    store(p, v);
  } else {
#if defined(__GNUC__)
    typedef T Narrow __attribute__((vector_size(kLanes<A> * sizeof(T)), aligned(alignof(T)), may_alias));
    *reinterpret_cast<Narrow*>(p) = __builtin_convertvector(v, Narrow);
#else
    for (int i = 0; i < kLanes<A>; ++i) p[i] = static_cast<T>(v[i]);
#endif
  }
}

// A vector of float, or a row of them, past the caches, which need not read the lines that it fills; `to` is aligned
// like the vector. Other threads see it after stream_fence().
template <class V>
LOWRANK_INLINE void stream(float* to, const V& value) {
#if defined(__GNUC__) && defined(__SSE2__)
  constexpr int kBytes = sizeof(V) < LOWRANK_VECTOR_BYTES ? sizeof(V) : LOWRANK_VECTOR_BYTES;
  typedef float Piece __attribute__((vector_size(kBytes)));
  Piece pieces[sizeof(V) / kBytes];
  std::memcpy(&pieces, &value, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / kBytes; ++i) {
#if defined(__clang__)
    __builtin_nontemporal_store(pieces[i], reinterpret_cast<Piece*>(to) + i);
#else
    float* const at = to + i * (kBytes / sizeof(float));
#if LOWRANK_VECTOR_BYTES >= 64
    if constexpr (kBytes == 64) __builtin_ia32_movntps512(at, pieces[i]);
#endif
#if LOWRANK_VECTOR_BYTES >= 32
    if constexpr (kBytes == 32) __builtin_ia32_movntps256(at, pieces[i]);
#endif
    if constexpr (kBytes == 16) __builtin_ia32_movntps(at, pieces[i]);
#endif
  }
#else
  std::memcpy(to, &value, sizeof(V));
#endif
}
LOWRANK_INLINE void stream_fence() {
#if defined(__GNUC__) && defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// Wide registers come 32 at a time, narrow ones 16: blocks of accumulators are sized by this.
constexpr bool kManyRegisters = LOWRANK_VECTOR_BYTES == 64;

#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LOWRANK_HAS_SHUFFLE 1
#endif
#endif

#if defined(LOWRANK_HAS_SHUFFLE)
template <class T, int Offset, int... I>
LOWRANK_INLINE Vec<T> interleave_from(const Vec<T>& a, const Vec<T>& b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (Offset + I / 2 + (I % 2) * kLanes<T>)...);
}
#else
template <class T, int Offset, int... I>
LOWRANK_INLINE Vec<T> interleave_from(const Vec<T>& a, const Vec<T>& b, std::integer_sequence<int, I...>) {
  Vec<T> out{};
  ((out[I] = (I % 2) ? b[Offset + I / 2] : a[Offset + I / 2]), ...);
  return out;
}
#endif

// a0 b0 a1 b1 … of the lower and of the upper halves.
template <class T>
LOWRANK_INLINE Vec<T> interleave_low(const Vec<T>& a, const Vec<T>& b) {
  return interleave_from<T, 0>(a, b, std::make_integer_sequence<int, kLanes<T>>());
}
template <class T>
LOWRANK_INLINE Vec<T> interleave_high(const Vec<T>& a, const Vec<T>& b) {
  return interleave_from<T, kLanes<T> / 2>(a, b, std::make_integer_sequence<int, kLanes<T>>());
}

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// One perfect shuffle of the Count · kLanes elements of v: their address bits rotate left by one. `Rounds` of them turn
// an m × n matrix stored in v into its transpose when n = 2^Rounds.
template <class T, int Count, int Rounds>
LOWRANK_INLINE void perfect_shuffles(Vec<T>* v) {
  if constexpr (Rounds > 0 && Count > 1) {
    Vec<T> out[Count];
    for (int i = 0; i < Count / 2; ++i) {
      out[2 * i] = interleave_low<T>(v[i], v[i + Count / 2]);
      out[2 * i + 1] = interleave_high<T>(v[i], v[i + Count / 2]);
    }
    for (int i = 0; i < Count; ++i) v[i] = out[i];
    perfect_shuffles<T, Count, Rounds - 1>(v);
  }
}

// Of every Group lanes of a and of b the sums of both halves, a's before b's: no lane leaves its half of the group.
template <class T, int Group, int... L>
LOWRANK_INLINE Vec<T> add_halves(const Vec<T>& a, const Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int kHalf = Group / 2;
#if defined(LOWRANK_HAS_SHUFFLE)
  return __builtin_shufflevector(a, b, (L / kHalf % 2 ? kLanes<T> + L - kHalf : L)...) +
         __builtin_shufflevector(a, b, (L / kHalf % 2 ? kLanes<T> + L : L + kHalf)...);
#else
  Vec<T> out{};
  ((out[L] = L / kHalf % 2 ? b[L - kHalf] + b[L] : a[L] + a[L + kHalf]), ...);
  return out;
#endif
}

// Lane i of the result is the sum over the lanes of v[i], i = 0 … kLanes-1.
template <class T, int Count = kLanes<T>>
LOWRANK_INLINE Vec<T> sum_lanes_of_each(Vec<T>* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    LOWRANK_UNROLL
    for (int i = 0; i < Count / 2; ++i) {
      v[i] = add_halves<T, Count>(v[i], v[i + Count / 2], std::make_integer_sequence<int, kLanes<T>>());
    }
    return sum_lanes_of_each<T, Count / 2>(v);
  }
}

template <class T>
LOWRANK_INLINE T sum_lanes(const Vec<T>& v) {
  T sum = v[0];
  for (int i = 1; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

}  // namespace lowrank::LOWRANK_ISA
