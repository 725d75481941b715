"""``grouped_lorsum``: rank-r approximations of sums of low-rank matrices, by alternating least squares; and products with such sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import as_integer, as_number, check_choice
from ..backends.dtypes import compute_dtype
from ..backends.registry import do_nothing, run, run_in_place
from ..backends.sums import FactorLists, Sums, Sweeps
from ._library import define, is_plain_eager, no_backward, records_nothing, resolved
from ._tensor_checks import check_apart, check_list, check_same_length, check_writable

NAME = "grouped_lorsum"
#: A term of the sum, of every layer: P_j and Q_j of P_j Q_jᵀ, or dense matrices.
Term: TypeAlias = FactorLists | Sequence[Tensor]
#: Of one term: one number for all layers, or one for each.
Coefficient: TypeAlias = float | Tensor | Sequence[float]


def _is_pair(term: Term) -> bool:
    return isinstance(term, (list, tuple)) and len(term) == 2 and all(isinstance(part, (list, tuple)) for part in term)


def _check_factors(
    operation: str, name: str, factors: object, like: tuple[list[Tensor], list[Tensor]] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The two lists of ``factors``; refused unless they are (d_out, k) and (d_in, k), of one k in every layer."""
    if not isinstance(factors, (list, tuple)) or len(factors) != 2:
        raise TypeError(f"{operation}: {name} must be two lists of tensors, (lefts, rights), got {type(factors).__name__}")
    for side, part in zip(("[0]", "[1]"), factors, strict=True):
        check_list(operation, f"{name}{side}", part)
    lefts, rights = list(factors[0]), list(factors[1])
    check_same_length(operation, **{f"{name}[0]": lefts, f"{name}[1]": rights}, **({} if like is None else {"targets": like[0]}))
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        if left.dtype != right.dtype:
            raise TypeError(f"{operation}: {name}[1][{index}] has dtype {right.dtype}, {name}[0][{index}] has {left.dtype}")
        if left.shape[1] != right.shape[1]:
            raise ValueError(f"{operation}: {name}[1][{index}] has {right.shape[1]} columns, {name}[0][{index}] has {left.shape[1]}")
        if like is not None:
            _check_against(operation, f"{name}[0][{index}]", left, left.shape[0], like[0][index], like[0][index].shape[0])
            _check_against(operation, f"{name}[1][{index}]", right, right.shape[0], like[1][index], like[1][index].shape[0])
    return lefts, rights


def _check_against(operation: str, name: str, tensor: Tensor, got: object, target: Tensor, expected: object) -> None:
    if got != expected:
        raise ValueError(f"{operation}: {name} of shape {tuple(tensor.shape)} does not fit its target: expected {expected}, got {got}")
    if tensor.device != target.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, its target is on {target.device}")


