"""``grouped_altlora_turn_``: one turn of AltLoRA, from Gram matrices to the moment step, of all pairs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import as_number
from ..backends.dtypes import compute_dtype
from ..backends.lists import as_stored, matrix_layout, sizes
from ..backends.moments import Numbers, StepNumbers, Stepped
from ..backends.registry import Implementation, call, do_nothing, whole
from ._library import for_eager, is_eager
from ._tensor_checks import check_list, check_same_length, check_stack_of, check_writable
from .adamw import adamw_as_gathered_, grouped_adamw_
from .gram import grouped_gram
from .preconditioner import grouped_preconditioner

_NAME = "grouped_altlora_turn_"
_PARTS = ("grouped_gram", "grouped_preconditioner", "grouped_adamw_")


def grouped_altlora_turn_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    partners: Sequence[Tensor],
    behind: Tensor,
    moved: Tensor,
    damping: float,
    own_damping: float,
    weight: float,
    rank_dims: list[int],
    **step: Unpack[StepNumbers],
) -> None:
    """A turn of the factors X of one side (AltLoRA paper, Algorithms 1 and 2), Y being their partners::

        P = w (YᵀY + δI)⁻¹ ;   C = I - (YᵀY + δI)⁻¹ K          grouped_gram in fp64, grouped_preconditioner
        moment step of X with P and C                          grouped_adamw_
        K ← 0 ;   K of the partners ← δ_X I + Xᵀ(X - X_old)

    It is these operations one after the other, and the result is theirs to the bit. For our optimizers (:func:`altlora_turn_as_gathered_`)
    compiled code on the CPU has it as a whole, and Triton in four launches.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, step: as :func:`grouped_adamw_` takes them; contiguous or strided matrices.
        partners: Y as tall matrices (d_i, r), of the dtype and device of ``params``.
        behind: K (N, r, r), what the momentum is behind by, contiguous, in the dtype of the moments; zero afterwards.
        moved: (N, r, r), likewise: the partners' K, written; not optional, without it their next turn would carry the wrong momentum.
        damping, own_damping: δ ≥ 0 of YᵀY, and δ_X of XᵀX, absolute.
        weight: w.
        rank_dims: for each of ``params`` the same: 0 for factors A (r, d), 1 for B (d, r).

    Raises:
        TypeError, ValueError: as the operations raise them, or what is written shares memory; nothing was changed.
        RuntimeError: something that is written is a leaf that requires a gradient, and autograd is on, or an inference tensor; nothing was
            changed.
    """
    check_list(_NAME, "params", params, written=True)
    check_list(_NAME, "partners", partners, like=params[0] if params else None)
    check_same_length(_NAME, params=params, partners=partners, rank_dims=rank_dims)
    damping = as_number(_NAME, "damping", damping, 0.0)
    own_damping = as_number(_NAME, "own_damping", own_damping, 0.0)
    weight = as_number(_NAME, "weight", weight)
    if not params:
        grouped_adamw_(params, grads, exp_avgs, exp_avg_sqs, **step)  # there is nothing to turn, but to check
        return
    if any(type(dim) is not int or dim != rank_dims[0] or dim not in (0, 1) for dim in rank_dims):
        raise ValueError(f"{_NAME}: rank_dims must be all 0 (factors (r, d)) or all 1 (factors (d, r)), got {list(rank_dims)!r:.80}")
    rank, dtype, columns = params[0].shape[rank_dims[0]], compute_dtype(params[0].dtype), sizes(partners, 1)
    if columns.count(rank) < len(columns):
        index = next(index for index, width in enumerate(columns) if width != rank)
        raise ValueError(f"{_NAME}: partners[{index}] must have {rank} columns, the rank of params[0], got {columns[index]}")
    for name, stack in (("behind", behind), ("moved", moved)):
        check_stack_of(_NAME, name, stack, (len(params), rank, rank), dtype, params[0].device)
    altlora_turn_as_gathered_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        layout=None,
        partners=partners,
        behind=behind,
        moved=moved,
        damping=damping,
        own_damping=own_damping,
        weight=weight,
        rank_dims=rank_dims,
        begin_writing=lambda: check_writable(_NAME, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, behind=behind, moved=moved),
        **step,
    )


def altlora_turn_as_gathered_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    layout: object,
    partners: Sequence[Tensor],
    behind: Tensor,
    moved: Tensor,
    damping: float,
    own_damping: float,
    weight: float,
    rank_dims: list[int],
    begin_writing: Callable[[], object] = do_nothing,
    **step: Unpack[StepNumbers],
) -> None:
    """:func:`grouped_altlora_turn_` with ``layout`` and ``begin_writing`` as :func:`~.adamw.adamw_as_gathered_` takes them.

    Compiled code has it as a whole then, pair by pair in one call, since between three small calls a processor does nothing: 0.3 ms of
    2.6 in a step of RoBERTa-base's r = 16. Triton has it in four launches in place of seven.
    """
    if not params:
        return
    if layout is not None and not torch.is_grad_enabled() and is_eager():
        taken = as_a_whole(Stepped(params, grads, exp_avgs, exp_avg_sqs, layout), partners, behind, moved, rank_dims)
        if taken is not None:
            implementation, first = taken
            arguments = (*first, damping, own_damping, weight, Numbers.of(**step))
            begin_writing()
            torch.autograd.graph.increment_version(params)  # while they are in the caches
            call(implementation, params[0].device.type, arguments)
            return
    grams = grouped_gram(partners, dtype=torch.float64)
    preconditioners, realignments = grouped_preconditioner(
        grams, damping, weight=weight, drifts=behind, transposed=rank_dims[0] == 1, dtype=behind.dtype
    )
    adamw_as_gathered_(
        params, grads, exp_avgs, exp_avg_sqs, layout=layout, grad_maps=preconditioners, momentum_maps=realignments, rank_dims=rank_dims,
        drifts=moved, begin_writing=begin_writing, **step,
    )  # fmt: skip
    behind.zero_()
    moved.diagonal(dim1=1, dim2=2).add_(own_damping)


def as_a_whole(
    stepped: Stepped, partners: Sequence[Tensor], behind: Tensor, moved: Tensor, rank_dims: list[int]
) -> tuple[Implementation, tuple[Any, ...]] | None:
    """What takes this turn in one call, and the first of the arguments that it gets; None: the parts of the turn take it."""
    implementation = whole(_NAME, _PARTS, stepped.params[0].device.type)
    if implementation is None:
        return None
    first = (stepped, for_eager(partners), matrix_layout(partners), behind, moved, rank_dims)
    return (implementation, first) if _fit(*first) and implementation.verify(*first)[0] else None


def _fit(stepped: Stepped, partners: Sequence[Tensor], partner_layout: Any, behind: Tensor, moved: Tensor, rank_dims: list[int]) -> bool:
    """Whether nothing is unusual about what stands beside the parameters; what is, the parts of a turn look at."""
    first, rank, partner = stepped.params[0], behind.shape[-1], as_stored(partners)[0][0]
    stack, dtype = (len(stepped.params), rank, rank), compute_dtype(first.dtype)
    return (
        (partner_layout is not None and partner_layout.columns == rank and first.shape[rank_dims[0]] == rank)
        and (partner.dtype is first.dtype and partner.device == first.device)
        and (behind.shape == moved.shape == stack and behind.dtype is moved.dtype is dtype)
        and (behind.is_contiguous() and moved.is_contiguous())
    )


__all__ = ["grouped_altlora_turn_"]
