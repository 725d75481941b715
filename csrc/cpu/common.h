// What all CPU code shares: element types, strided views of matrices. No torch, no Python.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__GNUC__)
#define LOWRANK_INLINE __attribute__((always_inline)) inline
#define LOWRANK_RESTRICT __restrict__
#else
#define LOWRANK_INLINE inline
#define LOWRANK_RESTRICT __restrict
#endif

// Before a short loop over an array of vectors: unrolled early, the array becomes registers.
#if defined(__clang__)
#define LOWRANK_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define LOWRANK_UNROLL _Pragma("GCC unroll 32")
#else
#define LOWRANK_UNROLL
#endif

namespace lowrank {

constexpr int64_t kLineBytes = 64;

// Asks a cache, the first-level or the second-level one, for a line: a hint, whatever the address.
template <int kLevel = 2>
LOWRANK_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 4 - kLevel);
#else
  (void)address;
#endif
}

// The codes that Python passes. Narrow types are stored as 16 bits and computed in float.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// The type that T is the computation of, without conversion.
template <class T>
constexpr DType kDTypeOf = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

// Calls f(double()) for fp64, f(float()) for all others: in what the arithmetic is done.
template <class F>
void with_compute_type(DType dtype, const F& f) {
  dtype == DType::kFloat64 ? f(double()) : f(float());
}

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A matrix somewhere in memory: element (i, j) is at data + i * row_stride + j * column_stride (in elements).
struct View {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// The largest rank that the fixed-size parts of the kernels are laid out for; Python refuses more.
constexpr int64_t kMaxRank = 128;

}  // namespace lowrank
