"""``grouped_adamw_`` on the CPU: one call into compiled code, one fused pass over all elements of all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import csrc
from ..moments import Maps, Numbers, Stepped
from ..registry import count_launch, implements
from ._common import COMPILED, refuse, refuse_gaps


def verify(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers) -> tuple[bool, str]:
    """Takes CPU tensors: contiguous ones of any shape, matrices of any strides; ranks up to 128 with maps."""
    reason = refuse(stepped.params[0], maps.rank(drifts))
    if reason is not None:
        return False, reason
    seen = isinstance(stepped.layout, csrc.StepLayout)  # lists.gather takes no others
    for name, tensors in () if seen else (("params", stepped.params), ("grads", stepped.grads)):
        index = csrc.first_irregular(tensors)
        if index >= 0:
            shape, strides = tuple(tensors[index].shape), tensors[index].stride()
            return False, f"{name}[{index}] has strides {strides}, shape {shape}: tensors that are not matrices must be contiguous"
    reason = None if drifts is None else refuse_gaps("drifts", drifts)
    return (True, f"{COMPILED}, one fused pass") if reason is None else (False, reason)


@implements("grouped_adamw_", "native", verify)
def grouped_adamw_(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers) -> None:
    """See the reference. ``lr`` and ``step`` may be tensors; on the CPU reading them costs nothing."""
    contiguous = [value if value is None else value.contiguous() for value in maps]
    count_launch()
    csrc.adamw(
        *stepped,
        numbers.missed,
        rank_dims,
        float(numbers.lr),
        numbers.beta1,
        numbers.beta2,
        numbers.eps,
        numbers.weight_decay,
        float(numbers.step),
        numbers.bias_correction,
        numbers.maximize,
        maps.rank(drifts),
        *(0 if value is None else value.data_ptr() for value in (*contiguous, drifts)),
        torch.get_num_threads(),
    )
