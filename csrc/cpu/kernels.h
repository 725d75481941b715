// The kernels of one instruction set, behind a table of functions; which set runs is decided when the module is loaded.
//
// kernels_body.h is compiled once per set, in its own namespace and with its own target pragma. What it uses of the
// standard library is included before the pragma, so that no code for a newer processor ends up in a shared template.
#pragma once

#include <vector>

#include "cpu/common.h"

namespace lowrank {

struct AdamWScalars {
  DType dtype;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// One parameter, as a (rows, columns) matrix; the moments are contiguous, of the type of the computation, or null.
struct AdamWItem {
  View param, grad;
  void* m = nullptr;
  void* v = nullptr;
  int64_t rows = 0, columns = 0;
  double step_size = 0;  // lr / (1 - β₁ᵗ)
  double scale_v = 0;    // 1 / √(1 - β₂ᵗ)
  const void* grad_map = nullptr;
  const void* momentum_map = nullptr;
  const void* param_map = nullptr;
  const void* direction_map = nullptr;
  int rank_dim = 0;
  void* drift = nullptr;  // (r, r), of the type of the computation
  // What is stepped after this one, by the same thread, and has what this one has: memory is asked for its first rows
  // while the last ones of this one are stepped. May be null.
  const AdamWItem* next = nullptr;

  int64_t rank() const { return rank_dim == 1 ? columns : rows; }
  int64_t height() const { return rank_dim == 1 ? rows : columns; }
};

// xᵀy, or xᵀx without y: (r, k), contiguous.
struct GramItem {
  View x, y;
  int64_t rows = 0;
  void* gram = nullptr;
  const GramItem* next = nullptr;  // as AdamWItem has it
  bool symmetric = true;           // there is no y; that of an empty matrix has no address either
};

// out = rhs (gram + damping)⁻¹ for `rows` rows; only the lower triangle of the (r, r) gram, contiguous, is read.
struct SolveItem {
  View rhs, out;
  int64_t rows = 0;
  const void* gram = nullptr;
};

// The orthonormal polar factor of a tall matrix.
struct PolarItem {
  View x, out;
  int64_t rows = 0;
};

// One tall matrix of `rows` rows, the Q to align with (or no data), and where Q and the contiguous R go.
struct QrItem {
  View x, previous, q;
  int64_t rows = 0;
  void* r = nullptr;
};

// left (left_rows, k) · rightᵀ (k, right_rows) ≈ U diag(s) Vᵀ.
struct SvdProductItem {
  View left, right, u, v;
  int64_t left_rows = 0, right_rows = 0;
  void* s = nullptr;
};

// A stack of small matrices.
struct Stack {
  const void* data = nullptr;
  int64_t matrix_stride = 0, row_stride = 0, column_stride = 0;
};

// (n, r, r), all contiguous: Grams G, drifts K or null, and where w (G + δI)⁻¹ and, with K, I - (G + δI)⁻¹ K (or its
// transpose) go; all but the Grams of the type of the computation.
struct PreconditionerArguments {
  const double* grams;
  const void* drifts;
  void *out, *realigned;
  int64_t r;
  double damping, weight;
  bool transposed;
};

// L X + X R = C: stacks of double, C and X (n, r, r), contiguous.
struct SylvesterArguments {
  Stack left, right;
  const double* rhs;
  double* out;
  int64_t r;
};

// A turn of AltLoRA, besides the factors and their partners: the drifts that the momentum is behind by, which are
// zeroed, and those of the factors' move, which are written; (n, r, r), contiguous, of the type of the computation.
// `damping` is of the partners' Grams, `own_damping` of the factors' own.
struct TurnArguments {
  void *behind, *moved;
  int64_t r;
  double damping, own_damping, weight;
};

// One term of one layer: c P Qᵀ with P (d_out, k) on the left and Q (d_in, k) on the right, or c D with D on the left.
struct LorsumTerm {
  View left, right;
  int64_t k = 0;
  double c = 0;
  DType dtype = DType::kFloat32;
  bool dense = false;
};

// One layer: the start u (d_out, r) and v (d_in, r), its terms, and where the result goes.
struct LorsumItem {
  View u, v, out_u, out_v;
  int64_t d_out = 0, d_in = 0;
  const LorsumTerm* terms = nullptr;
};

struct LorsumScalars {
  DType dtype;  // of the factors
  int64_t r, terms;
  int sweeps;
  double proximal;
  bool u_first;
};

// A linear layer's adapter: for each pair a factor (r, d_in) that goes down to the rank and one (d_out, r) that goes
// up, dense. What a call does not use is empty, and its width 0.
struct AdapterLayer {
  int64_t tokens = 0, pairs = 0, d_in = 0, d_out = 0, r = 0;
  double scale = 0;
  std::vector<const void*> downs, ups;

