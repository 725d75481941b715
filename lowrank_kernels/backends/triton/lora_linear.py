"""``lora_linear`` forward and backward: the adapter's thin products in Triton, split at the rank-r activations; W0 by cuBLAS.

Forward: ``H = x̃ [A; Q_Aᵀ]ᵀ`` (one read of x, both factors by pointer), ``y = x W0ᵀ + bias`` (torch), ``y += s H [Q_B B]ᵀ``
(one read and write of y). Backward: ``P = ∂y [Q_B B]`` and ``∂B = s ∂yᵀ H₂`` in one read of ∂y, ``∂x = ∂y W0`` (torch),
``∂x += s mask∘(P [A; Q_Aᵀ])/keep``, ``∂A = s P₁ᵀ x̃``. Sums over tokens or columns are split into partial sums, which are added in a fixed order.
Dropout is by a seed, from which each kernel computes the mask of its own tile (``dropout.py``), or by a mask in memory.

Floor of the adapter's part, with b bytes an element and t tokens: forward ``b·t·(d_in + 2·d_out)`` (x once, y twice), backward
``b·t·(d_out + 2·d_in)`` for P, ∂B and ∂x, ``b·t·d_in`` for ∂A; factors and activations of width r are small.

fp32 inputs multiply in fp32 (``input_precision="ieee"``, on CUDA cores), never in tf32, whose operands keep 10 bits. ``"tf32x3"``, three tf32
products on tensor cores, was not taken: it loses the last two bits or so, and at small ranks these products wait for memory either way.
bf16 and fp16 use tensor cores with fp32 sums.
With a core R the projections are kept in fp32 (``H = x̃ Aᵀ``, ``P = ∂y B``: what ``∂R = s PᵀH`` sums) and multiplied by R in the same launch,
while they are in registers; H Rᵀ and P R then go on in the dtype of x, as plain LoRA's activations do.

The interpreter's ``tl.dot`` is wrong for bf16 (Triton 3.9), so there operands are widened first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import compute_dtype
from ..registry import Verdict, implements
from ._device import scalar
from ._launch import INTERPRET, TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._tuned import configuration
from .dropout import NOTHING, Drop, dropped, what_drops

_LARGEST_RANK = 128
#: Programs that fill a large GPU; sums over tokens are split until there are about as many.
_FILL = 512


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _load_factor(pointer, d, k, length, rank, stride_d, stride_k, BY_RANK: tl.constexpr):
    """A (d, k) tile of a factor; BY_RANK: it is stored (r, d), so it is read along d and transposed."""
    if BY_RANK:
        tile = tl.load(pointer + k[:, None] * stride_k + d[None, :] * stride_d, mask=(k[:, None] < rank) & (d[None, :] < length), other=0.0)
        return tl.trans(tile)
    else:
        return tl.load(pointer + d[:, None] * stride_d + k[None, :] * stride_k, mask=(d[:, None] < length) & (k[None, :] < rank), other=0.0)


@triton.jit(do_not_specialize=["tokens", "limit", "factor"])
def project_kernel(x, drop, first, second, out_first, out_second, tokens, length, rank, x_t, x_d, first_d, first_k, second_d, second_k,
                   limit, factor: tl.float64, DROP: tl.constexpr, TWO: tl.constexpr, MIXED: tl.constexpr, BY_RANK: tl.constexpr,
                   COMPUTE: tl.constexpr, UPCAST: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """``factor · x̃ F₁`` and, TWO, ``… F₂`` in one read of x (tokens, length), of which x̃ is what is not dropped; F (length, r) by strides.

    MIXED: ``second`` is (r, r), and the second result is the first one times it.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, R)
    rows = t.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_T, R], COMPUTE)
    other = tl.zeros([BLOCK_T, R], COMPUTE)
    for start in range(0, length, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t[:, None] < tokens) & (d[None, :] < length)
        tile = tl.load(x + rows * x_t + d[None, :] * x_d, mask=inside, other=0.0)
        tile = dropped(tile, drop, t, start, inside, length, limit, DROP, BLOCK_T, BLOCK_D)
        total = _dot(tile, _load_factor(first, d, k, length, rank, first_d, first_k, BY_RANK), total, UPCAST)
        if TWO:
            other = _dot(tile, _load_factor(second, d, k, length, rank, second_d, second_k, BY_RANK), other, UPCAST)
    target = rows * rank + k[None, :]
    inside = (t[:, None] < tokens) & (k[None, :] < rank)
    tl.store(out_first + target, (total * scalar(factor, COMPUTE)).to(out_first.dtype.element_ty), mask=inside)
    if TWO:
        tl.store(out_second + target, (other * scalar(factor, COMPUTE)).to(out_second.dtype.element_ty), mask=inside)
    if MIXED:
        total *= scalar(factor, COMPUTE)
        for start in range(0, R, BLOCK_K):
            n = start + tl.arange(0, BLOCK_K)
            mix = tl.load(second + k[:, None] * second_d + n[None, :] * second_k, mask=(k[:, None] < rank) & (n[None, :] < rank), other=0.0)
            mixed = tl.dot(total, mix, input_precision="ieee", out_dtype=COMPUTE)
            tl.store(
                out_second + rows * rank + n[None, :],
                mixed.to(out_second.dtype.element_ty),
                mask=(t[:, None] < tokens) & (n[None, :] < rank),
            )


