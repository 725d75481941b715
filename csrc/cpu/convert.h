// Conversion between storage types and the type of the computation, without branches so that loops of it vectorize.
#pragma once

#include "cpu/common.h"

namespace lowrank::LOWRANK_ISA {

LOWRANK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
LOWRANK_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

LOWRANK_INLINE float widen(float x) { return x; }
LOWRANK_INLINE double widen(double x) { return x; }
LOWRANK_INLINE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
LOWRANK_INLINE float widen(Float16 x) {
  // Exponent and mantissa in float's places, then 2^112 makes up for the difference of the biases (subnormals too).
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return float_of(sign | ((x.bits & 0x7c00u) == 0x7c00u ? special : finite));
}

// Round to nearest, ties to even.
LOWRANK_INLINE void narrow(float x, float* out) { *out = x; }
LOWRANK_INLINE void narrow(float x, double* out) { *out = x; }
LOWRANK_INLINE void narrow(double x, double* out) { *out = x; }
LOWRANK_INLINE void narrow(double x, float* out) { *out = static_cast<float>(x); }
LOWRANK_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
LOWRANK_INLINE void narrow(float x, Float16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 puts the rounding of the addition where float16's last bit is.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, else infinity; 65520 rounds to it
  out->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude >= 0x477ff000u ? large : finite));
}

LOWRANK_INLINE void narrow(double x, BFloat16* out) { narrow(static_cast<float>(x), out); }
LOWRANK_INLINE void narrow(double x, Float16* out) { narrow(static_cast<float>(x), out); }

// n elements `stride` apart from or to a dense array.
template <class T, class S>
LOWRANK_INLINE void widen_run(const S* source, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(source[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(source[i * stride]));
  }
}
template <class T, class S>
LOWRANK_INLINE void narrow_run(const T* source, int64_t n, S* out, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) narrow(source[i], out + i);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(source[i], out + i * stride);
  }
}

// Calls f(S*) with the pointer in its storage type. Any type may be stored, whatever the type of the computation: a
// preconditioner is solved for in double and applied to factors in bfloat16.
template <class F>
LOWRANK_INLINE void with_storage(DType dtype, void* data, const F& f) {
  if (dtype == DType::kFloat32) {
    f(static_cast<float*>(data));
  } else if (dtype == DType::kFloat64) {
    f(static_cast<double*>(data));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<BFloat16*>(data));
  } else {
    f(static_cast<Float16*>(data));
  }
}

}  // namespace lowrank::LOWRANK_ISA
