"""``grouped_adamw_`` on the CPU: one call into compiled code, one fused pass over all elements of all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, MAX_RANK, refuse_device


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
    drifts: Tensor | None,
    *scalars: object,
) -> tuple[bool, str]:
    """Takes CPU tensors: contiguous ones of any shape, matrices of any strides; ranks up to 128 with maps."""
    reason = refuse_device(params[0])
    if reason is not None:
        return False, reason
    seen = bool(scalars) and isinstance(scalars[-1], csrc.StepLayout)  # lists.gather takes no others
    for name, tensors in () if seen else (("params", params), ("grads", grads)):
        index = csrc.first_irregular(tensors)
        if index >= 0:
            shape, strides = tuple(tensors[index].shape), tensors[index].stride()
            return False, f"{name}[{index}] has strides {strides}, shape {shape}: tensors that are not matrices must be contiguous"
    small = (grad_maps, momentum_maps, param_maps, direction_maps, drifts)
    if rank_dims and any(value is not None for value in small) and params[0].shape[rank_dims[0]] > MAX_RANK:
        return False, f"maps or drifts of rank {params[0].shape[rank_dims[0]]}: the compiled code stops at {MAX_RANK}"
    if drifts is not None and not drifts.is_contiguous():
        return False, f"drifts must be contiguous, got strides {drifts.stride()}"
    return True, f"{COMPILED}, one fused pass"


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
    drifts: Tensor | None,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    missed: list[int],
    bias_correction: bool,
    maximize: bool,
    layout: object = None,
) -> None:
    """See the reference. ``lr`` and ``step`` may be tensors; on the CPU reading them costs nothing. ``layout``: of ``lists.gather``."""
    maps = [value if value is None else value.contiguous() for value in (grad_maps, momentum_maps, param_maps, direction_maps)]
    small = (*maps, drifts)
    count_launch()
    csrc.adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        layout,
        missed,
        rank_dims,
        float(lr),
        beta1,
        beta2,
        eps,
        weight_decay,
        float(step),
        bias_correction,
        maximize,
        next((value.shape[-1] for value in small if value is not None), 0),
        *(0 if value is None else value.data_ptr() for value in small),
        torch.get_num_threads(),
    )
