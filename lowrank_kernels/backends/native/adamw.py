"""``grouped_adamw_`` on the CPU: one call into compiled code, one fused pass over all elements of all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, table


def verify(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_maps: Tensor | None,
    momentum_maps: Tensor | None,
    param_maps: Tensor | None,
    direction_maps: Tensor | None,
    rank_dims: list[int],
    new_grams: Tensor | None,
    *scalars: object,
) -> tuple[bool, str]:
    """Takes CPU tensors: contiguous ones of any shape, matrices of any strides; ranks up to 128 with maps."""
    reason = refuse_device(params[0])
    if reason is not None:
        return False, reason
    for name, tensors in (("params", params), ("grads", grads)):
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous() and tensor.ndim != 2:
                return False, f"{name}[{index}] has strides {tensor.stride()}: tensors that are not matrices must be contiguous"
    small = (grad_maps, momentum_maps, param_maps, direction_maps, new_grams)
    if rank_dims and any(value is not None for value in small) and params[0].shape[rank_dims[0]] > MAX_RANK:
        return False, f"maps or Grams of rank {params[0].shape[rank_dims[0]]}: the compiled code stops at {MAX_RANK}"
    if new_grams is not None and not new_grams.is_contiguous():
        return False, f"new_grams must be contiguous, got strides {new_grams.stride()}"
    return True, f"compiled code ({_csrc.instruction_set()}), one fused pass"


@implements("grouped_adamw_", "native", verify)
def grouped_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_maps: Tensor | None,
    momentum_maps: Tensor | None,
    param_maps: Tensor | None,
    direction_maps: Tensor | None,
    rank_dims: list[int],
    new_grams: Tensor | None,
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
    """See the reference. ``lr`` and ``step`` may be tensors; on the CPU reading them costs nothing."""
    n = len(params)
    zeros = (0,) * n
    maps = [value if value is None else value.contiguous() for value in (grad_maps, momentum_maps, param_maps, direction_maps)]
    mapped = new_grams is not None or any(value is not None for value in maps)
    if not mapped and all(p.is_contiguous() and g.is_contiguous() for p, g in zip(params, grads, strict=True)):
        # The usual case, with few Python operations per parameter: each is one row of numel() elements.
        sizes = [p.numel() for p in params]
        ones = [1] * n
        shapes: tuple[list[int], ...] = (ones, sizes, sizes, ones, sizes, ones)
    else:
        shapes = _matrices(params, grads)
    rows = table(
        addresses(params),
        addresses(grads),
        addresses(exp_avgs) or zeros,
        addresses(exp_avg_sqs) or zeros,
        *shapes,
        missed or zeros,
        rank_dims or zeros,
    )
    count_launch()
    _csrc.adamw(
        n,
        rows,
        DTYPE_CODES[params[0].dtype],
        float(lr),
        beta1,
        beta2,
        eps,
        weight_decay,
        float(step),
        bias_correction,
        maximize,
        *(0 if value is None else value.data_ptr() for value in (*maps, new_grams)),
        new_grams is not None and new_grams.dtype == torch.float64,
        torch.get_num_threads(),
    )


def _matrices(params: list[Tensor], grads: list[Tensor]) -> tuple[list[int], ...]:
    """Rows, columns, and the row and column strides of the parameters and the gradients; vectors and so on are one row."""
    shapes, param_strides, grad_strides = [], [], []
    for param, grad in zip(params, grads, strict=True):
        matrix = param.ndim == 2
        rows, columns = param.shape if matrix else (1, param.numel())
        shapes.append((rows, columns))
        param_strides.append(param.stride() if matrix else (columns, 1))
        grad_strides.append(grad.stride() if matrix else (columns, 1))
    return tuple([pair[k] for pair in pairs] for pairs in (shapes, param_strides, grad_strides) for k in (0, 1))
