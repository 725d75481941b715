"""``grouped_adamw_``: the moment step of all parameters of a group in one launch, with drifts in two or three.

Floor: each parameter element must be read and written (2·b bytes, b the parameter's element size), its gradient read
(b), each moment read and written (2·c each, c = 4, or 8 for fp64). fp32 with both moments: 28 bytes an element. The
kernel moves just that, plus 16 bytes of chunk table per 1024 elements; with maps also up to 4·c·r² per program, from L2.
Contiguous, aligned factors are read 16 bytes at a time (with maps, where the rank and the lengths are multiples of that; not in fp64).
The r×r maps are applied where their operand is anyway: P to the gradient and T to the parameter as they are read, C to the
momentum, D to the direction: in registers up to rank 32, beyond that through a scratch tile of the program in L2 (2·c an element).

``drifts``, up to rank 32: each program adds up its share of the products while it holds the rows, new and as they were, in registers; a
second launch sums the shares in a fixed order (r² words per 256 rows, from L2). Beyond that an r×r sum does not fit in registers: the
first launch writes how far the factor moved, a second forms the products, a third sums (8 bytes more an element; 16 for 16-bit factors,
which are written in fp32 too).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..dtypes import compute_dtype
from ..moments import Maps, Numbers, Stepped
from ..registry import Verdict, implements
from . import _thin as thin
from ._device import divide, root, scalar
from ._launch import TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._tables import Layout, Table, addresses, first_chunks, signature, table
from ._thin import thin_table
from ._thin import vector as vector_length
from ._tuned import configuration
from .gram import GramSizes, launch_partials, launch_sum

#: Elements per program without maps: four per thread.
BLOCK = 1024
#: The longest tensor that is indexed element by element (rows and columns from 32-bit division).
_LARGEST_STRIDED = 2**31 - BLOCK
LARGEST_RANK = 128
#: Up to this (padded) rank D and the drifts are formed in registers.
_LARGEST_FUSED = 32
#: Tiles of rows per program that adds up drifts.
_DRIFT_TILES = 4
#: The columns of the table without maps, one row of it a parameter: addresses; rows (0: all is contiguous and aligned), columns, and the
#: strides of the parameter and its gradient; how many steps it missed.
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _ROWS, _COLUMNS, _P_I, _P_J, _G_I, _G_J, _MISSED, _WIDTH = (tl.constexpr(i) for i in range(12))
#: With maps, the first four and ``_MISSED`` likewise: which dimension the rank is, the length of the other, strides along both, and where
#: the elements that the step writes aside begin. The chunks are where :func:`~.gram.sum_of_chunks` looks for them.
_RANK_DIM, _LENGTH, _P_K, _P_D, _G_K, _G_D, _ASIDE = (tl.constexpr(i) for i in (4, 5, 6, 7, 8, 9, 14))

_SCALARS = ["lr", "beta1", "beta2", "eps", "weight_decay", "step", "log2_beta1", "log2_beta2", "correction1", "correction2"]


@triton.jit
def _coefficients(lr, lr_pointer, step, step_pointer, missed, log2_beta1, log2_beta2, correction1, correction2, weight_decay,
                  LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, BIAS_CORRECTION: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """``lr, 1 - lr·weight_decay, 1 - β₁ᵗ, √(1 - β₂ᵗ)``, formed in fp64 whatever the parameters' dtype."""
    rate = scalar(lr, tl.float64)
    if LR_ON_DEVICE:
        rate = tl.load(lr_pointer).to(tl.float64)
    keep = 1.0 - rate * weight_decay
    first = scalar(1.0, tl.float64)
    second = scalar(1.0, tl.float64)
    if BIAS_CORRECTION:
        first = scalar(correction1, tl.float64)
        second = scalar(correction2, tl.float64)
        if STEP_ON_DEVICE:
            taken = tl.load(step_pointer).to(tl.float64) - missed.to(tl.float64)
            first = 1.0 - tl.exp2(taken * log2_beta1)
            second = 1.0 - tl.exp2(taken * log2_beta2)
        else:
            if missed != 0:
                taken = scalar(step, tl.float64) - missed.to(tl.float64)
                first = 1.0 - tl.exp2(taken * log2_beta1)
                second = 1.0 - tl.exp2(taken * log2_beta2)
    return rate.to(COMPUTE), keep.to(COMPUTE), first.to(COMPUTE), tl.sqrt(second).to(COMPUTE)


