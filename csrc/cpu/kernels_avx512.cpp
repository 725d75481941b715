// AVX-512 with F, BW, CD, DQ and VL: x86-64-v4.
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/targets.h"

#if defined(LOWRANK_X86_TARGETS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi2")
#endif

#define LOWRANK_ISA avx512
#define LOWRANK_VECTOR_BYTES 64
#include "cpu/kernels_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