def _check_term(
    operation: str, name: str, term: Term, targets: tuple[list[Tensor], list[Tensor]]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The left and right factors of a term; no right factors if it is dense."""
    count = len(targets[0])
    if _is_pair(term):
        lefts, rights = _check_factors(operation, name, term, targets)
        return lefts, list(rights)
    check_list(operation, name, term)  # type: ignore[arg-type]
    check_same_length(operation, targets=targets[0], **{name: term})
    matrices: list[Tensor] = list(term)  # type: ignore[arg-type]
    for index, (matrix, u, v) in enumerate(zip(matrices, *targets, strict=True)):
        _check_against(operation, f"{name}[{index}]", matrix, tuple(matrix.shape), u, (u.shape[0], v.shape[0]))
    return matrices, [None] * count


def _numbers(operation: str, name: str, values: Sequence[Any]) -> list[float]:
    """The values as numbers; each is looked at only where they are not all Python's and finite."""
    if {float}.issuperset(map(type, values)) and all(map(math.isfinite, values)):
        return list(values)
    return [as_number(operation, f"{name}[{index}]", value) for index, value in enumerate(values)]


def _check_coefficients(
    operation: str, coefficients: Tensor | Sequence[Coefficient], terms: int, layers: int, device: torch.device
) -> tuple[list[float], Tensor | None]:
    """Numbers, term by term for every layer, or, if there is a tensor among them, one (J, N) tensor in fp64 on the device."""
    if not isinstance(coefficients, (Tensor, list, tuple)):
        raise TypeError(f"{operation}: coefficients must be a list, for each term its own, or a tensor, got {coefficients!r:.80}")
    if isinstance(coefficients, Tensor) and coefficients.ndim not in (1, 2):
        raise ValueError(f"{operation}: coefficients must be (terms,) or (terms, layers), got shape {tuple(coefficients.shape)}")
    if len(coefficients) != terms:
        raise ValueError(f"{operation}: got {len(coefficients)} coefficients for {terms} terms")
    rows: list[list[float] | Tensor] = []
    for index, value in enumerate(coefficients):
        if isinstance(value, Tensor):
            if value.is_complex() or (value.is_meta and device.type != "meta"):
                raise TypeError(f"{operation}: coefficients[{index}] must be real and hold values, got {value.dtype} on {value.device}")
            if value.shape not in ((), (layers,)):
                raise ValueError(f"{operation}: coefficients[{index}] has shape {tuple(value.shape)}, expected () or ({layers},)")
            rows.append(value.detach().to(device, torch.float64).expand(layers))
        elif isinstance(value, (list, tuple)):
            if len(value) != layers:
                raise ValueError(f"{operation}: coefficients[{index}] has {len(value)} numbers for {layers} layers")
            rows.append(_numbers(operation, f"coefficients[{index}]", value))
        else:
            rows.append([as_number(operation, f"coefficients[{index}]", value)] * layers)
    if not any(isinstance(row, Tensor) for row in rows):
        return [number for row in rows for number in row], None
    # Numbers of one value are filled in on the device: nothing is copied there, which a graph capture would refuse.
    stacked = [
        row
        if isinstance(row, Tensor)
        else torch.full((layers,), row[0], dtype=torch.float64, device=device)
        if len(set(row)) == 1
        else torch.tensor(row, dtype=torch.float64, device=device)
        for row in rows
    ]
    return [], torch.stack(stacked)


def grouped_lorsum(
    targets: FactorLists,
    terms: Sequence[Term],
    coefficients: Tensor | Sequence[Coefficient],
    sweeps: int = 2,
    proximal: float = 0.0,
    first: str = "u",
    *,
    out: FactorLists | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """LoRSum (OPLoRA, Listing 1): ``U_i V_iᵀ ≈ Σ_j c_ji P_ji Q_jiᵀ`` for all layers of a list, the sum itself never formed.

    From the start (U⁰, V⁰) each sweep solves two least-squares problems, here with ``first="u"``::

        U ← (Σ_j c_j P_j (Q_jᵀ V) + λU⁰) (VᵀV + λI)⁻¹
        V ← (Σ_j c_j Q_j (P_jᵀ U) + λV⁰) (UᵀU + λI)⁻¹

    Without λ this is subspace iteration: U Vᵀ approaches the truncated SVD of the sum.

    Args:
        targets: the start ``(us, vs)``: U⁰_i (d_out, r) and V⁰_i (d_in, r); one r, dtype and device for all layers, any sizes
            and strides (``A.mT`` needs no copy). The start is a term of the sum only if ``terms`` contains it.
        terms: each either ``(lefts, rights)``, lists over the layers of P_ji (d_out, k) and Q_ji (d_in, k), or one list of dense
            matrices (d_out, d_in). k may differ from layer to layer and be large: for G = SᵀX (tokens × width) pass
            ``(S.mT, X.mT)``. A term has one dtype, which need not be that of the targets.
        coefficients: c, for each term one number or one for each layer: a list of numbers, of lists of numbers, of tensors () or
            (layers,); or a tensor (terms,) or (terms, layers). Constants for autograd, silently; tensors on the device are not read by
            the host.
        sweeps: K ≥ 1, each of which solves for both sides.
        proximal: λ ≥ 0, absolute, in both solves.
        first: which side is solved first, "u" or "v". The other one must have full column rank to tell anything.
        out: where to write the result, ``(us, vs)`` of the targets' shapes and dtype; may be the targets themselves, also when these
            are a term.

    Returns:
        ``(us, vs)``. r × r systems are accumulated and solved in fp64, all else in fp32 at least. In column j the λ that is used is at
        least ``τ·(VᵀV)_jj``, with τ = 4·r·eps(fp64), for λ = 0 eps of the arithmetic if that is more (fp32: 1.2e-7): so with a
        rank-deficient V (fewer tokens than columns, say) U is finite. It is then the U that is nearest to its start, column j weighted by
        ``(VᵀV)_jj`` (not the limit λ → 0, which weights all alike), up to rounding as large as the start itself (fp64; in fp32 it
        is a few per cent at most, τ being larger). None of that shows in UVᵀ, which has its digits.
        A layer with NaN or Inf in anything that belongs to it, or whose arithmetic overflows, gives NaN in its own U and V; the
        others are not touched by it.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers do not fit, no terms, or ``out`` shares memory with anything but the
            targets that it is; nothing was computed.
        RuntimeError: ``out`` is a leaf that requires a gradient, and autograd is on, or an inference tensor outside that mode; nothing was
            computed.

    The result is a constant for autograd; its backward says so.
    """
    begin_writing = do_nothing if out is None else lambda: _check_out(targets, terms, out)
    return lorsum_in_step(targets, terms, coefficients, sweeps, proximal, first, out=out, begin_writing=begin_writing)


def _check_out(targets: FactorLists, terms: Sequence[Term], out: FactorLists) -> None:
    """Refuse an ``out`` that shares memory, with itself or with what is read: of that it may only be the targets, also as a term."""
    written = {"out[0]": out[0], "out[1]": out[1]}
    check_writable(NAME, **written)
    parts = {f"terms[{j}]{side}": part for j, term in enumerate(terms) for side, part in _sides(term)}
    in_place = zip((*targets[0], *targets[1]), (*out[0], *out[1]), strict=True)
    check_apart(NAME, written, {"targets[0]": targets[0], "targets[1]": targets[1], **parts}, in_place)


def _sides(term: Term) -> list[tuple[str, Sequence[Tensor]]]:
    """The lists of tensors of a term, by what they are called in it."""
    return [("[0]", term[0]), ("[1]", term[1])] if _is_pair(term) else [("", term)]  # type: ignore[list-item]


def lorsum_in_step(
    targets: FactorLists,
    terms: Sequence[Term],
    coefficients: Tensor | Sequence[Coefficient],
    sweeps: int = 2,
    proximal: float = 0.0,
    first: str = "u",
    *,
    out: FactorLists | None = None,
    begin_writing: Callable[[], object] = do_nothing,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`grouped_lorsum` as our optimizers call it.

    ``begin_writing``: called when all has been checked, right before anything is written into ``out``.
    """
    us, vs = _check_factors(NAME, "targets", targets, None)
    if us and (us[0].dtype != vs[0].dtype or us[0].device != vs[0].device):
        raise ValueError(f"{NAME}: targets[0] are {us[0].dtype} on {us[0].device}, targets[1] {vs[0].dtype} on {vs[0].device}")
    for index, u in enumerate(us):
        if u.shape[1] != us[0].shape[1]:
            raise ValueError(f"{NAME}: targets[0][{index}] has rank {u.shape[1]}, targets[0][0] has {us[0].shape[1]}; call once per rank")
    if isinstance(terms, Tensor) or not isinstance(terms, (list, tuple)) or not terms:
        raise ValueError(f"{NAME}: terms must be a non-empty list of (lefts, rights) or of lists of dense matrices, got {terms!r:.80}")
    sweeps = as_integer(NAME, "sweeps", sweeps, 1)
    proximal = as_number(NAME, "proximal", proximal, 0.0)
    check_choice(NAME, "first", first, ("u", "v"))
    lefts: list[Tensor] = []
    rights: list[Tensor | None] = []
    for index, term in enumerate(terms):
        is_target = _is_pair(term) and term[0] is targets[0] and term[1] is targets[1]
        term_lefts, term_rights = (us, vs) if is_target else _check_term(NAME, f"terms[{index}]", term, (us, vs))
        lefts += term_lefts
        rights += term_rights
    numbers, tensor = _check_coefficients(NAME, coefficients, len(terms), len(us), us[0].device if us else torch.device("cpu"))
    if out is None:
        out_us, out_vs = ([torch.empty_like(x) for x in xs] for xs in (us, vs))
    elif _is_pair(out) and out[0] is targets[0] and out[1] is targets[1]:
        out_us, out_vs = us, vs
    else:
        out_us, out_vs = _check_factors(NAME, "out", out, (us, vs))
        check_same_length(NAME, targets=us, out=out_us)
        for side, pairs in enumerate((zip(us, out_us, strict=True), zip(vs, out_vs, strict=True))):
            for index, (x, o) in enumerate(pairs):
                if x.shape != o.shape or x.dtype != o.dtype:
                    got, wanted = f"{tuple(o.shape)} {o.dtype}", f"{tuple(x.shape)} {x.dtype}"
                    raise ValueError(f"{NAME}: out[{side}][{index}] is {got}, its target is {wanted}")
    if not us:
        return out_us, out_vs
    settings = (numbers, tensor, sweeps, proximal, first == "u")
    if records_nothing(us, vs, lefts, rights, out_us, out_vs) and is_plain_eager(*us, *vs, *lefts, *rights, *out_us, *out_vs):
        _write(begin_writing, (out_us, out_vs), us, vs, lefts, rights, *settings)
    elif out is None:
        return torch.ops.lowrank_kernels.grouped_lorsum(us, vs, lefts, resolved(rights), *settings)
    else:
        begin_writing()
        torch.ops.lowrank_kernels.grouped_lorsum_out(us, vs, lefts, resolved(rights), *settings, out_us, out_vs)
    if out is not None:
        torch.autograd.graph.increment_version([*out_us, *out_vs])
    return out_us, out_vs


def _empty_results(us: list[Tensor], vs: list[Tensor], *arguments: object) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(u) for u in us], [torch.empty_like(v) for v in vs]


def _write(
    begin_writing: Callable[[], object],
    out: Sequence[list[Tensor]],
    us: list[Tensor],
    vs: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor | None],
    numbers: list[float],
    coefficients: Tensor | None,
    sweeps: int,
    proximal: float,
    u_first: bool,
) -> None:
    """From the arguments that torch's dispatcher has, whose schema knows no tuples of tensors."""
    sums, how = Sums(lefts, rights, numbers, coefficients), Sweeps(sweeps, proximal, u_first)
    run_in_place(begin_writing, NAME, us[0].device.type, (us, vs), sums, how, tuple(out))


def _grouped_lorsum(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    out = _empty_results(*arguments)
    _write(do_nothing, out, *arguments)
    return out


def _grouped_lorsum_out(*arguments: Any) -> None:
    *given, out_us, out_vs = arguments
    _write(do_nothing, (out_us, out_vs), *given)


_SIGNATURE = (
    "Tensor[] us, Tensor[] vs, Tensor[] lefts, Tensor?[] rights, float[] numbers, Tensor? coefficients, "
    "int sweeps, float proximal, bool u_first"
)
define(NAME, f"({_SIGNATURE}) -> (Tensor[], Tensor[])", _grouped_lorsum, _empty_results)
define(f"{NAME}_out", f"({_SIGNATURE}, Tensor(a!)[] out_us, Tensor(b!)[] out_vs) -> ()", _grouped_lorsum_out, lambda *arguments: None)
no_backward(NAME, "weights after a step are constants in every method of this package")


def grouped_lorsum_product(terms: Sequence[Term], xs: Sequence[Tensor], coefficients: Tensor | Sequence[Coefficient]) -> list[Tensor]:
    """``Y_i = Σ_j c_ji P_ji (Q_jiᵀ X_i)`` for all layers of a list: sums of low-rank matrices times thin ones, the sum never formed.

    Args:
        terms, coefficients: as :func:`grouped_lorsum` takes them.
        xs: X_i (d_in, r): one r, dtype and device; any strides.

    Returns:
        Y_i (d_out, r), in fp32 at least. NaN and Inf stay in their layer.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, no terms; nothing was computed.

    The result is a constant for autograd; its backward says so.
    """
    name = f"{NAME}_product"
    check_list(name, "xs", xs)
    if isinstance(terms, Tensor) or not isinstance(terms, (list, tuple)) or not terms:
        raise ValueError(f"{name}: terms must be a non-empty list of (lefts, rights) or of lists of dense matrices, got {terms!r:.80}")
    check_same_length(name, xs=xs, **{"terms[0]": terms[0][0] if _is_pair(terms[0]) else terms[0]})
    heads: list[Tensor] = list(terms[0][0] if _is_pair(terms[0]) else terms[0])
    lefts: list[Tensor] = []
    rights: list[Tensor | None] = []
    for index, term in enumerate(terms):
        term_lefts, term_rights = _check_term(name, f"terms[{index}]", term, (heads, list(xs)))
        lefts += term_lefts
        rights += term_rights
    for index, x in enumerate(xs):
        if x.shape[1] != xs[0].shape[1]:
            raise ValueError(f"{name}: xs[{index}] has {x.shape[1]} columns, xs[0] has {xs[0].shape[1]}; call once per width")
    if not xs:
        return []
    numbers, tensor = _check_coefficients(name, coefficients, len(terms), len(xs), xs[0].device)
    if records_nothing(xs, lefts, rights) and is_plain_eager(*xs, *lefts, *rights):
        return _grouped_lorsum_product(list(xs), lefts, rights, numbers, tensor)
    return torch.ops.lowrank_kernels.grouped_lorsum_product(list(xs), lefts, resolved(rights), numbers, tensor)


def _empty_products(xs: list[Tensor], lefts: list[Tensor], *arguments: object) -> list[Tensor]:
    dtype = compute_dtype(xs[0].dtype)
    return [x.new_empty(left.shape[0], x.shape[1], dtype=dtype) for x, left in zip(xs, lefts, strict=False)]


def _grouped_lorsum_product(
    xs: list[Tensor], lefts: list[Tensor], rights: list[Tensor | None], numbers: list[float], coefficients: Tensor | None
) -> list[Tensor]:
    ys = _empty_products(xs, lefts)
    run(f"{NAME}_product", xs[0].device.type, xs, Sums(lefts, rights, numbers, coefficients), ys)
    return ys


define(
    f"{NAME}_product",
    "(Tensor[] xs, Tensor[] lefts, Tensor?[] rights, float[] numbers, Tensor? coefficients) -> Tensor[]",
    _grouped_lorsum_product,
    _empty_products,
)
no_backward(f"{NAME}_product", "full gradients are constants in every method of this package")
__all__ = ["grouped_lorsum", "grouped_lorsum_product"]
