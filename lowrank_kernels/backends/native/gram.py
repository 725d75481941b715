"""``grouped_gram`` on the CPU: one call into compiled code, sums over blocks of rows in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..lists import as_stored
from ..registry import count_launch, implements
from ._common import COMPILED, refuse, refuse_gaps


def verify(xs: Sequence[Tensor], ys: Sequence[Tensor] | None, grams: Tensor, layouts: Any = None) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to 128 columns."""
    reason = refuse(grams, max(grams.shape[1:])) or refuse_gaps("grams", grams)
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, accumulated in {str(grams.dtype).removeprefix('torch.')}"


@implements("grouped_gram", "native", verify)
def grouped_gram(xs: Sequence[Tensor], ys: Sequence[Tensor] | None, grams: Tensor, layouts: Any = None) -> None:
    """See the reference. ``layouts``: those of ``lists.matrix_layout`` for xs and ys, or None."""
    count_launch()
    wide, (_, r, k) = grams.dtype == torch.float64, grams.shape
    x, y = layouts or (None, None)
    y_list = (None, 0) if ys is None else as_stored(ys)
    code = DTYPE_CODES[xs[0].dtype]
    csrc.gram(*as_stored(xs), x, *y_list, y, code, wide, r, k, grams.data_ptr(), torch.get_num_threads())