@triton.jit(do_not_specialize=["tokens", "limit", "factor"])
def expand_kernel(y, base, drop, first_h, second_h, first, second, tokens, length, rank, first_h_t, second_h_t,
                  first_d, first_k, second_d, second_k, limit, factor: tl.float64, HAS_BASE: tl.constexpr, DROP: tl.constexpr, TWO: tl.constexpr, BY_RANK: tl.constexpr,
                  COMPUTE: tl.constexpr, UPCAST: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``y = base + factor · (H₁ F₁ᵀ + H₂ F₂ᵀ)``, the product less its dropped entries, for contiguous y and base (tokens, length), H (tokens, r)
    with contiguous rows, F (length, r) by strides; ``base`` may be y."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, R)
    rows = t.to(tl.int64)[:, None]
    inside = (t[:, None] < tokens) & (k[None, :] < rank)
    hidden = tl.load(first_h + rows * first_h_t + k[None, :], mask=inside, other=0.0)
    total = tl.zeros([BLOCK_T, BLOCK_D], COMPUTE)
    total = _dot(hidden, tl.trans(_load_factor(first, d, k, length, rank, first_d, first_k, BY_RANK)), total, UPCAST)
    if TWO:
        hidden = tl.load(second_h + rows * second_h_t + k[None, :], mask=inside, other=0.0)
        total = _dot(hidden, tl.trans(_load_factor(second, d, k, length, rank, second_d, second_k, BY_RANK)), total, UPCAST)
    total *= scalar(factor, COMPUTE)
    target = rows * length + d[None, :]
    inside = (t[:, None] < tokens) & (d[None, :] < length)
    total = dropped(total, drop, t, tl.program_id(1) * BLOCK_D, inside, length, limit, DROP, BLOCK_T, BLOCK_D)
    if HAS_BASE:
        total += tl.load(base + target, mask=inside, other=0.0).to(COMPUTE)
    tl.store(y + target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "per_split", "limit", "factor"])
