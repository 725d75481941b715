"""``grouped_lorsum``: a half sweep is four launches over all layers, each one parallel over what is long in it.

With U to be solved for, and V fixed (the other half sweep is the mirror image)::

    contract   (layer, term, columns of Q_j, chunk of rows)   Q_jᵀ V, and VᵀV as one term more; chunks of rows are partial sums
    factor     (layer)                                        λ of each column, Cholesky of Σ VᵀV + λI
    map        (layer, term, columns of Q_j)                  M_j = c_j (Q_jᵀ V)(VᵀV + λI)⁻¹ by substitution, and M_0 = λ(VᵀV + λI)⁻¹
    expand     (layer, rows of U)                             U = U⁰ M_0 + Σ_j P_j M_j

Before the first sweep one launch copies the fixed side, after the last one another writes both sides: 8K + 2 launches for K sweeps
whatever the number of layers, no atomics, nothing read on the host. A single launch would need one program for each layer, for a layer
waits for itself between these steps: a model has some tens to hundreds of layers, so most of the GPU would idle, one SM would stream
all of S and X of its layer through tiles that leave room for everything else, and the r × r work would spill above rank 32. A barrier
across the grid needs a cooperative launch, whose grid must fit the GPU at once. Launches cost microseconds, and nothing in a CUDA graph.

Floor: P and Q of every term read once each half sweep, 2K times in all. Beside it move the partial sums (fp64, at most
8·r/(b·max(512, 4k)) of a matrix with k columns of b bytes) and the maps (k·r), both from L2. Grams, systems and products of thin
factors are fp64, those with wider matrices (the tokens of S and X) fp32, never tf32.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import DTYPE_CODES, compute_dtype
from ..registry import Verdict, implements
from ..sums import THIN, FactorLists, Sums, Sweeps, relative_ridge
from ._device import rounded, scalar
from ._launch import TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._tables import Layout, first_chunks, signature, table, upload_numbers
from ._thin import load_tile, store_tile, tile_mode
from .solve import cholesky_kernel, substitute, substitute_back

#: Up to which rank no register is spilled (tests/triton_kernels/test_triton_aot.py), by the dtype of the arithmetic.
_LARGEST_RANK = {torch.float32: 128, torch.float64: 32}
#: What a row of terms is: one that is contracted, dense (V itself is the product), the start (weighted by λ), or the Gram matrix.
_PAIR, _DENSE, _START, _GRAM = (tl.constexpr(kind) for kind in range(4))
#: The columns of the table. A row of terms: kind, layer, number, columns; its own factor: address, strides, mode, dtype; its map; the present
#: value of the other side; the other factor: address, strides, mode, rows; rows of a chunk, chunks, partial sums, whether it is wide.
(_KIND, _LAYER, _TERM, _K, _OWN, _OWN_D, _OWN_K, _OWN_MODE, _OWN_DTYPE, _MAP, _NOW, _OTHER, _OTHER_D, _OTHER_K, _OTHER_MODE, _OTHER_ROWS, _CHUNK,
 _CHUNKS, _SUMS, _WIDE, _COLUMNS) = (tl.constexpr(i) for i in range(21))  # fmt: skip
#: A row of layers: rows, present value; result: address, strides; the first row of its terms, their number; flags, their number; the other side's.
_ROWS, _VALUE, _OUT, _OUT_D, _OUT_K, _FIRST_TERM, _TERMS, _FLAGS, _BLOCKS, _OTHER_FLAGS, _OTHER_BLOCKS = (
    tl.constexpr(i) for i in range(11)
)


@triton.jit
def _rows(pointer, rows, first, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a dense (rows, R) matrix in scratch."""
    d = first + tl.arange(0, BLOCK)[:, None]
    return tl.load(pointer + d * R + tl.arange(0, R)[None, :], mask=d < rows, other=0.0)


@triton.jit
def _store_rows(pointer, rows, first, tile, R: tl.constexpr, BLOCK: tl.constexpr):
    d = first + tl.arange(0, BLOCK)[:, None]
    tl.store(pointer + d * R + tl.arange(0, R)[None, :], tile, mask=d < rows)