@triton.jit
def _momentum(m, g, beta1, COMPUTE: tl.constexpr):
    """``β₁ m + (1-β₁) g``, exact at β₁ = 0 and 1 as ``torch.lerp`` is."""
    weight = scalar(1.0 - scalar(beta1, tl.float64), COMPUTE)
    rest = scalar(beta1, COMPUTE)
    return tl.where(weight < 0.5, m + weight * (g - m), g - rest * (g - m))


@triton.jit
def _gradient(grad, offset, mask, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):
    g = tl.load(grad + offset, mask=mask, other=0.0).to(COMPUTE)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def _direction(exp_avg, exp_avg_sq, offset, mask, g, mapped_m, beta1, beta2, eps, correction, root_correction,
               HAS_M_MAP: tl.constexpr, HAS_M: tl.constexpr, HAS_V: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """The moments of one tile, updated in memory, and the direction of the step; a mapped momentum comes in where there is a map."""
    m = g
    if HAS_M:
        if HAS_M_MAP:
            old = mapped_m
        else:
            old = tl.load(exp_avg + offset, mask=mask, other=0.0)
        m = _momentum(old, g, beta1, COMPUTE)
        tl.store(exp_avg + offset, m, mask=mask)
    direction = divide(m, correction, COMPUTE)
    if HAS_V:
        v = tl.load(exp_avg_sq + offset, mask=mask, other=0.0)
        v = v * scalar(beta2, COMPUTE) + scalar(1.0 - scalar(beta2, tl.float64), COMPUTE) * (g * g)
        tl.store(exp_avg_sq + offset, v, mask=mask)
        spread = divide(root(v, COMPUTE), root_correction, COMPUTE)
        direction = divide(direction, spread + scalar(eps, COMPUTE), COMPUTE)
    return direction


@triton.jit
def _write(param, offset, mask, direction, keep, rate, COMPUTE: tl.constexpr):
    """Decay and step of one tile; returns it as it is stored, and as it was."""
    old = tl.load(param + offset, mask=mask, other=0.0)
    new = (old.to(COMPUTE) * keep - rate * direction).to(param.dtype.element_ty)
    tl.store(param + offset, new, mask=mask)
    return new, old


@triton.jit
def _step_tile(param, grad, exp_avg, exp_avg_sq, p_offset, g_offset, m_offset, mask, beta1, beta2, eps,
               rate, keep, correction, root_correction,
               HAS_M: tl.constexpr, HAS_V: tl.constexpr, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    g = _gradient(grad, g_offset, mask, MAXIMIZE, COMPUTE)
    direction = _direction(exp_avg, exp_avg_sq, m_offset, mask, g, 0.0, beta1, beta2, eps, correction, root_correction,
                           False, HAS_M, HAS_V, COMPUTE)  # fmt: skip
    _write(param, p_offset, mask, direction, keep, rate, COMPUTE)


@triton.jit(do_not_specialize=_SCALARS)
def adamw_kernel(tensors, chunks, lr_pointer, step_pointer,
                 lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64, step: tl.float64,
                 log2_beta1: tl.float64, log2_beta2: tl.float64, correction1: tl.float64, correction2: tl.float64,
                 PARAM: tl.constexpr, COMPUTE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
                 HAS_M: tl.constexpr, HAS_V: tl.constexpr, BIAS_CORRECTION: tl.constexpr, MAXIMIZE: tl.constexpr,
                 VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Without maps: BLOCK consecutive elements per program."""
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program) * _WIDTH
    start = tl.load(chunks + 2 * program + 1) * BLOCK
    param = tl.load(row + _PARAM).to(tl.pointer_type(PARAM))
    grad = tl.load(row + _GRAD).to(tl.pointer_type(PARAM))
    exp_avg = tl.load(row + _EXP_AVG).to(tl.pointer_type(COMPUTE))
    exp_avg_sq = tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(COMPUTE))
    rows = tl.load(row + _ROWS)
    columns = tl.load(row + _COLUMNS)
    rate, keep, correction, root_correction = _coefficients(
        lr, lr_pointer, step, step_pointer, tl.load(row + _MISSED), log2_beta1, log2_beta2, correction1, correction2, weight_decay,
        LR_ON_DEVICE, STEP_ON_DEVICE, BIAS_CORRECTION, COMPUTE)  # fmt: skip
    if rows == 0:
        # Contiguous, aligned, a multiple of VECTOR long (checked on the host): vector loads and stores. Hints are of new values: on
        # `param` itself they would hold in the other branch too, which takes what is not aligned.
        offset = tl.arange(0, BLOCK)
        mask = offset < tl.minimum(columns - start, BLOCK).to(tl.int32) // VECTOR * VECTOR
        _step_tile(tl.multiple_of(param + start, 16), tl.multiple_of(grad + start, 16),
                   tl.multiple_of(exp_avg + start, 16), tl.multiple_of(exp_avg_sq + start, 16), offset, offset, offset, mask,
                   beta1, beta2, eps, rate, keep, correction, root_correction, HAS_M, HAS_V, MAXIMIZE, COMPUTE)  # fmt: skip
    else:
        # 32-bit division: the host refuses strided tensors that are longer than that.
        flat = start.to(tl.int32) + tl.arange(0, BLOCK)
        i = flat // columns.to(tl.int32)
        j = flat % columns.to(tl.int32)
        p_offset = i * tl.load(row + _P_I) + j * tl.load(row + _P_J)
        g_offset = i * tl.load(row + _G_I) + j * tl.load(row + _G_J)
        _step_tile(param, grad, exp_avg, exp_avg_sq, p_offset, g_offset, flat, flat < rows * columns,
                   beta1, beta2, eps, rate, keep, correction, root_correction, HAS_M, HAS_V, MAXIMIZE, COMPUTE)  # fmt: skip


@triton.jit
def _map_tile(matrix, x, k, d, rank, length, stride_k, stride_d, RANK_DIM: tl.constexpr,
              R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """``M x`` (RANK_DIM 0: a (R, BLOCK_D) tile) or ``x M`` (RANK_DIM 1: a (BLOCK_D, R) tile), STEP of the inner dimension a time."""
    if RANK_DIM == 0:
        total = tl.zeros([R, BLOCK_D], COMPUTE)
    else:
        total = tl.zeros([BLOCK_D, R], COMPUTE)
    for first in range(0, R, STEP):
        inner = first + tl.arange(0, STEP)
        if RANK_DIM == 0:
            tile = tl.load(x + inner[:, None] * stride_k + d[None, :] * stride_d,
                           mask=(inner[:, None] < rank) & (d[None, :] < length), other=0.0)  # fmt: skip
            part = tl.load(matrix + k[:, None] * rank + inner[None, :], mask=(k[:, None] < rank) & (inner[None, :] < rank), other=0.0)
            total = tl.dot(part, tile.to(COMPUTE), total, input_precision="ieee", out_dtype=COMPUTE)
        else:
            tile = tl.load(x + d[:, None] * stride_d + inner[None, :] * stride_k,
                           mask=(d[:, None] < length) & (inner[None, :] < rank), other=0.0)  # fmt: skip
            part = tl.load(matrix + inner[:, None] * rank + k[None, :], mask=(inner[:, None] < rank) & (k[None, :] < rank), other=0.0)
            total = tl.dot(tile.to(COMPUTE), part, total, input_precision="ieee", out_dtype=COMPUTE)
    return total


@triton.jit
def _mapped_tile(param, grad, exp_avg, exp_avg_sq, moved, scratch, grad_map, momentum_map, param_map, direction_map, start, rank, length,
                 p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, RANK_DIM: tl.constexpr,
                 HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_P_MAP: tl.constexpr, HAS_D_MAP: tl.constexpr,
                 HAS_M: tl.constexpr, HAS_V: tl.constexpr, MAXIMIZE: tl.constexpr, KEEP_MOVE: tl.constexpr, KEEP_NEW: tl.constexpr, FUSED: tl.constexpr,
                 R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """The step of BLOCK_D rows of the long dimension; returns the tile of the factor as stored, and how far it moved."""
    k = tl.arange(0, R)
    d = start + tl.arange(0, BLOCK_D)
    # The moments are contiguous in the parameter's own shape.
    if RANK_DIM == 0:
        m_k = length
        m_d = 1
        k_tile = k[:, None]
        d_tile = d[None, :]
        s_k = BLOCK_D
        s_d = 1
    else:
        m_k = 1
        m_d = rank
        k_tile = k[None, :]
        d_tile = d[:, None]
        s_k = 1
        s_d = R
    if VECTOR > 1:
        p_k = m_k
        p_d = m_d
        g_k = m_k
        g_d = m_d
    mapped_m = 0.0
    if HAS_G_MAP:
        g = _map_tile(grad_map, grad, k, d, rank, length, g_k, g_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
        if MAXIMIZE:
            g = -g
    else:
        g = _gradient(grad, k_tile * g_k + d_tile * g_d, (k_tile < rank) & (d_tile < length), MAXIMIZE, COMPUTE)
    if HAS_P_MAP:
        g += _map_tile(param_map, param, k, d, rank, length, p_k, p_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
    if HAS_M_MAP:
        mapped_m = _map_tile(momentum_map, exp_avg, k, d, rank, length, m_k, m_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
    if HAS_M_MAP or HAS_P_MAP:
        # Every thread must have read the old momentum and factor before any writes new ones over them.
        tl.debug_barrier()
    # Offsets are formed only now: during the products they would cost registers.
    mask = (k_tile < rank) & (d_tile < length)
    m_offset = k_tile * m_k + d_tile * m_d
    direction = _direction(exp_avg, exp_avg_sq, m_offset, mask, g, mapped_m, beta1, beta2, eps, correction, root_correction,
                           HAS_M_MAP, HAS_M, HAS_V, COMPUTE)  # fmt: skip
    if HAS_D_MAP:
        if FUSED:
            direction = tl.where(mask, direction, 0.0)
            square = k[:, None] * rank + k[None, :]
            matrix = tl.load(direction_map + square, mask=(k[:, None] < rank) & (k[None, :] < rank), other=0.0)
            if RANK_DIM == 0:
                direction = tl.dot(matrix, direction, input_precision="ieee", out_dtype=COMPUTE)
            else:
                direction = tl.dot(direction, matrix, input_precision="ieee", out_dtype=COMPUTE)
        else:
            local = tl.arange(0, BLOCK_D)
            tl.store(scratch + k_tile * s_k + (d_tile - start) * s_d, direction)
            tl.debug_barrier()
            direction = _map_tile(direction_map, scratch, k, local, rank, BLOCK_D, s_k, s_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
    new, was = _write(param, k_tile * p_k + d_tile * p_d, mask, direction, keep, rate, COMPUTE)
    # What lies outside may be 0/0.
    new = tl.where(mask, new.to(COMPUTE), 0.0)
    move = new - was.to(COMPUTE)
    if KEEP_MOVE:
        tl.store(moved + m_offset, move, mask=mask)
    if KEEP_NEW:
        tl.store(moved + rank * length + m_offset, new, mask=mask)
    return new, move


@triton.jit
def _mapped_rows(param, grad, exp_avg, exp_avg_sq, moved, scratch, partial, grad_map, momentum_map, param_map, direction_map, start, rank, length,
                 p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, RANK_DIM: tl.constexpr,
                 HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_P_MAP: tl.constexpr, HAS_D_MAP: tl.constexpr,
                 HAS_M: tl.constexpr, HAS_V: tl.constexpr, MAXIMIZE: tl.constexpr, KEEP_MOVE: tl.constexpr, KEEP_NEW: tl.constexpr, DRIFT: tl.constexpr,
                 FUSED: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
                 VECTOR: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """One tile of rows, or CHUNK rows with their share of the drift."""
    if DRIFT:
        drift = tl.zeros([R, R], COMPUTE)
        for first in range(start, tl.minimum(start + CHUNK, length), BLOCK_D):
            new, move = _mapped_tile(
                param, grad, exp_avg, exp_avg_sq, moved, scratch, grad_map, momentum_map, param_map, direction_map, first, rank, length,
                p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, RANK_DIM, HAS_G_MAP, HAS_M_MAP, HAS_P_MAP,
                HAS_D_MAP, HAS_M, HAS_V, MAXIMIZE, KEEP_MOVE, KEEP_NEW, FUSED, R, STEP, BLOCK_D, VECTOR, COMPUTE)  # fmt: skip
            if RANK_DIM == 0:
                drift = tl.dot(new, tl.trans(move), drift, input_precision="ieee", out_dtype=COMPUTE)
            else:
                drift = tl.dot(tl.trans(new), move, drift, input_precision="ieee", out_dtype=COMPUTE)
        i = tl.arange(0, R)[:, None]
        j = tl.arange(0, R)[None, :]
        tl.store(partial + i * rank + j, drift, mask=(i < rank) & (j < rank))
    else:
        _mapped_tile(
            param, grad, exp_avg, exp_avg_sq, moved, scratch, grad_map, momentum_map, param_map, direction_map, start, rank, length,
            p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, RANK_DIM, HAS_G_MAP, HAS_M_MAP, HAS_P_MAP,
            HAS_D_MAP, HAS_M, HAS_V, MAXIMIZE, KEEP_MOVE, KEEP_NEW, FUSED, R, STEP, BLOCK_D, VECTOR, COMPUTE)  # fmt: skip


@triton.jit(do_not_specialize=[*_SCALARS, "rank"])
def mapped_adamw_kernel(tensors, chunks, grad_maps, momentum_maps, param_maps, direction_maps, lr_pointer, step_pointer,
                        moves, scratch, partials, rank,
                        lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
                        step: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64,
                        correction1: tl.float64, correction2: tl.float64,
                        PARAM: tl.constexpr, COMPUTE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
                        HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_P_MAP: tl.constexpr, HAS_D_MAP: tl.constexpr,
                        HAS_M: tl.constexpr, HAS_V: tl.constexpr, BIAS_CORRECTION: tl.constexpr, MAXIMIZE: tl.constexpr,
                        KEEP_MOVE: tl.constexpr, KEEP_NEW: tl.constexpr, DRIFT: tl.constexpr, FUSED: tl.constexpr,
                        R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """With r×r maps: CHUNK rows of the long dimension per program, with all of the rank; DRIFT: their share of the drift.

    VECTOR > 1: all is contiguous and aligned, and that divides the rank and every length: so many elements are loaded at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    row = tensors + index * thin.COLUMNS
    param = tl.load(row + _PARAM).to(tl.pointer_type(PARAM))
    grad = tl.load(row + _GRAD).to(tl.pointer_type(PARAM))
    exp_avg = tl.load(row + _EXP_AVG).to(tl.pointer_type(COMPUTE))
    exp_avg_sq = tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(COMPUTE))
    rank_dim = tl.load(row + _RANK_DIM)
    length = tl.load(row + _LENGTH)
    p_k = tl.load(row + _P_K)
    p_d = tl.load(row + _P_D)
    g_k = tl.load(row + _G_K)
    g_d = tl.load(row + _G_D)
    if VECTOR > 1:  # known on the host, to be seen by the compiler
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        rank = rank // VECTOR * VECTOR
        length = length // VECTOR * VECTOR
    moved = moves
    if KEEP_MOVE:
        moved += tl.load(row + _ASIDE)
    square = index * rank * rank
    grad_map = grad_maps + square
    momentum_map = momentum_maps + square
    param_map = param_maps + square
    direction_map = direction_maps + square
    scratch += program * (R * BLOCK_D)
    rate, keep, correction, root_correction = _coefficients(
        lr, lr_pointer, step, step_pointer, tl.load(row + _MISSED), log2_beta1, log2_beta2, correction1, correction2, weight_decay,
        LR_ON_DEVICE, STEP_ON_DEVICE, BIAS_CORRECTION, COMPUTE)  # fmt: skip
    start = tl.load(chunks + 2 * program + 1) * CHUNK
    partial = partials + program * (rank * rank)
    if rank_dim == 0:
        _mapped_rows(
            param, grad, exp_avg, exp_avg_sq, moved, scratch, partial, grad_map, momentum_map, param_map, direction_map, start, rank, length,
            p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, 0, HAS_G_MAP, HAS_M_MAP, HAS_P_MAP,
            HAS_D_MAP, HAS_M, HAS_V, MAXIMIZE, KEEP_MOVE, KEEP_NEW, DRIFT, FUSED, R, STEP, BLOCK_D, CHUNK, VECTOR, COMPUTE)  # fmt: skip
    else:
        _mapped_rows(
            param, grad, exp_avg, exp_avg_sq, moved, scratch, partial, grad_map, momentum_map, param_map, direction_map, start, rank, length,
            p_k, p_d, g_k, g_d, beta1, beta2, eps, rate, keep, correction, root_correction, 1, HAS_G_MAP, HAS_M_MAP, HAS_P_MAP,
            HAS_D_MAP, HAS_M, HAS_V, MAXIMIZE, KEEP_MOVE, KEEP_NEW, DRIFT, FUSED, R, STEP, BLOCK_D, CHUNK, VECTOR, COMPUTE)  # fmt: skip


def _table(width: tl.constexpr, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
           missed: list[int]) -> tuple[NDArray[np.int64], list[bool], list[bool]]:  # fmt: skip
    """What the two tables have in common, by columns; which parameters are contiguous, with their gradients, and which are aligned as well."""
    columns = np.zeros((width, len(params)), dtype=np.int64)
    for column, tensors in ((_PARAM, params), (_GRAD, grads), (_EXP_AVG, exp_avgs), (_EXP_AVG_SQ, exp_avg_sqs)):
        columns[column] = addresses(tensors) or 0
    aligned = (columns % 16 == 0).all(axis=0).tolist()  # so far there are addresses alone
    columns[_MISSED] = missed or 0
    contiguous = [p.is_contiguous() and g.is_contiguous() for p, g in zip(params, grads, strict=True)]
    return columns, contiguous, [a and c for a, c in zip(aligned, contiguous, strict=True)]


def _flat_layout(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], missed: list[int]) -> Layout:
    vector = vector_length(params[0].dtype)
    columns, contiguous, aligned = _table(_WIDTH, params, grads, exp_avgs, exp_avg_sqs, missed)
    shapes = [
        (int(not aligned[i] or p.numel() % vector != 0), p.numel(), 0, 1, 0, 1) if contiguous[i] else (*p.shape, *p.stride(), *g.stride())
        for i, (p, g) in enumerate(zip(params, grads, strict=True))
    ]
    for column, values in zip((_ROWS, _COLUMNS, _P_I, _P_J, _G_I, _G_J), zip(*shapes, strict=True), strict=True):
        columns[column] = values
    return Layout(columns.T, [triton.cdiv(p.numel(), BLOCK) for p in params])


def _mapped_layout(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], rank_dims: list[int],
                   missed: list[int], chunk: int, copies: int) -> Layout:  # fmt: skip
    """``copies``: how many elements the step writes aside for each of a parameter. Its one fact: VECTOR."""
    lengths = [p.shape[1 - dim] for p, dim in zip(params, rank_dims, strict=True)]
    counts = [triton.cdiv(length, chunk) for length in lengths]
    columns, _, aligned = _table(thin.COLUMNS, params, grads, exp_avgs, exp_avg_sqs, missed)
    columns[_RANK_DIM], columns[_LENGTH], columns[thin.FIRST_CHUNK], columns[thin.CHUNKS] = rank_dims, lengths, first_chunks(counts), counts
    for tensors, along_rank, along_length in ((params, _P_K, _P_D), (grads, _G_K, _G_D)):
        columns[along_rank] = [x.stride(dim) for x, dim in zip(tensors, rank_dims, strict=True)]
        columns[along_length] = [x.stride(1 - dim) for x, dim in zip(tensors, rank_dims, strict=True)]
    columns[_ASIDE] = first_chunks([copies * p.numel() for p in params])
    vector = math.gcd(vector_length(params[0].dtype), params[0].shape[rank_dims[0]], *lengths)
    # In fp64 one of 8 bytes each; twice that would spill at rank 128.
    return Layout(columns.T, counts, (vector if all(aligned) and params[0].dtype != torch.float64 else 1,))


