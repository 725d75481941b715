"""``grouped_adamw_``: the moment step of all parameters of a group in one call, with optional r×r maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import as_flag, as_integer, as_number
from ..backends.dtypes import compute_dtype
from ..backends.moments import Maps, Numbers, StepNumbers, Stepped
from ..backends.registry import do_nothing, run_in_place
from ._library import are_plain_eager, define, is_eager, is_plain_eager
from ._tensor_checks import (
    check_apart,
    check_list,
    check_lists,
    check_same_length,
    check_same_shapes,
    check_stack_of,
    check_strided,
    check_writable,
)

_NAME = "grouped_adamw_"


def grouped_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    missed: Sequence[int] = (),
    bias_correction: bool = True,
    maximize: bool = False,
    grad_maps: Tensor | None = None,
    momentum_maps: Tensor | None = None,
    param_maps: Tensor | None = None,
    direction_maps: Tensor | None = None,
    rank_dims: Sequence[int] = (),
    drifts: Tensor | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter, decoupled decay) of a whole list of parameters, in place::

        g = P_i · grad_i + T_i · x
        m = β₁ C_i · m + (1-β₁) g ;   v = β₂ v + (1-β₂) g²
        x = (1 - lr·weight_decay) x - lr · D_i · (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + eps),   t = step - missed[i]

    The r×r maps P, C, T, D are identities (T: zero) unless given. P alone is ScaledAdamW's step, P and C are AltLoRA's,
    P and T LoRA-Pro's, P, C and D LoRA-RITE's.

    Args:
        params: any shapes and (for matrices) any strides, of one dtype and device; updated in place.
        grads: like ``params``.
        exp_avgs, exp_avg_sqs: contiguous moments of the same shapes, fp32 (fp64 for fp64 parameters), updated in place.
            An empty ``exp_avgs`` means no momentum (m = g), an empty ``exp_avg_sqs`` means that the direction is m itself.
        lr, step: numbers, or one-element tensors on the device (then nothing is read on the host, as a CUDA graph needs).
            ``step`` counts from 1, this step included; a tensor below that is not noticed, and gives NaN.
        betas: β₁ and β₂, in [0, 1).
        eps, weight_decay: finite; ``eps`` ≥ 0.
        missed: per parameter, how many of these steps it did not take (its gradient was None); empty means none.
        bias_correction: divide the moments by ``1-βᵗ``, as Adam does.
        maximize: ascend.
        grad_maps, momentum_maps, param_maps, direction_maps: P, C, T and D, stacked (N, r, r), fp32 (fp64 for fp64
            parameters); every parameter is then a matrix.
        rank_dims: with maps or drifts, which dimension of each parameter is r: 0 for A (r, d), mapped as ``P g``; 1 for
            B (d, r), mapped as ``g P``.
        drifts: (N, r, r), fp32 (fp64 for fp64 parameters), written: ``Xᵀ(X - X_old)`` for B and ``X(X - X_old)ᵀ`` for A, formed in
            the same pass while the old factor is known, so that ``XᵀX_old = XᵀX - drift``. The difference is exact or nearly so, which
            is why fp32 is enough where a cross-Gram matrix in fp32 would not be: the error is eps·‖X‖·‖X - X_old‖, not eps·‖X‖².

    Raises:
        TypeError, ValueError: lists, shapes, dtypes, devices, numbers or maps do not fit, or what is written shares memory; nothing was
            changed.
        RuntimeError: something that is written is a leaf that requires a gradient, and autograd is on; nothing was changed.
    """
    maps = {"grad_maps": grad_maps, "momentum_maps": momentum_maps, "param_maps": param_maps, "direction_maps": direction_maps}

    def begin_writing() -> None:
        check_writable(_NAME, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, drifts=drifts)
        if drifts is not None:
            check_apart(_NAME, {"drifts": drifts}, maps)

    adamw_as_gathered_(
        params, grads, exp_avgs, exp_avg_sqs, layout=None, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step, missed=missed,
        bias_correction=bias_correction, maximize=maximize, rank_dims=rank_dims, drifts=drifts, begin_writing=begin_writing, **maps,
    )  # fmt: skip


