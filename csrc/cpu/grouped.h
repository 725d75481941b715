// The operations over whole lists, as Python calls them: arrays of addresses, sizes and strides in, results in place.
#pragma once

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace lowrank {

// One AdamW step of n parameters; see backends/reference/adamw.py. r × r maps are in the items.
void grouped_adamw(const AdamWScalars& scalars, const AdamWItem* items, int64_t n, int threads);

}  // namespace lowrank
