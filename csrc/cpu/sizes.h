// How panels and small matrices are laid out: the same for every instruction set, so that scratch is sized once.
#pragma once

#include "cpu/common.h"

namespace lowrank {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The widest vector has 16 lanes; panels are padded to whole vectors with zeros.
constexpr int64_t kRowAlignment = 16;
constexpr int64_t padded_rows(int64_t rows) { return round_up(rows, kRowAlignment); }

// Rows of a panel of r columns: what keeps it at 32 KiB in float, between 64 and 256.
constexpr int64_t panel_rows(int64_t r) { return r <= 32 ? 256 : r <= 64 ? 128 : 64; }

// Elements of all panels of a (d, r) matrix.
constexpr int64_t panel_elements(int64_t d, int64_t r) { return round_up(d, panel_rows(r)) * r; }

// Row pitch of small r × r matrices: whole vectors of doubles.
constexpr int64_t small_pitch(int64_t r) { return round_up(r, 8); }

}  // namespace lowrank
