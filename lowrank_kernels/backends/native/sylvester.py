"""``grouped_sylvester`` on the CPU: one call into compiled code, matrices as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, refuse, refuse_gaps


def verify(left: Tensor, right: Tensor, rhs: Tensor, out: Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse(out, out.shape[1]) or refuse_gaps("out", out)
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, eigenvectors in fp64"


@implements("grouped_sylvester", "native", verify)
def grouped_sylvester(left: Tensor, right: Tensor, rhs: Tensor, out: Tensor) -> None:
    """See the reference."""
    count_launch()
    rhs = rhs.contiguous()
    csrc.sylvester(*out.shape[:2], left.data_ptr(), left.stride(), right.data_ptr(), right.stride(), rhs.data_ptr(), out.data_ptr(),
                   torch.get_num_threads())  # fmt: skip
