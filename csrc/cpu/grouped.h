// The operations over whole lists, as Python calls them: arrays of addresses, sizes and strides in, results in place.
#pragma once

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace lowrank {

// One AdamW step of n parameters; see backends/reference/adamw.py. r × r maps are in the items.
void grouped_adamw(const AdamWScalars& scalars, const AdamWItem* items, int64_t n, int threads);

// Thin QR of n tall matrices with r columns each, computed in double if dtype is fp64 and else in float.
void grouped_qr(DType dtype, const QrItem* items, int64_t n, int64_t r, int threads);

// Truncated SVD of n products of tall factors with k columns each, `rank` of the k triples.
void grouped_svd_product(DType dtype, const SvdProductItem* items, int64_t n, int64_t k, int64_t rank, int threads);

// Gram matrices (r, k) of n matrices, accumulated in double if `wide` (always for fp64), else in float.
void grouped_gram(DType dtype, bool wide, const GramItem* items, int64_t n, int64_t r, int64_t k, int threads);

// n systems with (r, r) Grams of double if `wide`, else of float; `dtype` is that of the right-hand sides and the
// results.
void grouped_solve(DType dtype, bool wide, const SolveItem* items, int64_t n, int64_t r, double damping, int threads);

// The same where the right-hand sides are square, and all is of double: small matrices side by side.
void grouped_solve_squares(const SolveItem* items, int64_t n, int64_t r, double damping, int threads);

// Orthonormal polar factors of n tall matrices with r columns each.
void grouped_polar(DType dtype, const PolarItem* items, int64_t n, int64_t r, int threads);

// Of n symmetric matrices of double or of float, of which the lower triangles are used, eigenvalues (n, r), ascending,
// and, unless null, eigenvectors (n, r, r); both contiguous.
void grouped_eigh(DType dtype, const Stack& xs, void* values, void* vectors, int64_t n, int64_t r, int threads);

// (n, r, r), contiguous: the inverses of the triangular factors of [R; √δ I] for n upper triangular R.
void grouped_damped_inverse(DType dtype, const Stack& rs, double damping, void* out, int64_t n, int64_t r, int threads);

// n preconditioners, and what realigns momentum.
void grouped_preconditioner(DType dtype, const PreconditionerArguments& arguments, int64_t n, int threads);

// X of L X + X R = C for n symmetric positive semidefinite L and R, of which the lower triangles are used.
void grouped_sylvester(const SylvesterArguments& arguments, int64_t n, int threads);

// A turn of AltLoRA of n factors of one side without maps: the Grams of their partners, preconditioners, the moment
// step.
void grouped_altlora_turn(const AdamWScalars& scalars, const TurnArguments& turn, AdamWItem* items,
                          const GramItem* partners, int64_t n, int threads);

// LoRSum of n layers, computed in double for fp64 factors and else in float; r × r matrices always in double.
void grouped_lorsum(const LorsumScalars& scalars, const LorsumItem* items, int64_t n, int threads);

// What the adapter of a linear layer adds to its output, and its gradients.
void run_adapter(DType dtype, const AdapterLayer& layer, const AdapterForward& call, int threads);
void run_adapter_backward(DType dtype, const AdapterLayer& layer, const AdapterBackward& call, int threads);

}  // namespace lowrank
