"""``lora_linear`` on the CPU: the base is torch's own GEMM; what the adapter adds, one call into compiled code, and so its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import dropped
from ..extension import csrc
from ..reference.dropout import dropout_mask
from ..registry import Verdict, count_launch, implements
from ._common import COMPILED

#: Above it torch's GEMMs, which pack both of their factors, are as fast.
LARGEST_RANK = 32


def adapter_verdict(x: Tensor, rank: int, largest: int) -> Verdict:
    """Refuses other devices than the CPU, other dtypes than fp32 and fp64, and more than ``largest`` ranks."""
    reason = None if x.device.type == "cpu" else f"it is written for CPU tensors, these are on {x.device.type}"
    if reason is None and x.dtype not in (torch.float32, torch.float64):
        reason = f"it is written for fp32 and fp64, x is {x.dtype}; torch's own GEMMs are used"
    if reason is None and rank > largest:
        reason = f"r = {rank}: above {largest} torch's own GEMMs are as fast"
    return (False, reason) if reason is not None else (True, f"torch's GEMM for the base, {COMPILED} for the adapter")


def _verify(x: Tensor, a: Tensor, core: Tensor | None) -> Verdict:
    if core is not None:
        return False, "a layer with a core is small products, for which torch's own GEMMs are used"
    return adapter_verdict(x, a.shape[0], LARGEST_RANK)


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
    """Takes fp32 and fp64 without a core, up to rank 32."""
    return _verify(x, a, core)


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
    """As :func:`verify`."""
    return _verify(grad, a, core)


@implements("lora_linear", "native", verify)
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
    """See the reference."""
    count_launch()
    if seed is not None:
        mask = dropout_mask(seed, *x.shape, keep)
    y = x.new_zeros(x.shape[0], b.shape[0]) if weight is None else F.linear(x, weight, bias)
    hidden = x.new_empty(x.shape[0], a.shape[0])
    downs, ups = ([a], [b]) if q_a is None or q_b is None else ([a, q_a], [q_b, b])
    factors = dense(downs), dense(ups)
    through = [*[None] * (len(downs) - 1), hidden]  # that of the last pair, which B goes up from
    csrc.adapter_forward(dropped(x, mask, keep).contiguous(), *factors, scale, y, through, torch.get_num_threads())
    return y, hidden


@implements("lora_linear_backward", "native", verify_backward)
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
    """See the reference."""
    count_launch()
    need_x, need_weight, need_bias, need_a, need_b, *_ = needs
    if seed is not None and (need_x or need_a):
        mask = dropout_mask(seed, grad.shape[0], a.shape[1], keep)
    grad = grad.contiguous()
    # ∂A needs the first pair alone, that of x both.
    downs, ups = [a], [b if q_b is None else q_b]
    if need_x and q_a is not None:
        downs, ups = [a, q_a], [*ups, b]
    base = weight if mask is None else None  # what is dropped is dropped of the adapter's part alone, so with a mask that stands alone
    grad_x = (grad.new_zeros(grad.shape[0], a.shape[1]) if base is None else grad @ base) if need_x else None
    grad_a = a.new_empty(a.shape) if need_a else None
    grad_b = b.new_empty(b.shape) if need_b else None
    kept = dropped(x, mask, keep).contiguous() if need_a else None
    met = hidden.contiguous() if need_b else None
    factors, gradients = (dense(downs), dense(ups)), (grad_x, grad_a, grad_b)
    csrc.adapter_backward(grad, kept, met, None, [], *factors, scale, *gradients, torch.get_num_threads())
    if grad_x is not None and base is None:
        grad_x = dropped(grad_x, mask, keep)
        grad_x = grad_x if weight is None else grad_x.addmm_(grad, weight)
    of_weight = grad.mT @ x if need_weight else None
    of_bias = grad.sum(dim=0) if need_bias else None
    return [found for found in (grad_x, of_weight, of_bias, grad_a, grad_b) if found is not None]


def dense(factors: list[Tensor]) -> list[Tensor]:
    """What compiled code reads: without strides."""
    return [factor.contiguous() for factor in factors]