def adamw_as_gathered_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    layout: object,
    grad_maps: Tensor | None = None,
    momentum_maps: Tensor | None = None,
    param_maps: Tensor | None = None,
    direction_maps: Tensor | None = None,
    rank_dims: Sequence[int] = (),
    drifts: Tensor | None = None,
    begin_writing: Callable[[], object] = do_nothing,
    **step: Unpack[StepNumbers],
) -> None:
    """:func:`grouped_adamw_` as our optimizers call it, once for all tensors of a kind, in every step.

    ``layout``: what ``lists.gather`` found when it read these very lists in this step: then all fits, and nothing is looked at again; maps
    and numbers are the caller's, too. With the layout of other lists, what is written are their tensors. None: all is checked.
    ``begin_writing``: called when all has been checked, right before anything is written.
    """
    maps = Maps(grad_maps, momentum_maps, param_maps, direction_maps)
    if layout is None:
        _check(params, grads, exp_avgs, exp_avg_sqs, step.get("missed", ()), maps, drifts, rank_dims)
        _check_numbers(any(param.is_meta for param in params[:1]), **step)
    if not params:
        return
    stepped = Stepped(_listed(params), _listed(grads), _listed(exp_avgs), _listed(exp_avg_sqs), layout)
    numbers, dims = Numbers.of(**step), list(rank_dims)
    if is_eager() if layout is not None else are_plain_eager(params, grads) and is_plain_eager(params[0], *maps):
        _moment_step(stepped, maps, dims, drifts, numbers, begin_writing)
        return
    begin_writing()
    lr, counter = ((0, value) if isinstance(value, Tensor) else (value, None) for value in (numbers.lr, numbers.step))
    torch.ops.lowrank_kernels.grouped_adamw_(
        *stepped[:4], *maps, dims, drifts, *lr, numbers.beta1, numbers.beta2, numbers.eps, numbers.weight_decay, *counter,
        numbers.missed, numbers.bias_correction, numbers.maximize,
    )  # fmt: skip


def _listed(tensors: Sequence[Tensor]) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else list(tensors)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    missed: Sequence[int],
    maps: Maps,
    drifts: Tensor | None,
    rank_dims: Sequence[int],
) -> None:
    check_list(_NAME, "params", params, ndim=None, written=True)
    check_same_length(_NAME, params=params, grads=grads)
    check_lists(_NAME, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, missed=missed, rank_dims=rank_dims)
    if not params:
        check_same_length(_NAME, params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, missed=missed)
        return
    first = params[0]
    check_list(_NAME, "grads", grads, like=first, ndim=None)
    state_dtype = compute_dtype(first.dtype)
    shapes, device = [param.shape for param in params], first.device
    check_same_shapes(_NAME, "grads", grads, "params", params)
    for name, states in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        if not states:
            continue
        check_same_length(_NAME, params=params, **{name: states})
        for index, (shape, state) in enumerate(zip(shapes, states, strict=True)):
            if not isinstance(state, Tensor) or state.layout is not torch.strided:
                check_strided(_NAME, f"{name}[{index}]", state)
            if state.dtype is not state_dtype or state.shape != shape or state.device != device:
                raise ValueError(
                    f"{_NAME}: {name}[{index}] must be {state_dtype} of shape {tuple(shape)} on {device}, "
                    f"got {state.dtype} of shape {tuple(state.shape)} on {state.device}"
                )
            if not state.is_contiguous():
                raise ValueError(f"{_NAME}: {name}[{index}] must be contiguous, got strides {state.stride()}")
    if missed:
        check_same_length(_NAME, params=params, missed=missed)
    if drifts is not None or any(value is not None for value in maps):
        _check_maps(params, maps, drifts, rank_dims, state_dtype)