def block_d(rank: int, double: bool, heavy: int) -> int:
    """Rows of the long dimension per tile with maps; fewer for a ``heavy`` step (1: with T or D, or drifts; 2: both), which would spill."""
    padded = padded_rank(rank)
    if not heavy:
        return 64 if padded <= 32 else 32
    if padded <= 16:
        return 32 if double else 64
    if padded == 32:
        return 32 if heavy == 1 else 16
    return 16 if double or padded > 64 else 32


def _one_element(value: float | int | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def verify(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers) -> Verdict:
    """Refuses long strided tensors, strided tensors that are not matrices, ranks above 128, hyperparameters on another GPU."""
    params, grads, *_ = stepped
    verdict = device_verdict(params)
    if not verdict[0]:
        return verdict
    for name, value in (("lr", numbers.lr), ("step", numbers.step)):
        if isinstance(value, Tensor) and value.device != params[0].device and value.device.type != "cpu":
            return False, f"{name} is a tensor on {value.device}, the parameters are on {params[0].device}: reading it would wait for it"
        if not _one_element(value):
            return False, f"{name} must have one element"
    if rank := maps.rank(drifts):
        return verdict if rank <= LARGEST_RANK else (False, f"maps of rank {rank}: the kernel holds at most {LARGEST_RANK}")
    for x in (*params, *grads):
        if not x.is_contiguous():
            if x.ndim != 2:
                return False, f"a non-contiguous tensor with {x.ndim} dimensions; the kernel takes strides of matrices only"
            if x.numel() > _LARGEST_STRIDED:
                return False, "a non-contiguous tensor of more than 2^31 elements"
        elif x.numel() > _LARGEST_STRIDED and (x.data_ptr() % 16 or x.numel() % vector_length(x.dtype)):
            return False, "an unaligned tensor of more than 2^31 elements"
    return verdict


@implements("grouped_adamw_", "triton", verify)
def grouped_adamw_(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers) -> None:
    """One launch, in place, for the whole list (with ``drifts`` two, or three); see the reference for the formula.

    ``lr`` and ``step`` may be one-element tensors on the device: then the kernel reads them there; on the CPU they are read here. No
    hyperparameter is a compile-time constant, so schedules do not recompile.
    """
    moment_step(stepped, maps, rank_dims, drifts, numbers)


def moment_step(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers, diagonal: float = 0.0) -> None:
    """:func:`grouped_adamw_`; ``diagonal · I`` is added to the drifts."""
    params, grads, exp_avgs, exp_avg_sqs, _ = stepped
    lr, beta1, beta2, eps, weight_decay, step, missed, bias_correction, maximize = numbers
    first = params[0]
    lr, step = (value.item() if isinstance(value, Tensor) and value.device != first.device else value for value in (lr, step))
    key = (signature(params), signature(grads), addresses(exp_avgs), addresses(exp_avg_sqs), tuple(missed))
    lr_pointer = lr if isinstance(lr, Tensor) else None
    step_pointer = step if isinstance(step, Tensor) else None
    host_step = 0 if isinstance(step, Tensor) else step
    scalars = (
        0.0 if isinstance(lr, Tensor) else float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
        float(host_step),
        math.log2(beta1) if beta1 > 0 else -math.inf,
        math.log2(beta2) if beta2 > 0 else -math.inf,
        float(1 - beta1**host_step) if host_step else 1.0,
        float(1 - beta2**host_step) if host_step else 1.0,
    )
    options = {
        "PARAM": TL_DTYPE[first.dtype],
        "COMPUTE": TL_DTYPE[compute_dtype(first.dtype)],
        "LR_ON_DEVICE": lr_pointer is not None,
        "STEP_ON_DEVICE": step_pointer is not None,
        "HAS_M": bool(exp_avgs),
        "HAS_V": bool(exp_avg_sqs),
        "BIAS_CORRECTION": bias_correction,
        "MAXIMIZE": maximize,
    }
    # A pointer that a specialisation does not read still has to be one.
    if all(x is None for x in (*maps, drifts)):
        work = table("adamw", first.device, key, lambda: _flat_layout(params, grads, exp_avgs, exp_avg_sqs, missed))
        pointers = tuple(work.tensors if pointer is None else pointer for pointer in (lr_pointer, step_pointer))
        if work.programs:
            with on_device(first):
                launch(adamw_kernel, (work.programs,), work.tensors, work.chunks, *pointers, *scalars, **options,
                       VECTOR=vector_length(first.dtype), BLOCK=BLOCK, num_warps=8)  # fmt: skip
        return
    rank = first.shape[rank_dims[0]]
    heavy = (maps.param is not None or maps.direction is not None) + (drifts is not None)
    padded = padded_rank(rank)
    default = {"BLOCK_D": block_d(rank, first.dtype == torch.float64, heavy), "num_warps": 4 if padded <= (16 if heavy else 32) else 8}
    chosen = configuration("mapped_adamw_heavy" if heavy else "mapped_adamw", padded, (first.dtype,), first.device, default)
    rows = chosen["BLOCK_D"]
    fused = padded <= _LARGEST_FUSED
    chunk = rows * _DRIFT_TILES if fused and drifts is not None else rows
    compute = compute_dtype(first.dtype)
    keep_move = drifts is not None and not fused
    keep_new = keep_move and first.dtype != compute
    copies = (keep_move + keep_new) * sum(p.numel() for p in params)
    work = table(
        "mapped_adamw",
        first.device,
        (key, tuple(rank_dims), chunk, keep_new),
        lambda: _mapped_layout(params, grads, exp_avgs, exp_avg_sqs, rank_dims, missed, chunk, 2 if keep_new else 1),
    )
    pointers = tuple(work.tensors if pointer is None else pointer for pointer in (lr_pointer, step_pointer))
    given = [None if x is None else x.contiguous() for x in maps]
    some = next((x for x in given if x is not None), torch.empty(0, dtype=compute, device=first.device))
    moves = torch.empty(copies, dtype=compute, device=first.device) if copies else some
    shares = torch.empty(work.programs, rank, rank, dtype=compute, device=first.device) if fused and drifts is not None else some
    scratch = some
    if maps.direction is not None and not fused:
        scratch = torch.empty(work.programs, padded * rows, dtype=compute, device=first.device)
    with on_device(first):
        if work.programs:
            launch(mapped_adamw_kernel, (work.programs,), work.tensors, work.chunks, *(some if x is None else x for x in given),
                   *pointers, moves, scratch, shares, rank, *scalars, **options,
                   HAS_G_MAP=maps.grad is not None, HAS_M_MAP=maps.momentum is not None and bool(exp_avgs),
                   HAS_P_MAP=maps.param is not None, HAS_D_MAP=maps.direction is not None, KEEP_MOVE=keep_move, KEEP_NEW=keep_new,
                   DRIFT=drifts is not None and fused, FUSED=fused,
                   R=padded, STEP=16, CHUNK=chunk, VECTOR=work.facts[0], **chosen)  # fmt: skip
        if drifts is None:
            return
        target = drifts if drifts.is_contiguous() else torch.empty_like(drifts, memory_format=torch.contiguous_format)
        if not fused:
            work, shares = _products_with_moves(params, rank_dims, moves, rank, keep_new)
        launch_sum(work.tensors, len(params), shares, target, symmetric=False, diagonal=diagonal)
        if target is not drifts:
            drifts.copy_(target)


def _products_with_moves(params: list[Tensor], rank_dims: list[int], moves: Tensor, rank: int, has_new: bool) -> tuple[Table, Tensor]:
    """One launch: ``Xᵀ(X - X_old)`` of chunks of rows, from what the step has written; the table of the chunks comes with it."""
    sizes = [p.numel() for p in params for _ in range(2 if has_new else 1)]
    written = [x.view(p.shape) for x, p in zip(moves.split(sizes), [p for p in params for _ in range(2 if has_new else 1)], strict=True)]
    moved, new = (written[::2], written[1::2]) if has_new else (written, params)
    tall_new, tall_moved = ([x.mT if dim == 0 else x for x, dim in zip(xs, rank_dims, strict=True)] for xs in (new, moved))
    work = thin_table("mapped_adamw_drifts", tall_new, tall_moved, tall_new, GramSizes(rank, rank).CHUNK)
    shares = torch.empty(work.programs, rank * rank, dtype=moves.dtype, device=moves.device)
    if work.programs:
        launch_partials(work, shares, rank, rank, moves.dtype, symmetric=False)
    return work, shares
