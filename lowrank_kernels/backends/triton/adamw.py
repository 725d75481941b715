"""``grouped_adamw_``: the moment step of all parameters of a group in one launch.

Floor: each parameter element must be read and written (2·b bytes, b the parameter's element size), its gradient read
(b), each moment read and written (2·c each, c = 4, or 8 for fp64). fp32 with both moments: 28 bytes an element. The
kernel moves just that, plus 16 bytes of chunk table per 1024 elements; with maps also 2·c·r² per program, from L2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from ._device import scalar
from ._launch import TL_DTYPE, compute_dtype, device_verdict, launch, on_device, padded_rank
from ._tables import Layout, addresses, signature, table

#: Elements per program without maps: four per thread.
BLOCK = 1024
#: The longest tensor that is indexed element by element (rows and columns from 32-bit division).
_LARGEST_STRIDED = 2**31 - BLOCK
_LARGEST_RANK = {torch.float64: 64}
#: One row of the table: param, grad, exp_avg, exp_avg_sq, rows, columns, strides of param and grad, missed, flat/rank_dim.
COLUMNS = tl.constexpr(11)

_SCALARS = ["lr", "beta1", "beta2", "eps", "weight_decay", "step", "log2_beta1", "log2_beta2", "correction1", "correction2"]


@triton.jit
def _divide(x, y, COMPUTE: tl.constexpr):
    # `/` is approximate in fp32.
    if COMPUTE == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _root(x, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _coefficients(lr, lr_pointer, step, step_pointer, missed, log2_beta1, log2_beta2, correction1, correction2, weight_decay,
                  LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
                  COMPUTE: tl.constexpr):  # fmt: skip
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
def _step_tile(param, grad, exp_avg, exp_avg_sq, p_offset, g_offset, m_offset, mask, mapped_g, mapped_m, beta1, beta2, eps,
               rate, keep, correction, root_correction,
               HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_M: tl.constexpr, HAS_V: tl.constexpr,
               MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Moments, decay and write of one tile; mapped gradient and momentum come in where there are maps."""
    if HAS_G_MAP:
        g = mapped_g
    else:
        g = tl.load(grad + g_offset, mask=mask, other=0.0).to(COMPUTE)
    if MAXIMIZE:
        g = -g
    m = g
    if HAS_M:
        if HAS_M_MAP:
            old = mapped_m
        else:
            old = tl.load(exp_avg + m_offset, mask=mask, other=0.0)
        m = _momentum(old, g, beta1, COMPUTE)
        tl.store(exp_avg + m_offset, m, mask=mask)
    direction = _divide(m, correction, COMPUTE)
    if HAS_V:
        v = tl.load(exp_avg_sq + m_offset, mask=mask, other=0.0)
        v = v * scalar(beta2, COMPUTE) + scalar(1.0 - scalar(beta2, tl.float64), COMPUTE) * (g * g)
        tl.store(exp_avg_sq + m_offset, v, mask=mask)
        root = _divide(_root(v, COMPUTE), root_correction, COMPUTE)
        direction = _divide(direction, root + scalar(eps, COMPUTE), COMPUTE)
    x = tl.load(param + p_offset, mask=mask, other=0.0)
    x = x.to(COMPUTE) * keep - rate * direction
    tl.store(param + p_offset, x.to(param.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SCALARS)
def adamw_kernel(tensors, chunks, lr_pointer, step_pointer,
                 lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64, step: tl.float64,
                 log2_beta1: tl.float64, log2_beta2: tl.float64, correction1: tl.float64, correction2: tl.float64,
                 PARAM: tl.constexpr, COMPUTE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
                 HAS_M: tl.constexpr, HAS_V: tl.constexpr, BIAS_CORRECTION: tl.constexpr, MAXIMIZE: tl.constexpr,
                 VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Without maps: BLOCK consecutive elements per program."""
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program) * COLUMNS
    start = tl.load(chunks + 2 * program + 1) * BLOCK
    param = tl.load(row).to(tl.pointer_type(PARAM))
    grad = tl.load(row + 1).to(tl.pointer_type(PARAM))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(COMPUTE))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(COMPUTE))
    rows = tl.load(row + 4)
    columns = tl.load(row + 5)
    rate, keep, correction, root_correction = _coefficients(
        lr, lr_pointer, step, step_pointer, tl.load(row + 10), log2_beta1, log2_beta2, correction1, correction2, weight_decay,
        LR_ON_DEVICE, STEP_ON_DEVICE, BIAS_CORRECTION, COMPUTE)  # fmt: skip
    if rows == 0:
        # Contiguous, aligned, a multiple of VECTOR long (checked on the host): vector loads and stores.
        offset = start + tl.arange(0, BLOCK)
        mask = offset < tl.multiple_of(columns, VECTOR)
        _step_tile(tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16),
                   offset, offset, offset, mask, 0.0, 0.0, beta1, beta2, eps, rate, keep, correction, root_correction,
                   False, False, HAS_M, HAS_V, MAXIMIZE, COMPUTE)  # fmt: skip
    else:
        # 32-bit division: the host refuses strided tensors that are longer than that.
        flat = start.to(tl.int32) + tl.arange(0, BLOCK)
        i = flat // columns.to(tl.int32)
        j = flat % columns.to(tl.int32)
        p_offset = i * tl.load(row + 6) + j * tl.load(row + 7)
        g_offset = i * tl.load(row + 8) + j * tl.load(row + 9)
        _step_tile(param, grad, exp_avg, exp_avg_sq, p_offset, g_offset, flat, flat < rows * columns, 0.0, 0.0,
                   beta1, beta2, eps, rate, keep, correction, root_correction,
                   False, False, HAS_M, HAS_V, MAXIMIZE, COMPUTE)  # fmt: skip


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
def _mapped_step(param, grad, exp_avg, exp_avg_sq, grad_map, momentum_map, start, rank, length, p_k, p_d, g_k, g_d,
                 beta1, beta2, eps, rate, keep, correction, root_correction, RANK_DIM: tl.constexpr,
                 HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_M: tl.constexpr, HAS_V: tl.constexpr, MAXIMIZE: tl.constexpr,
                 R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    k = tl.arange(0, R)
    d = start + tl.arange(0, BLOCK_D)
    mapped_g = 0.0
    mapped_m = 0.0
    # The moments are contiguous in the parameter's own shape.
    if RANK_DIM == 0:
        m_k = length
        m_d = 1
    else:
        m_k = 1
        m_d = rank
    if HAS_G_MAP:
        mapped_g = _map_tile(grad_map, grad, k, d, rank, length, g_k, g_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
    if HAS_M_MAP:
        mapped_m = _map_tile(momentum_map, exp_avg, k, d, rank, length, m_k, m_d, RANK_DIM, R, STEP, BLOCK_D, COMPUTE)
        # Every thread must have read the old momentum before any writes the new one over it.
        tl.debug_barrier()
    if RANK_DIM == 0:
        k = k[:, None]
        d = d[None, :]
    else:
        k = k[None, :]
        d = d[:, None]
    _step_tile(param, grad, exp_avg, exp_avg_sq, k * p_k + d * p_d, k * g_k + d * g_d, k * m_k + d * m_d, (k < rank) & (d < length),
               mapped_g, mapped_m, beta1, beta2, eps, rate, keep, correction, root_correction,
               HAS_G_MAP, HAS_M_MAP, HAS_M, HAS_V, MAXIMIZE, COMPUTE)  # fmt: skip


@triton.jit(do_not_specialize=[*_SCALARS, "rank"])
def mapped_adamw_kernel(tensors, chunks, grad_maps, momentum_maps, lr_pointer, step_pointer, rank,
                        lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
                        step: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64,
                        correction1: tl.float64, correction2: tl.float64,
                        PARAM: tl.constexpr, COMPUTE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, STEP_ON_DEVICE: tl.constexpr,
                        HAS_G_MAP: tl.constexpr, HAS_M_MAP: tl.constexpr, HAS_M: tl.constexpr, HAS_V: tl.constexpr,
                        BIAS_CORRECTION: tl.constexpr, MAXIMIZE: tl.constexpr,
                        R: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """With r×r maps: BLOCK_D rows of the long dimension per program, with all of the rank."""
    program = tl.program_id(0)
    index = tl.load(chunks + 2 * program)
    row = tensors + index * COLUMNS
    start = tl.load(chunks + 2 * program + 1) * BLOCK_D
    param = tl.load(row).to(tl.pointer_type(PARAM))
    grad = tl.load(row + 1).to(tl.pointer_type(PARAM))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(COMPUTE))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(COMPUTE))
    rank_dim = tl.load(row + 4)
    length = tl.load(row + 5)
    p_k = tl.load(row + 6)
    p_d = tl.load(row + 7)
    g_k = tl.load(row + 8)
    g_d = tl.load(row + 9)
    grad_map = grad_maps + index * rank * rank
    momentum_map = momentum_maps + index * rank * rank
    rate, keep, correction, root_correction = _coefficients(
        lr, lr_pointer, step, step_pointer, tl.load(row + 10), log2_beta1, log2_beta2, correction1, correction2, weight_decay,
        LR_ON_DEVICE, STEP_ON_DEVICE, BIAS_CORRECTION, COMPUTE)  # fmt: skip
    if rank_dim == 0:
        _mapped_step(param, grad, exp_avg, exp_avg_sq, grad_map, momentum_map, start, rank, length, p_k, p_d, g_k, g_d,
                     beta1, beta2, eps, rate, keep, correction, root_correction, 0,
                     HAS_G_MAP, HAS_M_MAP, HAS_M, HAS_V, MAXIMIZE, R, STEP, BLOCK_D, COMPUTE)  # fmt: skip
    else:
        _mapped_step(param, grad, exp_avg, exp_avg_sq, grad_map, momentum_map, start, rank, length, p_k, p_d, g_k, g_d,
                     beta1, beta2, eps, rate, keep, correction, root_correction, 1,
                     HAS_G_MAP, HAS_M_MAP, HAS_M, HAS_V, MAXIMIZE, R, STEP, BLOCK_D, COMPUTE)  # fmt: skip


def _fields(values: list[Tensor], count: int) -> list[int]:
    return list(addresses(values)) if values else [0] * count


def _flat_layout(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], missed: list[int]) -> Layout:
    vector = _vector(params[0].dtype)
    rows = []
    first, second = _fields(exp_avgs, len(params)), _fields(exp_avg_sqs, len(params))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        pointers = (p.data_ptr(), g.data_ptr(), first[i], second[i])
        skipped = missed[i] if missed else 0
        contiguous = p.is_contiguous() and g.is_contiguous()
        if contiguous and p.numel() % vector == 0 and all(pointer % 16 == 0 for pointer in pointers):
            rows.append((*pointers, 0, p.numel(), 0, 1, 0, 1, skipped))
        elif contiguous:
            rows.append((*pointers, 1, p.numel(), 0, 1, 0, 1, skipped))
        else:
            rows.append((*pointers, *p.shape, *p.stride(), *g.stride(), skipped))
    return Layout(rows, [triton.cdiv(p.numel(), BLOCK) for p in params])


def _mapped_layout(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], rank_dims: list[int],
                   missed: list[int], block_d: int) -> Layout:  # fmt: skip
    first, second = _fields(exp_avgs, len(params)), _fields(exp_avg_sqs, len(params))
    rows, chunks = [], []
    for i, (p, g, dim) in enumerate(zip(params, grads, rank_dims, strict=True)):
        length = p.shape[1 - dim]
        strides = (p.stride(dim), p.stride(1 - dim), g.stride(dim), g.stride(1 - dim))
        rows.append((p.data_ptr(), g.data_ptr(), first[i], second[i], dim, length, *strides, missed[i] if missed else 0))
        chunks.append(triton.cdiv(length, block_d))
    return Layout(rows, chunks)


def _vector(dtype: torch.dtype) -> int:
    """Elements of the widest vector load of the narrowest operand: 16 bytes."""
    return 16 // dtype.itemsize


def block_d(rank: int, dtype: torch.dtype) -> int:
    """Rows of the long dimension per program with maps."""
    rows = 64 if padded_rank(rank) <= 32 else 32
    return rows // 2 if dtype == torch.float64 else rows


def _one_element(value: float | int | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def verify(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_maps: Tensor | None,
    momentum_maps: Tensor | None,
    rank_dims: list[int],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    missed: list[int],
    bias_correction: bool,
    maximize: bool,
) -> Verdict:
    """Refuses long strided tensors, strided tensors that are not matrices, ranks above 128 (fp64: 64), hyperparameters elsewhere."""
    verdict = device_verdict(params)
    if not verdict[0]:
        return verdict
    for name, value in (("lr", lr), ("step", step)):
        if isinstance(value, Tensor) and value.device != params[0].device:
            return False, f"{name} is a tensor on {value.device}, the parameters are on {params[0].device}: reading it would wait for it"
        if not _one_element(value):
            return False, f"{name} must have one element"
    if grad_maps is not None or momentum_maps is not None:
        rank = params[0].shape[rank_dims[0]]
        largest = _LARGEST_RANK.get(params[0].dtype, 128)
        if rank > largest:
            return False, f"maps of rank {rank} in {params[0].dtype}: the kernel holds at most {largest}"
        return verdict
    for x in (*params, *grads):
        if not x.is_contiguous():
            if x.ndim != 2:
                return False, f"a non-contiguous tensor with {x.ndim} dimensions; the kernel takes strides of matrices only"
            if x.numel() > _LARGEST_STRIDED:
                return False, "a non-contiguous tensor of more than 2^31 elements"
        elif x.numel() > _LARGEST_STRIDED and (x.data_ptr() % 16 or x.numel() % _vector(x.dtype)):
            return False, "an unaligned tensor of more than 2^31 elements"
    return verdict


@implements("grouped_adamw_", "triton", verify)
def grouped_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_maps: Tensor | None,
    momentum_maps: Tensor | None,
    rank_dims: list[int],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    missed: list[int],
    bias_correction: bool,
    maximize: bool,
) -> None:
    """One launch, in place, for the whole list; see the reference for the formula.

    ``lr`` and ``step`` may be one-element tensors on the device: then the kernel reads them there. No hyperparameter is
    a compile-time constant, so schedules do not recompile.
    """
    first = params[0]
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
    if grad_maps is None and momentum_maps is None:
        work = table("adamw", first.device, key, lambda: _flat_layout(params, grads, exp_avgs, exp_avg_sqs, missed))
    else:
        rank = first.shape[rank_dims[0]]
        rows = block_d(rank, first.dtype)
        work = table(
            "mapped_adamw",
            first.device,
            (key, tuple(rank_dims)),
            lambda: _mapped_layout(params, grads, exp_avgs, exp_avg_sqs, rank_dims, missed, rows),
        )
    if not work.programs:
        return
    # A pointer that a specialisation does not read still has to be one.
    pointers = tuple(work.tensors if pointer is None else pointer for pointer in (lr_pointer, step_pointer))
    with on_device(first):
        if grad_maps is None and momentum_maps is None:
            launch(adamw_kernel, (work.programs,), work.tensors, work.chunks, *pointers, *scalars, **options,
                   VECTOR=_vector(first.dtype), BLOCK=BLOCK, num_warps=8)  # fmt: skip
            return
        maps = [None if maps is None else maps.contiguous() for maps in (grad_maps, momentum_maps)]
        some = maps[0] if maps[0] is not None else maps[1]
        padded = padded_rank(rank)
        launch(mapped_adamw_kernel, (work.programs,), work.tensors, work.chunks, *(some if m is None else m for m in maps),
               *pointers, rank, *scalars, **options,
               HAS_G_MAP=grad_maps is not None, HAS_M_MAP=momentum_maps is not None and bool(exp_avgs),
               R=padded, STEP=16, BLOCK_D=rows, num_warps=4 if padded <= 32 else 8)  # fmt: skip