@triton.jit
def _contract_rows(q, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR: tl.constexpr,
                   R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Rows ``first…`` of ``Qᵀ other``, summed over rows ``start…stop`` in ACCUMULATOR, to ``target``."""
    VECTOR: tl.constexpr = 128 // q.dtype.element_ty.primitive_bitwidth
    total = tl.zeros([BLOCK_K, R], ACCUMULATOR)
    for row in range(start, stop, BLOCK_D):
        tile = load_tile(q, mode, row, rows, first, columns, stride_d, stride_k, BLOCK_D, BLOCK_K, VECTOR).to(ACCUMULATOR)
        right = _rows(other, rows, row, R, BLOCK_D).to(ACCUMULATOR)
        total = tl.dot(tl.trans(tile), right, total, input_precision="ieee", out_dtype=ACCUMULATOR)
    _store_rows(target, columns, first, total.to(tl.float64), R, BLOCK_K)


@triton.jit
def _contract(q, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR: tl.constexpr,
              R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """:func:`_contract_rows`, in a loop for each mode: Triton prefetches (cp.async) only what no branch in a loop hides.

    Triton 3.6 does not compile that for 16 bits in fp64.
    """
    if q.dtype.element_ty.primitive_bitwidth < 32 and tl.float64 == ACCUMULATOR:
        _contract_rows(q, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR, R, BLOCK_D, BLOCK_K)
    elif mode == 1:
        _contract_rows(q, 1, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR, R, BLOCK_D, BLOCK_K)
    elif mode == 2:
        _contract_rows(q, 2, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR, R, BLOCK_D, BLOCK_K)
    else:
        _contract_rows(q, 0, rows, columns, stride_d, stride_k, start, stop, first, other, target, ACCUMULATOR, R, BLOCK_D, BLOCK_K)


@triton.jit
def _contract_term(address, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, wide, TYPE: tl.constexpr,
                   COMPUTE: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    q = address.to(tl.pointer_type(TYPE))
    if tl.float64 != COMPUTE and wide == 1:
        _contract(q, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, COMPUTE, R, BLOCK_D, BLOCK_K)
    else:
        _contract(q, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, tl.float64, R, 16, BLOCK_K)


@triton.jit
def contract_kernel(
    table, programs, scratch, partials, PRESENT: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One chunk of rows of BLOCK_K columns of one term: its share of ``Qᵀ V``, or of ``VᵀV``. PRESENT: a bit for each dtype of the terms."""
    COMPUTE: tl.constexpr = scratch.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + 2 * program) * _COLUMNS
    kind = tl.load(row + _KIND)
    if (kind == _DENSE) | (kind == _START):
        return
    columns = tl.load(row + _K)
    blocks = tl.cdiv(columns, BLOCK_K)
    chunk = tl.load(programs + 2 * program + 1) // blocks
    first = tl.load(programs + 2 * program + 1) % blocks * BLOCK_K
    code = tl.load(row + _OWN_DTYPE)
    other = scratch + tl.load(row + _NOW)
    address = tl.load(row + _OTHER)
    stride_d = tl.load(row + _OTHER_D)
    stride_k = tl.load(row + _OTHER_K)
    mode = tl.load(row + _OTHER_MODE)
    rows = tl.load(row + _OTHER_ROWS)
    start = chunk * tl.load(row + _CHUNK)
    stop = tl.minimum(start + tl.load(row + _CHUNK), rows)
    target = partials + tl.load(row + _SUMS) + chunk * columns * R
    wide = tl.load(row + _WIDE)
    if kind == _GRAM:
        _contract_rows(other, 1, rows, columns, R, 1, start, stop, first, other, target, tl.float64, R, 16, BLOCK_K)
    else:
        if PRESENT & 1:
            if code == 0:
                _contract_term(address, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, wide,
                               tl.float32, COMPUTE, R, BLOCK_D, BLOCK_K)  # fmt: skip
        if PRESENT & 2:
            if code == 1:
                _contract_term(address, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, wide,
                               tl.float64, COMPUTE, R, BLOCK_D, BLOCK_K)  # fmt: skip
        if PRESENT & 4:
            if code == 2:
                _contract_term(address, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, wide,
                               tl.bfloat16, COMPUTE, R, BLOCK_D, BLOCK_K)  # fmt: skip
        if PRESENT & 8:
            if code == 3:
                _contract_term(address, mode, rows, columns, stride_d, stride_k, start, stop, first, other, target, wide,
                               tl.float16, COMPUTE, R, BLOCK_D, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["per_layer", "proximal", "relative"])
