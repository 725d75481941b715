// Every machine: vectors of 16 bytes (SSE2, NEON, …, or plain code).
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

#define LOWRANK_ISA portable
#define LOWRANK_VECTOR_BYTES 16
#include "cpu/kernels_body.h"