def token_sum_kernel(hidden, x, drop, out, tokens, length, rank, per_split, hidden_t, x_t, x_d, out_d, out_k, limit, factor: tl.float64,
                     DROP: tl.constexpr, COMPUTE: tl.constexpr, UPCAST: tl.constexpr, R: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``factor · Σ_t H[t, k] x̃[t, d]`` over one split of the tokens; ``out`` is the result or partial sums (split, …)."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    k = tl.arange(0, R)
    total = tl.zeros([R, BLOCK_D], COMPUTE)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = t.to(tl.int64)[:, None]
        inside = (t[:, None] < tokens) & (d[None, :] < length)
        tile = tl.load(x + rows * x_t + d[None, :] * x_d, mask=inside, other=0.0)
        tile = dropped(tile, drop, t, tl.program_id(0) * BLOCK_D, inside, length, limit, DROP, BLOCK_T, BLOCK_D)
        h = tl.load(hidden + rows * hidden_t + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < rank), other=0.0)
        total = _dot(tl.trans(h), tile, total, UPCAST)
    target = out + split.to(tl.int64) * rank * length + k[:, None] * out_k + d[None, :] * out_d
    total *= scalar(factor, COMPUTE)
    tl.store(target, total.to(out.dtype.element_ty), mask=(k[:, None] < rank) & (d[None, :] < length))


