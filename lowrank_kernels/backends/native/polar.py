"""``grouped_polar`` on the CPU: the QR of ``grouped_qr``, Jacobi rotations on R; one call for all matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..lists import as_stored
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(xs: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse(xs[0], xs[0].shape[1])
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, CholeskyQR and one-sided Jacobi"


@implements("grouped_polar", "native", verify)
def grouped_polar(xs: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """See the reference."""
    count_launch()
    first = xs[0]
    csrc.polar(*as_stored(xs), *as_stored(out), DTYPE_CODES[first.dtype], first.shape[1], torch.get_num_threads())