def factor_kernel(terms, partials, grams, factors, inverses, ridges, per_layer, proximal: tl.float64, relative: tl.float64,
                  R: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Per layer: the sum of the Gram matrix's chunks, λ of each column, and the Cholesky factor of their sum."""
    index = tl.program_id(0).to(tl.int64)
    row = terms + ((index + 1) * per_layer - 1) * _COLUMNS
    chunks = tl.load(row + _CHUNKS)
    partials += tl.load(row + _SUMS)
    gram = grams + index * (R * R)
    k = tl.arange(0, R)
    diagonal = tl.zeros([R], tl.float64)
    for chunk in range(chunks):
        diagonal += tl.load(partials + chunk * (R * R) + k * (R + 1))
    ridge = tl.maximum(diagonal * scalar(relative, tl.float64), scalar(proximal, tl.float64))
    ridge = tl.where(ridge == 0.0, 1.0, ridge)
    tl.store(ridges + index * R + k, ridge)
    tl.debug_barrier()
    i = tl.arange(0, TILE)
    for down in range(0, R, TILE):
        for across in range(0, down + 1, TILE):
            place = (down + i[:, None]) * R + across + i[None, :]
            total = tl.zeros([TILE, TILE], tl.float64)
            for chunk in range(chunks):
                total += tl.load(partials + chunk * (R * R) + place)
            damping = tl.load(ridges + index * R + down + i)
            total += tl.where(down + i[:, None] == across + i[None, :], damping[:, None], 0.0)
            tl.store(gram + place, total)
    tl.debug_barrier()
    cholesky_kernel(grams, factors, inverses, R, 0.0, R, TILE)


@triton.jit(do_not_specialize=["rank", "layers"])
def map_kernel(table, programs, scratch, partials, coefficients, factors, inverses, ridges, rank, layers, SOLVES: tl.constexpr,
               R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """BLOCK_K rows of one term's map: ``c Qᵀ V (VᵀV + λI)⁻¹``, for the start ``λ(VᵀV + λI)⁻¹``; ``c Qᵀ V`` unless SOLVES."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + 2 * program) * _COLUMNS
    kind = tl.load(row + _KIND)
    columns = tl.load(row + _K)
    first = tl.load(programs + 2 * program + 1) * BLOCK_K
    if (kind == _GRAM) | (first >= columns):
        return
    layer = tl.load(row + _LAYER)
    if kind == _START:
        i = first + tl.arange(0, BLOCK_K)
        ridge = tl.load(ridges + layer * R + i, mask=i < R, other=0.0)
        tile = tl.where(i[:, None] == tl.arange(0, R)[None, :], ridge[:, None], 0.0)
    else:
        if kind == _DENSE:
            tile = _rows(scratch + tl.load(row + _NOW), columns, first, R, BLOCK_K).to(tl.float64)
        else:
            tile = tl.zeros([BLOCK_K, R], tl.float64)
            source = partials + tl.load(row + _SUMS)
            for _ in range(tl.load(row + _CHUNKS)):
                tile += _rows(source, columns, first, R, BLOCK_K)
                source += columns * R
        tile *= tl.load(coefficients + tl.load(row + _TERM) * layers + layer)
    if SOLVES:
        factor = factors + layer * (R * R)
        inverses += layer * R
        tile = substitute(tile, factor, inverses, rank, R, R)
        tile = substitute_back(tile, factor, inverses, rank, R, R)
    _store_rows(scratch + tl.load(row + _MAP), columns, first, tile.to(scratch.dtype.element_ty), R, BLOCK_K)


@triton.jit
def _expand_columns(
    total, p, mode, rows, columns, stride_d, stride_k, first, maps, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``total`` and rows ``first…`` of ``P M``."""
    VECTOR: tl.constexpr = 128 // p.dtype.element_ty.primitive_bitwidth
    for k in range(0, columns, BLOCK_K):
        tile = load_tile(p, mode, first, rows, k, columns, stride_d, stride_k, BLOCK_D, BLOCK_K, VECTOR).to(total.dtype)
        total = tl.dot(tile, _rows(maps, columns, k, R, BLOCK_K), total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def _expand(total, row, rows, first, scratch, TYPE: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """:func:`_expand_columns` of one term, likewise in a loop for each mode."""
    p = tl.load(row + _OWN).to(tl.pointer_type(TYPE))
    stride_d = tl.load(row + _OWN_D)
    stride_k = tl.load(row + _OWN_K)
    mode = tl.load(row + _OWN_MODE)
    columns = tl.load(row + _K)
    maps = scratch + tl.load(row + _MAP)
    if TYPE.primitive_bitwidth < 32 and tl.float64 == total.dtype:
        total = _expand_columns(total, p, mode, rows, columns, stride_d, stride_k, first, maps, R, BLOCK_D, BLOCK_K)
    elif mode == 1:
        total = _expand_columns(total, p, 1, rows, columns, stride_d, stride_k, first, maps, R, BLOCK_D, BLOCK_K)
    elif mode == 2:
        total = _expand_columns(total, p, 2, rows, columns, stride_d, stride_k, first, maps, R, BLOCK_D, BLOCK_K)
    else:
        total = _expand_columns(total, p, 0, rows, columns, stride_d, stride_k, first, maps, R, BLOCK_D, BLOCK_K)
    return total


@triton.jit
def expand_kernel(table, programs, scratch, flags, PRESENT: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_D rows of one layer's ``U⁰ M_0 + Σ P_j M_j``, and whether they are not finite."""
    COMPUTE: tl.constexpr = scratch.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    layer = table + tl.load(programs + 2 * program) * _COLUMNS
    chunk = tl.load(programs + 2 * program + 1)
    rows = tl.load(layer + _ROWS)
    first = chunk * BLOCK_D
    row = table + tl.load(layer + _FIRST_TERM) * _COLUMNS
    total = tl.zeros([BLOCK_D, R], COMPUTE)
    for _ in range(tl.load(layer + _TERMS)):
        code = tl.load(row + _OWN_DTYPE)
        if PRESENT & 1:
            if code == 0:
                total = _expand(total, row, rows, first, scratch, tl.float32, R, BLOCK_D, BLOCK_K)
        if PRESENT & 2:
            if code == 1:
                total = _expand(total, row, rows, first, scratch, tl.float64, R, BLOCK_D, BLOCK_K)
        if PRESENT & 4:
            if code == 2:
                total = _expand(total, row, rows, first, scratch, tl.bfloat16, R, BLOCK_D, BLOCK_K)
        if PRESENT & 8:
            if code == 3:
                total = _expand(total, row, rows, first, scratch, tl.float16, R, BLOCK_D, BLOCK_K)
        row += _COLUMNS
    # x - x is 0 for what is finite, else NaN.
    spoilt = tl.max(tl.max((total - total != 0.0).to(tl.int32), axis=1), axis=0)
    tl.store(flags + tl.load(layer + _FLAGS) + chunk, spoilt)
    _store_rows(scratch + tl.load(layer + _VALUE), rows, first, total, R, BLOCK_D)


@triton.jit(do_not_specialize=["rank"])
def copy_kernel(table, programs, scratch, rank, START: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D rows of one layer's start, to the present value."""
    VECTOR: tl.constexpr = 128 // START.primitive_bitwidth
    program = tl.program_id(0).to(tl.int64)
    layer = table + tl.load(programs + 2 * program) * _COLUMNS
    first = tl.load(programs + 2 * program + 1) * BLOCK_D
    rows = tl.load(layer + _ROWS)
    row = table + tl.load(layer + _FIRST_TERM) * _COLUMNS
    start = tl.load(row + _OWN).to(tl.pointer_type(START))
    tile = load_tile(
        start, tl.load(row + _OWN_MODE), first, rows, 0, rank, tl.load(row + _OWN_D), tl.load(row + _OWN_K), BLOCK_D, R, VECTOR
    )
    _store_rows(scratch + tl.load(layer + _VALUE), rows, first, tile.to(scratch.dtype.element_ty), R, BLOCK_D)


@triton.jit
def _any(flags, count):
    found = tl.zeros([128], tl.int32)
    for first in range(0, count, 128):
        i = first + tl.arange(0, 128)
        found = tl.maximum(found, tl.load(flags + i, mask=i < count, other=0))
    return tl.max(found, axis=0)


@triton.jit(do_not_specialize=["rank"])
def finish_kernel(table, programs, scratch, flags, rank, OUT: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D rows of one side of one layer to the result; NaN, if anything in either side is not finite."""
    program = tl.program_id(0).to(tl.int64)
    layer = table + tl.load(programs + 2 * program) * _COLUMNS
    first = tl.load(programs + 2 * program + 1) * BLOCK_D
    rows = tl.load(layer + _ROWS)
    spoilt = _any(flags + tl.load(layer + _FLAGS), tl.load(layer + _BLOCKS)) + _any(
        flags + tl.load(layer + _OTHER_FLAGS), tl.load(layer + _OTHER_BLOCKS)
    )
    tile = tl.where(spoilt > 0, float("nan"), _rows(scratch + tl.load(layer + _VALUE), rows, first, R, BLOCK_D))
    out = tl.load(layer + _OUT).to(tl.pointer_type(OUT))
    store_tile(
        out,
        rounded(tile.to(scratch.dtype.element_ty), OUT),
        first,
        rows,
        0,
        rank,
        tl.load(layer + _OUT_D),
        tl.load(layer + _OUT_K),
        BLOCK_D,
        R,
    )


class _Sizes:
    """Tile sizes for one rank and dtype of the arithmetic."""

    def __init__(self, rank: int, compute: torch.dtype) -> None:
        self.R = padded_rank(rank)
        double = compute == torch.float64
        #: Columns of a term per program of the contraction and of the map (whose substitution holds whole rows).
        self.BLOCK_K = 64 if self.R <= 16 else 1024 // self.R
        #: Rows that a contraction takes at a time.
        self.CONTRACTED = 16 if double else 32
        #: The inner dimension of the expansion, and its rows of a layer per program.
        self.INNER = 16 if double or self.R > 32 else 32
        self.BLOCK_D = 32 if double or self.R in (32, 128) else 64  # as many as the registers take
        self.warps = 4 if self.R <= 16 else 8
        #: Launch options of contraction and expansion, whose loops load ahead of their products. With fewer warps some registers spill, as with
        #: other numbers of stages; three stages of a contraction at rank 128 leave no shared memory to other programs.
        self.contracting = {"num_warps": 8, "num_stages": 2}
        self.expanding = {"num_warps": 8, "num_stages": 2 if self.R == 128 else 3}


def verify(targets: FactorLists, sums: Sums, sweeps: Sweeps, out: FactorLists) -> Verdict:
    """Refuses ranks above 128 (32 in fp64) and other devices than a GPU."""
    return _verdict(targets[0])


def _verdict(factors: list[Tensor]) -> Verdict:
    rank, largest = factors[0].shape[1], _LARGEST_RANK[compute_dtype(factors[0].dtype)]
    if rank > largest:
        return False, f"rank {rank}: in this dtype the kernels are checked for spilled registers up to {largest} only"
    return device_verdict(factors)


class _Terms:
    """The rows of the terms for one side of all layers, and how much scratch their maps and partial sums take."""

    def __init__(self, sizes: _Sizes, maps: int) -> None:
        self.sizes, self.maps, self.sums = sizes, maps, 0
        self.rows: list[list[int]] = []
        self.programs: list[int] = []

    def _add(self, kind: tl.constexpr, layer: int, term: int, k: int, own: list[int], present: tuple[int, int], other: list[int],
             length: int, wide: bool = False) -> None:  # fmt: skip
        """``present``: rows and place of the present value of the other side."""
        height, now = present
        r, chunks = self.sizes.R, triton.cdiv(height, length)
        row = [0] * int(_COLUMNS.value)
        row[_KIND], row[_LAYER], row[_TERM], row[_K], row[_MAP], row[_SUMS] = int(kind.value), layer, term, k, self.maps, self.sums
        row[_OWN], row[_OWN_D], row[_OWN_K], row[_OWN_MODE], row[_OWN_DTYPE] = own
        row[_OTHER], row[_OTHER_D], row[_OTHER_K], row[_OTHER_MODE] = other
        row[_NOW], row[_OTHER_ROWS], row[_CHUNK], row[_CHUNKS], row[_WIDE] = now, height, length, chunks, int(wide)
        self.rows.append(row)
        self.programs.append(triton.cdiv(k, self.sizes.BLOCK_K) * chunks)
        self.maps += k * r
        self.sums += k * r * chunks

    def add_start(self, layer: int, start: Tensor, present: tuple[int, int]) -> None:
        self._add(_START, layer, 0, start.shape[1], [*_factor(start), DTYPE_CODES[start.dtype]], present, [0] * 4, present[0])

    def add_pairs(self, layer: int, owns: list[Tensor], others: list[Tensor | None], present: tuple[int, int]) -> None:
        """The terms of a layer: the factors of this side, and of the other; None: the first is dense."""
        for term, (own, other) in enumerate(zip(owns, others, strict=True)):
            factor = [*_factor(own), DTYPE_CODES[own.dtype]]
            if other is None:
                self._add(_DENSE, layer, term, present[0], factor, present, [0] * 4, present[0])
                continue
            k = own.shape[1]
            self._add(_PAIR, layer, term, k, factor, present, _factor(other), triton.cdiv(max(512, 4 * k), 64) * 64, k > THIN)

    def add_gram(self, layer: int, present: tuple[int, int]) -> None:
        self._add(_GRAM, layer, 0, self.sizes.R, [0] * 5, present, [0, self.sizes.R, 1, 1], 512)


def _layer(height: int, place: int, out: Tensor, first_term: int, terms: int, flags: int) -> list[int]:
    """A row of layers, without flags to look at."""
    row = [0] * int(_COLUMNS.value)
    row[_ROWS], row[_VALUE], row[_OUT], row[_OUT_D], row[_OUT_K] = height, place, out.data_ptr(), *out.stride()
    row[_FIRST_TERM], row[_TERMS], row[_FLAGS] = first_term, terms, flags
    return row


def _layout(targets: FactorLists, sums: Sums, out: FactorLists, sizes: _Sizes) -> Layout:
    """The terms for U and for V, layer by layer, then the layers' U and V; facts: words of scratch, of partial sums, programs of each of the four."""
    (us, vs), (lefts, rights, *_) = targets, sums
    count, r = len(us), sizes.R
    per_layer = len(lefts) // count + 2
    heights = [len(x) for x in (*us, *vs)]
    blocks = [triton.cdiv(height, sizes.BLOCK_D) for height in heights]
    flags, places = first_chunks(blocks), [r * first for first in first_chunks(heights)]
    present = list(zip(heights, places, strict=True))
    sides = [_Terms(sizes, r * sum(heights)) for _ in range(2)]
    for side, (terms, starts) in enumerate(zip(sides, targets, strict=True)):
        for i, start in enumerate(starts):
            other = present[(1 - side) * count + i]
            terms.add_start(i, start, other)
            owns, others = lefts[i::count], rights[i::count]
            if side:
                pairs = [(left.mT, None) if right is None else (right, left) for left, right in zip(owns, others, strict=True)]
                owns, others = [own for own, _ in pairs], [other for _, other in pairs]
            terms.add_pairs(i, owns, others, other)
            terms.add_gram(i, other)
    u, v = sides
    rows = u.rows + v.rows
    for place, (height, target) in enumerate(zip(heights, (*out[0], *out[1]), strict=True)):
        across = (place + count) % (2 * count)
        row = _layer(height, places[place], target, place * per_layer, per_layer - 1, flags[place])
        row[_BLOCKS], row[_OTHER_FLAGS], row[_OTHER_BLOCKS] = blocks[place], flags[across], blocks[across]
        rows.append(row)
    programs = [u.programs, v.programs, blocks[:count], blocks[count:]]
    ends = [int(end) for end in itertools.accumulate(map(sum, programs))]
    return Layout(rows, [*u.programs, *v.programs, *blocks], (max(u.maps, v.maps), max(u.sums, v.sums), *ends))


def _product_layout(xs: list[Tensor], sums: Sums, ys: list[Tensor], sizes: _Sizes) -> Layout:
    """The terms layer by layer, the Xs as starts, the layers' Y and X; facts: words of scratch, of partial sums, programs of terms, Y and X."""
    lefts, rights, *_ = sums
    count, r = len(xs), sizes.R
    heights = [len(x) for x in (*ys, *xs)]
    blocks = [triton.cdiv(height, sizes.BLOCK_D) for height in heights]
    flags, places = first_chunks(blocks), [r * first for first in first_chunks(heights)]
    terms, starts = _Terms(sizes, r * sum(heights)), _Terms(sizes, 0)
    for i, x in enumerate(xs):
        present = heights[count + i], places[count + i]
        terms.add_pairs(i, lefts[i::count], rights[i::count], present)
        starts.add_start(i, x, present)
    per_layer, rows = len(lefts) // count, terms.rows + starts.rows
    for place, height in enumerate(heights):
        out = ys[place] if place < count else xs[place - count]
        first = place * per_layer if place < count else (per_layer - 1) * count + place
        # No flags to look at: what is not finite stays in its row.
        rows.append(_layer(height, places[place], out, first, per_layer, flags[place]))
    ends = [int(end) for end in itertools.accumulate((sum(terms.programs), sum(blocks[:count]), sum(blocks[count:])))]
    return Layout(rows, [*terms.programs, *[0] * count, *blocks], (terms.maps, terms.sums, *ends))


def _factor(x: Tensor) -> list[int]:
    return [x.data_ptr(), *x.stride(), tile_mode(x)]


def _terms_key(sums: Sums) -> tuple[Hashable, ...]:
    """For a table's key. Terms may differ in dtype, which lists have in common elsewhere; a right factor has its left one's."""
    factors = [x for x in sums.rights if x is not None]
    return signature(sums.lefts), signature(factors), tuple(x is None for x in sums.rights), tuple(x.dtype for x in sums.lefts)


def _sent(sums: Sums, device: torch.device) -> Tensor:
    """The coefficients of all terms on the device, contiguous."""
    return (upload_numbers(sums.numbers, device) if sums.coefficients is None else sums.coefficients).contiguous()


@implements("grouped_lorsum", "triton", verify)
def grouped_lorsum(targets: FactorLists, sums: Sums, sweeps: Sweeps, out: FactorLists) -> None:
    """See the reference; 8K + 2 launches for K sweeps, nothing read on the host."""
    first = targets[0][0]
    count, rank, dtype, device = len(targets[0]), first.shape[1], first.dtype, first.device
    if not rank:
        return
    compute = compute_dtype(dtype)
    sizes = _Sizes(rank, compute)
    r = sizes.R
    key = (*map(signature, (*targets, *out)), *_terms_key(sums))
    work = table("grouped_lorsum", device, key, lambda: _layout(targets, sums, out, sizes))
    scratch_size, partial_size, *ends = work.facts
    programs = [work.chunks[2 * start : 2 * end] for start, end in zip((0, *ends), ends, strict=False)]
    per_layer = len(sums.lefts) // count + 2
    coefficients = _sent(sums, device)
    scratch = torch.empty(scratch_size, dtype=compute, device=device)
    partials, ridges, inverses = (torch.empty(size, dtype=torch.float64, device=device) for size in (partial_size, count * r, count * r))
    grams, factors = torch.empty(2, count, r, r, dtype=torch.float64, device=device)
    flags = torch.empty(ends[3] - ends[1], dtype=torch.int32, device=device)
    relative = relative_ridge(rank, sweeps.proximal, compute)
    kinds = {"PRESENT": sum({1 << DTYPE_CODES[x.dtype] for x in (first, *sums.lefts[::count])}), "R": r}
    with on_device(first):
        side = 0 if sweeps.u_first else 1
        launch(copy_kernel, (len(programs[3 - side]) // 2,), work.tensors, programs[3 - side], scratch, rank, START=TL_DTYPE[dtype], R=r,
               BLOCK_D=sizes.BLOCK_D, num_warps=sizes.warps)  # fmt: skip
        for _ in range(2 * sweeps.number):
            grid = (len(programs[side]) // 2,)
            launch(contract_kernel, grid, work.tensors, programs[side], scratch, partials, **kinds, BLOCK_D=sizes.CONTRACTED,
                   BLOCK_K=sizes.BLOCK_K, **sizes.contracting)  # fmt: skip
            launch(factor_kernel, (count,), work.tensors[side * count * per_layer * int(_COLUMNS.value) :], partials, grams, factors, inverses,
                   ridges, per_layer, float(sweeps.proximal), float(relative), R=r, TILE=min(r, 32), num_warps=4 if r <= 32 else 8)  # fmt: skip
            launch(map_kernel, grid, work.tensors, programs[side], scratch, partials, coefficients, factors, inverses, ridges, rank, count,
                   SOLVES=True, R=r, BLOCK_K=sizes.BLOCK_K, num_warps=4)  # fmt: skip
            launch(expand_kernel, (len(programs[2 + side]) // 2,), work.tensors, programs[2 + side], scratch, flags, **kinds,
                   BLOCK_D=sizes.BLOCK_D, BLOCK_K=sizes.INNER, **sizes.expanding)  # fmt: skip
            side = 1 - side
        both = work.chunks[2 * ends[1] :]
        launch(finish_kernel, (len(both) // 2,), work.tensors, both, scratch, flags, rank, OUT=TL_DTYPE[dtype], R=r, BLOCK_D=sizes.BLOCK_D,
               num_warps=sizes.warps)  # fmt: skip


def verify_product(xs: list[Tensor], sums: Sums, ys: list[Tensor]) -> Verdict:
    """Refuses what :func:`verify` does."""
    return _verdict(xs)


@implements("grouped_lorsum_product", "triton", verify_product)
def grouped_lorsum_product(xs: list[Tensor], sums: Sums, ys: list[Tensor]) -> None:
    """See the reference; half a sweep without a system, in five launches."""
    count, rank, device, compute = len(xs), xs[0].shape[1], xs[0].device, ys[0].dtype
    if not rank:
        return
    sizes = _Sizes(rank, compute)
    r = sizes.R
    key = (*map(signature, (xs, ys)), *_terms_key(sums))
    work = table("grouped_lorsum_product", device, key, lambda: _product_layout(xs, sums, ys, sizes))
    scratch_size, partial_size, *ends = work.facts
    of_terms, of_ys, of_xs = (work.chunks[2 * start : 2 * end] for start, end in zip((0, *ends), ends, strict=False))
    coefficients = _sent(sums, device)
    scratch = torch.empty(scratch_size, dtype=compute, device=device)
    partials = torch.empty(partial_size, dtype=torch.float64, device=device)
    flags = torch.empty(ends[2] - ends[0], dtype=torch.int32, device=device)
    kinds = {"PRESENT": sum({1 << DTYPE_CODES[x.dtype] for x in sums.lefts[::count]}), "R": r}
    rows = {"R": r, "BLOCK_D": sizes.BLOCK_D, "num_warps": sizes.warps}
    with on_device(xs[0]):
        launch(copy_kernel, (len(of_xs) // 2,), work.tensors, of_xs, scratch, rank, START=TL_DTYPE[xs[0].dtype], **rows)
        launch(contract_kernel, (len(of_terms) // 2,), work.tensors, of_terms, scratch, partials, **kinds, BLOCK_D=sizes.CONTRACTED,
               BLOCK_K=sizes.BLOCK_K, **sizes.contracting)  # fmt: skip
        launch(map_kernel, (len(of_terms) // 2,), work.tensors, of_terms, scratch, partials, coefficients, partials, partials, partials, rank,
               count, SOLVES=False, R=r, BLOCK_K=sizes.BLOCK_K, num_warps=4)  # fmt: skip
        launch(expand_kernel, (len(of_ys) // 2,), work.tensors, of_ys, scratch, flags, **kinds, BLOCK_D=sizes.BLOCK_D, BLOCK_K=sizes.INNER,
               **sizes.expanding)  # fmt: skip
        launch(finish_kernel, (len(of_ys) // 2,), work.tensors, of_ys, scratch, flags, rank, OUT=TL_DTYPE[compute], **rows)