@triton.jit(do_not_specialize=["tokens", "per_split"])
def output_grads_kernel(hidden, grad, first, second, sums, out_first, out_second, tokens, length, rank, per_split, hidden_t, grad_t, grad_d,
                        first_d, first_k, second_d, second_k, TWO: tl.constexpr, COMPUTE: tl.constexpr, UPCAST: tl.constexpr,
                        R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Partial sums of ``∂yᵀ H`` (split, length, r), ``∂y F₁`` and, TWO, ``∂y F₂`` (columns, tokens, r), in one read of ∂y (tokens, length).

    A program holds some columns of ∂y for the tokens of one split; F (length, r) by strides.
    """
    column, split = tl.program_id(0), tl.program_id(1)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, R)
    total = tl.zeros([R, BLOCK_D], COMPUTE)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = t.to(tl.int64)[:, None]
        tile = tl.load(grad + rows * grad_t + d[None, :] * grad_d, mask=(t[:, None] < tokens) & (d[None, :] < length), other=0.0)
        inside = (t[:, None] < tokens) & (k[None, :] < rank)
        h = tl.load(hidden + rows * hidden_t + k[None, :], mask=inside, other=0.0)
        total = _dot(tl.trans(h), tile, total, UPCAST)
        target = (column.to(tl.int64) * tokens + rows) * rank + k[None, :]
        # Factors are read again for every tile, from cache: kept in registers, they would spill on sm_80.
        factor = _load_factor(first, d, k, length, rank, first_d, first_k, False)
        tl.store(out_first + target, _dot(tile, factor, tl.zeros([BLOCK_T, R], COMPUTE), UPCAST), mask=inside)
        if TWO:
            factor = _load_factor(second, d, k, length, rank, second_d, second_k, False)
            tl.store(out_second + target, _dot(tile, factor, tl.zeros([BLOCK_T, R], COMPUTE), UPCAST), mask=inside)
    target = sums + split.to(tl.int64) * rank * length + d[None, :] * rank + k[:, None]
    tl.store(target, total, mask=(k[:, None] < rank) & (d[None, :] < length))


@triton.jit(do_not_specialize=["splits", "factor"])
def add_splits_kernel(partials, out, splits, size, factor: tl.float64, BLOCK: tl.constexpr):
    """``out = factor · Σ_split partials[split]``, in order."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(partials + offset, mask=offset < size, other=0.0)
        partials += size  # the product with a split's number may exceed 32 bits
    tl.store(out + offset, (total * scalar(factor, partials.dtype.element_ty)).to(out.dtype.element_ty), mask=offset < size)


class _Kinds:
    """Constants of one kernel (a name of ``_tuned.KNOBS``) for one rank and dtype: those of the device's table, else of a heuristic."""

    def __init__(self, kernel: str, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.R = padded_rank(rank)
        wide = dtype in (torch.float32, torch.float64)
        block_t = 64 if self.R <= 32 and not wide else 32
        block_d = 64 if self.R <= 64 else 32
        if wide:
            block_d = 32 if self.R <= 64 else 16
        if self.R > 64 and dtype == torch.float64:
            block_t = 16
        default = {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 8}
        if kernel == "output_grads":
            default |= {"BLOCK_D": 4 * block_d, "num_stages": 2}
        chosen = configuration(kernel, self.R, (dtype,), device, default)
        self.BLOCK_T, self.BLOCK_D = chosen["BLOCK_T"], chosen["BLOCK_D"]
        self.options = {"COMPUTE": TL_DTYPE[compute_dtype(dtype)], "UPCAST": INTERPRET and not wide, "R": self.R, **chosen}


def _addressable(x: Tensor) -> Tensor:
    """``x`` (tokens, length), by contiguous rows where the offsets of a row's entries do not fit the kernels' 32 bits."""
    return x if x.shape[1] * x.stride(1) < 1 << 31 else x.contiguous()


def _near(factor: Tensor) -> Tensor:
    """A factor, without gaps where an offset in it does not fit the kernels' 32 bits (part of a matrix of more than 2³¹ entries)."""
    (d, rank), (stride_d, stride_k) = factor.shape, factor.stride()
    return factor if d * stride_d + rank * stride_k < 1 << 31 else factor.contiguous()


def project(
    x: Tensor, drop: Drop | None, factor: float, first: Tensor, second: Tensor | None, by_rank: bool, mix: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``P₁ = factor · x̃ F₁`` and P₂ likewise, (tokens, r) each, for factors (d, r) (views of (r, d) ones: ``by_rank``).

    With ``mix`` (r, r) instead of F₂: P₁ in the dtype of ``mix``, and ``P₁ · mix`` in that of x.
    """
    x, first, second = _addressable(x), _near(first), None if second is None else _near(second)
    tokens, length = x.shape
    rank = first.shape[1]
    kinds = _Kinds("project", rank, x.dtype, x.device)
    out = x.new_empty(tokens, rank, dtype=x.dtype if mix is None else mix.dtype)
    second = second if mix is None else mix
    other = None if second is None else x.new_empty(tokens, rank)
    source, how, limit = drop or Drop(x, NOTHING, 0)
    if tokens:
        launch(project_kernel, (triton.cdiv(tokens, kinds.BLOCK_T),), x, source, first, first if second is None else second,
               out, out if other is None else other, tokens, length, rank, *x.stride(), *first.stride(),
               *(first if second is None else second).stride(), limit, factor, DROP=how,
               TWO=second is not None and mix is None, MIXED=mix is not None, BY_RANK=by_rank, BLOCK_K=16, **kinds.options)  # fmt: skip
    return out, other


def _in_rows(hidden: Tensor) -> Tensor:
    """H (tokens, r) as the kernels read it: by rows without gaps."""
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def expand(y: Tensor, base: Tensor | None, drop: Drop | None, factor: float, first_h: Tensor, first: Tensor, second_h: Tensor | None,
           second: Tensor | None, by_rank: bool) -> None:  # fmt: skip
    """``y = base + factor · (H₁F₁ᵀ + H₂F₂ᵀ)``, the product less what ``drop`` drops; a base of None is zero, and y itself may be it."""
    tokens, length = y.shape
    first_h, second_h = _in_rows(first_h), None if second_h is None else _in_rows(second_h)
    first, second = _near(first), None if second is None else _near(second)
    kinds = _Kinds("expand", first.shape[1], first.dtype, first.device)
    if second_h is None or second is None:
        second_h, second, two = first_h, first, False
    else:
        two = True
    source, how, limit = drop or Drop(y, NOTHING, 0)
    if tokens:
        launch(expand_kernel, (triton.cdiv(tokens, kinds.BLOCK_T), triton.cdiv(length, kinds.BLOCK_D)), y, y if base is None else base,
               source, first_h, second_h, first, second, tokens, length, first.shape[1], first_h.stride(0),
               second_h.stride(0), *first.stride(), *second.stride(), limit, factor, HAS_BASE=base is not None, DROP=how, TWO=two,
               BY_RANK=by_rank, **kinds.options)  # fmt: skip


def token_sum(hidden: Tensor, x: Tensor, drop: Drop | None, factor: float, out: Tensor, out_d: int, out_k: int) -> Tensor:
    """``factor · Σ_t H[t, k] x̃[t, d]`` into ``out``, contiguous, whose strides for d and k are given."""
    x, hidden = _addressable(x), _in_rows(hidden)
    tokens, length = x.shape
    rank = hidden.shape[1]
    kinds = _Kinds("token_sum", rank, x.dtype, x.device)
    columns = triton.cdiv(length, kinds.BLOCK_D)
    splits = max(1, min(triton.cdiv(_FILL, columns), tokens // (4 * kinds.BLOCK_T)))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), kinds.BLOCK_T) * kinds.BLOCK_T
    target = out if splits == 1 else out.new_empty(splits, out.numel(), dtype=compute_dtype(out.dtype))
    source, how, limit = drop or Drop(x, NOTHING, 0)
    launch(token_sum_kernel, (columns, splits), hidden, x, source, target, tokens, length, rank, per_split, hidden.stride(0),
           *x.stride(), out_d, out_k, limit, factor if splits == 1 else 1.0, DROP=how, **kinds.options)  # fmt: skip
    return out if splits == 1 else _add_splits(target, out, factor)


def _add_splits(partials: Tensor, out: Tensor, factor: float) -> Tensor:
    """``factor · Σ partials[i]`` into ``out``, contiguous."""
    launch(add_splits_kernel, (triton.cdiv(out.numel(), 1024),), partials, out, len(partials), out.numel(), factor, BLOCK=1024, num_warps=4)
    return out


def output_grads(
    grad: Tensor, hidden: Tensor, first: Tensor, second: Tensor | None, factor: float, factor_b: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``factor·∂y F₁``, ``factor·∂y F₂`` (tokens, r) and ``factor_b·∂yᵀ H`` (d_out, r).

    In one read of ∂y where the partial sums, written and read in fp32 for every ``columns`` columns, are less than the read that it saves.
    """
    grad, hidden = _addressable(grad), _in_rows(hidden)
    tokens, length = grad.shape
    rank = hidden.shape[1]
    kinds = _Kinds("output_grads", rank, grad.dtype, grad.device)
    columns = kinds.BLOCK_D
    first, second = _near(first), None if second is None else _near(second)
    factors = 1 if second is None else 2
    if not tokens or 2 * compute_dtype(grad.dtype).itemsize * kinds.R * factors > 0.75 * columns * grad.dtype.itemsize:
        through_first, through_second = project(grad, None, factor, first, second, False)
        return through_first, through_second, token_sum(hidden, grad, None, factor_b, grad.new_empty(length, rank), rank, 1)
    across = triton.cdiv(length, columns)
    splits = max(1, min(triton.cdiv(_FILL, across), tokens // (4 * kinds.BLOCK_T)))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), kinds.BLOCK_T) * kinds.BLOCK_T
    wide = {"dtype": compute_dtype(grad.dtype), "device": grad.device}
    sums, partials = torch.empty(splits, length, rank, **wide), [torch.empty(across, tokens, rank, **wide) for _ in range(factors)]
    other = first if second is None else second
    launch(output_grads_kernel, (across, splits), hidden, grad, first, other, sums, partials[0], partials[-1], tokens, length, rank, per_split,
           hidden.stride(0), *grad.stride(), *first.stride(), *other.stride(), TWO=second is not None,
           **kinds.options)  # fmt: skip
    through = [_add_splits(partial, grad.new_empty(tokens, rank), factor) for partial in partials]
    return through[0], None if second is None else through[1], _add_splits(sums, grad.new_empty(length, rank), factor_b)


def call_verdict(x: Tensor, others: tuple[Tensor | None, ...], rank: int) -> Verdict:
    if rank > _LARGEST_RANK:
        return False, f"rank {rank}: the kernels hold at most {_LARGEST_RANK}"
    for other in others:
        if other is not None and other.dtype != x.dtype:
            return False, f"mixed dtypes ({other.dtype} with {x.dtype})"
    return device_verdict([x])


def verify(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    scale: float,
    mask: Tensor | None,
    keep: float,
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> Verdict:
    """Refuses ranks above 128, mixed dtypes, and other devices than a GPU."""
    return call_verdict(x, (weight, bias, a, b, q_a, q_b), a.shape[0])


@implements("lora_linear", "triton", verify)
def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    scale: float,
    mask: Tensor | None,
    keep: float,
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two launches and one cuBLAS GEMM; see the module's text, and the reference for the formula."""
    decoupled, drop = q_a is not None and q_b is not None, what_drops(mask, seed, keep)
    with on_device(x):
        if decoupled:
            assert q_a is not None and q_b is not None
            first, hidden = project(x, drop, 1.0 / keep, a.mT, q_a.mT, True)
            assert hidden is not None
        elif core is not None:
            hidden, first = project(x, drop, 1.0 / keep, a.mT, None, True, mix=core.mT)
        else:
            first, _ = project(x, drop, 1.0 / keep, a.mT, None, True)
            hidden = first
        base = None if weight is None else F.linear(x, weight, bias).contiguous()
        y = x.new_empty(x.shape[0], b.shape[0]) if base is None else base
        if decoupled:
            assert q_b is not None
            expand(y, base, None, scale, first, q_b, hidden, b, False)
        else:
            expand(y, base, None, scale, first, b, None, None, False)
    return y, hidden


def verify_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    hidden: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    needs: list[bool],
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> Verdict:
    """Refuses ranks above 128, mixed dtypes, and other devices than a GPU."""
    return call_verdict(grad, (x, weight, a, b, q_a, q_b, hidden if core is None else None), a.shape[0])


@implements("lora_linear_backward", "triton", verify_backward)
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    hidden: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    needs: list[bool],
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, and no product for any other; see the reference for the formulas."""
    need_x, need_weight, need_bias, need_a, need_b, *need_more = needs
    need_core = any(need_more)
    out: list[Tensor] = []
    grad_b, drop = None, what_drops(mask, seed, keep)
    with on_device(grad):
        if core is None and need_b and (need_x or need_a):
            second = b if need_x and q_b is not None else None
            through_a, through_b, grad_b = output_grads(grad, hidden, b if q_b is None else q_b, second, 1.0, scale)
        elif need_x and q_a is not None and q_b is not None:
            through_a, through_b = project(grad, None, 1.0, q_b, b, False)
        elif core is not None and (need_x or need_a or need_core):
            on_b, through_a = project(grad, None, 1.0, b, None, False, mix=core)
            through_b = None
        elif need_x or need_a:
            through_a, through_b = project(grad, None, 1.0, b if q_b is None else q_b, None, False)
        if need_x:
            base = None if weight is None else (grad @ weight).contiguous()
            grad_x = grad.new_empty(grad.shape[0], a.shape[1]) if base is None else base
            expand(grad_x, base, drop, scale / keep, through_a, a.mT, through_b, None if q_a is None else q_a.mT, True)
            out.append(grad_x)
        if need_weight:
            out.append(grad.mT @ x)
        if need_bias:
            out.append(grad.sum(dim=0))
        if need_a:
            rank, d_in = a.shape
            out.append(token_sum(through_a, x, drop, scale / keep, grad.new_empty(rank, d_in), 1, d_in))
        if grad_b is not None:
            out.append(grad_b)
        elif need_b:
            d_out, rank = b.shape
            on_a = hidden if core is None else (hidden @ core.mT).to(grad.dtype)
            out.append(token_sum(on_a, grad, None, scale, grad.new_empty(d_out, rank), rank, 1))
        if need_core:
            out.append(token_sum(on_b, hidden, None, scale, core.new_empty(core.shape), 1, len(core)))
    return out