def _check_numbers(
    on_meta: bool, *, lr: Any, betas: Any, eps: Any, weight_decay: Any, step: Any, missed: Sequence[Any] = (), bias_correction: Any = True,
    maximize: Any = False,
) -> None:  # fmt: skip
    """Refuse numbers that would write NaN, or that compiled code would not take. Tensors (lr, step) are not read."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{_NAME}: betas must be two numbers, such as (0.9, 0.999), got {betas!r:.80}")
    for index, beta in enumerate(betas):
        if not 0.0 <= as_number(_NAME, f"betas[{index}]", beta) < 1.0:
            raise ValueError(f"{_NAME}: betas must be in [0, 1), got {betas!r:.80}")
    for name, value in (("lr", lr), ("step", step)):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{_NAME}: {name} must be one number, got a tensor of shape {tuple(value.shape)}")
            if value.is_complex():
                raise TypeError(f"{_NAME}: {name} must be a real number, got a tensor of dtype {value.dtype}")
            if value.is_meta and not on_meta:
                raise ValueError(f"{_NAME}: {name} must be a tensor that holds a value, or a number, got one on meta")
    if not isinstance(lr, Tensor):
        as_number(_NAME, "lr", lr)
    as_number(_NAME, "eps", eps, 0.0)
    as_number(_NAME, "weight_decay", weight_decay)
    as_flag(_NAME, "bias_correction", bias_correction)
    as_flag(_NAME, "maximize", maximize)
    for index, count in enumerate(missed):
        as_integer(_NAME, f"missed[{index}]", count, 0)
    if not isinstance(step, Tensor):
        as_integer(_NAME, "step", step, -(2**31))
    if bias_correction and not isinstance(step, Tensor) and step - max(missed, default=0) < 1:
        said = f"step={step}" + (f" and missed={max(missed)}" if missed else "")
        raise ValueError(f"{_NAME}: step counts from 1, this one included, and must be above missed; got {said}")


def _check_maps(params: Sequence[Tensor], maps: Maps, drifts: Tensor | None, rank_dims: Sequence[int], dtype: torch.dtype) -> None:
    check_same_length(_NAME, params=params, rank_dims=rank_dims)
    if any(type(dim) is not int or dim not in (0, 1) for dim in rank_dims):
        raise ValueError(f"{_NAME}: rank_dims must be 0 (a factor (r, d)) or 1 (a factor (d, r)), got {list(rank_dims)!r:.80}")
    check_list(_NAME, "params", params)
    rank = params[0].shape[rank_dims[0]]
    for index, (param, dim) in enumerate(zip(params, rank_dims, strict=True)):
        if param.shape[dim] != rank:
            raise ValueError(f"{_NAME}: params[{index}] of shape {tuple(param.shape)} does not have rank {rank}; call once per rank")
    shape, device = (len(params), rank, rank), params[0].device
    for name, value in (*((f"{kind}_maps", value) for kind, value in maps._asdict().items()), ("drifts", drifts)):
        if value is not None:
            check_stack_of(_NAME, name, value, shape, dtype, device)


def _grouped_adamw_(
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
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    step_tensor: Tensor | None,
    missed: list[int],
    bias_correction: bool,
    maximize: bool,
) -> None:
    """The operation as torch's dispatcher has it, whose schema knows neither tuples of tensors nor numbers that may be one."""
    rate, count = lr if lr_tensor is None else lr_tensor, step if step_tensor is None else step_tensor
    numbers = Numbers(rate, beta1, beta2, eps, weight_decay, count, missed, bias_correction, maximize)
    maps = Maps(grad_maps, momentum_maps, param_maps, direction_maps)
    _moment_step(Stepped(params, grads, exp_avgs, exp_avg_sqs), maps, rank_dims, drifts, numbers)


def _moment_step(
    stepped: Stepped,
    maps: Maps,
    rank_dims: list[int],
    drifts: Tensor | None,
    numbers: Numbers,
    begin_writing: Callable[[], object] = do_nothing,
) -> None:
    def begin() -> None:
        begin_writing()
        torch.autograd.graph.increment_version(stepped.params)  # while they are in the caches

    run_in_place(begin, _NAME, stepped.params[0].device.type, stepped, maps, rank_dims, drifts, numbers)


define(
    _NAME,
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor? grad_maps, "
    "Tensor? momentum_maps, Tensor? param_maps, Tensor? direction_maps, int[] rank_dims, Tensor(d!)? drifts, "
    "float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, int step, "
    "Tensor? step_tensor, int[] missed, bool bias_correction, bool maximize) -> ()",
    _grouped_adamw_,
    lambda *args: None,
)
__all__ = ["grouped_adamw_"]