  int64_t width() const { return pairs * r; }
};

// (tokens, r), rows so far apart; or null.
struct Activation {
  void* data = nullptr;
  int64_t stride = 0;
};

// y += s [H₁ H₂ …] [U₁ U₂ …]ᵀ for H = x Dᵀ, one for each pair. With x, those that are not null are written; without,
// they are read. Rows of x and y are dense; y may be null.
struct AdapterForward {
  const void* x = nullptr;
  void* y = nullptr;
  std::vector<Activation> through;
};

// With P = s ∂y U, one for each pair: grad_x += P₁ D₁ + P₂ D₂ + …, grad_a = P₁ᵀ x, grad_b = s ∂yᵀ hidden; what is null
// is not asked for. With grad, those P that are not null are written; without, they are read. If `before` is not null,
// grad_x becomes the sum with that.
struct AdapterBackward {
  const void *grad = nullptr, *x = nullptr, *before = nullptr;
  Activation hidden;
  std::vector<Activation> through;
  void *grad_x = nullptr, *grad_a = nullptr, *grad_b = nullptr;
};

// Scratch of one LoRSum.
template <class T>
struct LorsumWork {
  double* small;    // 5 small matrices and a row: two Grams, a ridge, U with UᵀU = H, H⁻¹, U⁻¹
  double* grams;    // a small matrix for each chunk of rows
  double* sums;     // for each worker, `sums_stride` apart: kLorsumColumns rows of small_pitch(r)
  T* factors;       // start and present value of both sides
  T* packed;        // thin factors of terms
  T* coefficients;  // what multiplies the start and the terms
  T* tile;          // for each worker, `tile_stride` apart: a tile and its staging area
  int64_t sums_stride, tile_stride;
};

// Scratch of one solve: two small matrices in double, U and its transpose in reversed order, reciprocals of the
// diagonals, and for each worker two panels and a staging area.
template <class T>
struct SolveWork {
  double* upper;
  double* inverse;
  T* forward;
  T* backward;
  T* reciprocals;
  T* reversed;
  T* tile;
  int64_t tile_stride;
  bool streams;  // results may go past the caches
};

// Scratch of one QR. The small matrices have r rows of small_pitch(r).
template <class T>
struct QrWork {
  T* panels;        // panel_elements(rows, r)
  double* partial;  // 2 · group_count(rows) small matrices
  double* gram;     // small matrices: the Gram matrix, the result R, an inverse, U in T
  double* r;
  double* inverse;
  T* factor;
  T* reciprocals;  // r
  double* lanes;   // for each worker: gram_scratch(r, r)
  T* tile;         // for each worker: a panel and its staging area, 2 · panel_rows(r) · r
  int64_t tile_stride;
  bool streams;  // Q may go past the caches
};

template <class T>
struct Kernels {
  // Elements [begin, end) in row-major order.
  void (*adamw_range)(const AdamWScalars&, const AdamWItem&, int64_t begin, int64_t end);
  // `rows` rows of the factor seen as tall; scratch for mapped_scratch(r) elements; their share of the drift is added
  // to `drift` (r, r), if that is not null.
  void (*adamw_mapped_rows)(const AdamWScalars&, const AdamWItem&, int64_t first, int64_t rows, T* scratch,
                            double* drift);
  // The Gram of `rows` rows is added to sums (r, k); scratch for gram_scratch(r, k) doubles.
  void (*gram_rows)(DType, bool wide, const GramItem&, int64_t r, int64_t k, int64_t first, int64_t rows,
                    double* scratch, double* sums);
  // One system; `threads` share its groups of rows.
  void (*solve)(DType, const SolveItem&, int64_t r, double damping, const SolveWork<T>&, int threads);
  // `count` systems with square right-hand sides, of double, matrices as lanes.
  void (*solve_squares)(const SolveItem*, int64_t count, int64_t r, double damping, double* scratch);
  // QR of one matrix; `threads` share its groups of rows.
  void (*qr)(DType, const QrItem&, int64_t r, const QrWork<T>&, int threads);
  void (*svd_product)(DType, const SvdProductItem&, int64_t k, int64_t rank, const QrWork<T>& left,
                      const QrWork<T>& right, int threads);
  void (*polar)(DType, const PolarItem&, int64_t r, const QrWork<T>&, int threads);
  // `count` matrices of T from the `first` on. Values (n, r), vectors (n, r, r) or null; scratch for eigh_scratch(r)
  // doubles.
  void (*eigh)(const Stack&, void* values, void* vectors, int64_t first, int64_t count, int64_t r, double* scratch);
  // As eigh; out (n, r, r), scratch for damped_inverse_scratch(r) doubles.
  void (*damped_inverse)(const Stack&, double damping, void* out, int64_t first, int64_t count, int64_t r,
                         double* scratch);
  // Of matrices [first, first + count); scratch for preconditioner_scratch(r) doubles.
  void (*preconditioner)(const PreconditionerArguments&, int64_t first, int64_t count, double* scratch);
  // Of matrices [first, first + count); scratch for sylvester_scratch(r) doubles.
  void (*sylvester)(const SylvesterArguments&, int64_t first, int64_t count, double* scratch);
  void (*lorsum)(const LorsumScalars&, const LorsumItem&, const LorsumWork<T>&, int threads);
  // `rows` rows of r dense elements, `stride` apart, are columns of a panel, `pitch` apart, padded with zeros to
  // padded_rows(rows); and back.
  void (*columns_from_rows)(const T* source, int64_t stride, int64_t rows, int64_t r, T* panel, int64_t pitch);
  void (*rows_from_columns)(const T* panel, int64_t pitch, int64_t rows, int64_t r, T* out, int64_t stride);
  // out (rows, pitch) = factor · x · panel, y (rows, width) += u · panel, and columns [first, last) of out (r, ·) = uᵀ
  // x; the first panel has `pitch` columns, a multiple of `lanes`, the second one k rows.
  void (*project_rows)(const T* x, int64_t stride, int64_t rows, int64_t width, const T* panel, int64_t pitch, T factor,
                       T* out);
  void (*expand_rows)(const T* u, int64_t pitch, int64_t rows, int64_t k, const T* const* panel, int64_t width, T* y,
                      int64_t stride);
  void (*sum_over_tokens)(const T* u, int64_t pitch, int64_t r, const T* x, int64_t stride, int64_t tokens,
                          int64_t first, int64_t last, T* out, int64_t out_stride);
  int64_t lanes;
};

template <class T>
const Kernels<T>& kernels();

// "avx512", "avx2" or "portable": what runs now, and what this processor and build can run.
const char* instruction_set();
bool use_instruction_set(const char* name);

}  // namespace lowrank
