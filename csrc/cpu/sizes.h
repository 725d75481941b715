// How panels and small matrices are laid out: the same for every instruction set, so that scratch is sized once.
#pragma once

#include "cpu/common.h"

namespace lowrank {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Panels are padded with zeros to pairs of the widest vectors (16 lanes).
constexpr int64_t kRowAlignment = 32;
constexpr int64_t padded_rows(int64_t rows) { return round_up(rows, kRowAlignment); }

// Rows of a panel of r columns: what keeps it at 32 KiB in float, between 64 and 256.
constexpr int64_t panel_rows(int64_t r) { return r <= 32 ? 256 : r <= 64 ? 128 : 64; }

// Elements of all panels of a (d, r) matrix.
constexpr int64_t panel_elements(int64_t d, int64_t r) { return round_up(d, panel_rows(r)) * r; }

// Sums over rows are taken over groups of panels, each of kGroupRows rows, and then over the groups, in order: so the
// result does not depend on how many threads share the groups.
constexpr int64_t kGroupRows = 1024;
// Where what is summed up is formed on the way, it is formed in blocks of so many rows, which stay in the cache.
constexpr int64_t kBlockRows = 256;
constexpr int64_t group_count(int64_t d) { return d == 0 ? 1 : (d + kGroupRows - 1) / kGroupRows; }

// Rows of a panel of the moment step with maps, which works on seven of them: at r = 16 they fit the first-level cache.
constexpr int64_t mapped_panel_rows(int64_t r) { return r <= 64 ? 64 : 32; }

// The same where the factor stays in place, which is worked on in strips of at most so many rows.
constexpr int64_t kStripRows = 32;
// Over so many rows of a tall factor (whole strips of 12 or of 8), or columns of a wide one, the drift is added up
// before it goes to double: few enough for what moved to stay in the cache, enough to pay for that.
constexpr int64_t in_place_rows(int64_t r) { return r <= 8 ? 384 : r <= 16 ? 192 : r <= 32 ? 96 : r <= 64 ? 48 : 24; }
constexpr int64_t in_place_columns(int64_t r) { return r <= 16 ? 512 : 8192 / r / 32 * 32; }

// Scratch of the moment step with maps, in elements.
constexpr int64_t mapped_scratch(int64_t r) {
  const int64_t panels = (2 * kBlockRows + 5 * mapped_panel_rows(r)) * r;
  const int64_t block = in_place_rows(r) > in_place_columns(r) ? in_place_rows(r) : in_place_columns(r);
  const int64_t in_place = (3 * kStripRows + block) * r + 4 * r * r;
  return round_up(panels > in_place ? panels : in_place, 16);
}

// Rows of a panel of a Gram product: up to rank 32 half of the first-level cache in double, and always enough to pay
// for fetching the accumulators.
constexpr int64_t gram_panel_rows(int64_t r) { return r <= 8 ? 256 : r <= 16 ? 128 : 64; }
// Accumulators of an (r, k) Gram product, and the scratch of its rows, both in doubles.
constexpr int64_t gram_lanes(int64_t r, int64_t k) { return round_up(r, 4) * round_up(k, 4) * 8; }
constexpr int64_t gram_scratch(int64_t r, int64_t k) {
  const int64_t wider = r > k ? r : k;
  return gram_lanes(r, k) + gram_panel_rows(wider) * (r + k + wider);
}

// LoRSum reads terms in tiles of so many rows and columns, and takes at most so many terms.
constexpr int64_t kLorsumRows = 512;
constexpr int64_t kLorsumColumns = 64;
constexpr int64_t kLorsumTile = kLorsumRows * kLorsumColumns;
constexpr int64_t kMaxLorsumTerms = 16;
// Columns of factors an odd number of lines apart: of columns whole pages apart few fit the first-level cache.
constexpr int64_t lorsum_pitch(int64_t rows) { return padded_rows(rows) | kRowAlignment; }
constexpr int64_t lorsum_chunks(int64_t d) { return d == 0 ? 1 : (d + kLorsumRows - 1) / kLorsumRows; }

// Small matrices are worked on side by side, in groups of the widest vector; the scratch of a group, in doubles.
constexpr int64_t kLaneGroup = 8;
constexpr int64_t eigh_scratch(int64_t r) { return (r + 4) * r * kLaneGroup; }
constexpr int64_t damped_inverse_scratch(int64_t r) { return (2 * r + 1) * r * kLaneGroup; }
constexpr int64_t preconditioner_scratch(int64_t r) { return (3 * r + 1) * r * kLaneGroup; }
constexpr int64_t solve_squares_scratch(int64_t r) { return (3 * r + 1) * r * kLaneGroup; }
constexpr int64_t sylvester_scratch(int64_t r) { return 2 * (eigh_scratch(r) + r * r * kLaneGroup); }

// Row pitch of small r × r matrices: whole vectors of doubles.
constexpr int64_t small_pitch(int64_t r) { return round_up(r, 8); }

}  // namespace lowrank
