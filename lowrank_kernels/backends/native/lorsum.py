"""``grouped_lorsum`` and its product on the CPU: one call into compiled code for all layers and all sweeps.

A layer stays with one thread, so that its factors are in that core's cache from the first half sweep to the last. S, X and dense
gradients are read in place where they are of the arithmetic's dtype, 2K times in all.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from ..sums import FactorLists, Sums, Sweeps
from ._common import COMPILED, addresses, refuse, strides, table

#: Added to the dtype's code of a dense term.
_DENSE = 4


def verify(targets: FactorLists, sums: Sums, sweeps: Sweeps, out: FactorLists) -> tuple[bool, str]:
    """Takes CPU tensors of any strides, up to rank 128 and 16 terms."""
    refused = _refuse(targets[0], sums.lefts)
    return (False, refused) if refused else (True, f"{COMPILED}, all sweeps of a layer in its core's cache")


def _refuse(factors: Sequence[Tensor], lefts: Sequence[Tensor]) -> str | None:
    reason, terms = refuse(factors[0], factors[0].shape[1]), len(lefts) // len(factors)
    return reason or (None if terms <= csrc.max_lorsum_terms else f"{terms} terms: the compiled code stops at {csrc.max_lorsum_terms}")


@implements("grouped_lorsum", "native", verify)
def grouped_lorsum(targets: FactorLists, sums: Sums, sweeps: Sweeps, out: FactorLists) -> None:
    """See the reference."""
    (us, vs), (lefts, rights, numbers, coefficients) = targets, sums
    factors = (us, vs, *out)
    layers = table(
        *map(addresses, factors),
        [u.shape[0] for u in us],
        [v.shape[0] for v in vs],
        *chain.from_iterable(map(strides, factors)),
    )
    # Of a dense term the right factor is not read.
    others = [left if right is None else right for left, right in zip(lefts, rights, strict=True)]
    terms = table(
        addresses(lefts),
        addresses(others),
        [left.shape[1] for left in lefts],
        *strides(lefts),
        *strides(others),
        [DTYPE_CODES[left.dtype] + (_DENSE if right is None else 0) for left, right in zip(lefts, rights, strict=True)],
    )
    values = array("d", numbers) if coefficients is None else coefficients.contiguous()
    address = values.buffer_info()[0] if isinstance(values, array) else values.data_ptr()
    count_launch()
    csrc.lorsum(
        len(us), layers, len(lefts) // len(us), terms, address, DTYPE_CODES[us[0].dtype], us[0].shape[1],
        *sweeps, torch.get_num_threads(),
    )  # fmt: skip


def verify_product(xs: list[Tensor], sums: Sums, ys: list[Tensor]) -> tuple[bool, str]:
    """Takes CPU tensors of any strides, up to 128 columns and 16 terms."""
    refused = _refuse(xs, sums.lefts)
    return (False, refused) if refused else (True, f"{COMPILED}")


@implements("grouped_lorsum_product", "native", verify_product)
def grouped_lorsum_product(xs: list[Tensor], sums: Sums, ys: list[Tensor]) -> None:
    """See the reference; to the compiled code it is half a sweep without a system."""
    wide = [x.to(ys[0].dtype) for x in xs]
    grouped_lorsum((ys, wide), sums, Sweeps(0, 0.0, True), (ys, wide))
