"""Measures of the low-rank gradient: what of the full gradient G reaches the weight, and how even it is.

Let ``G = ∂L/∂W`` (d_out, d_in) of one layer, and U_B, U_A the bases of the factors through which its gradient passes (B and
Aᵀ; for decoupled layers Q_B and Q_A) with singular values σ. A gradient step on the factors moves the weight along the
*equivalent gradient*, which for every method here is made of two symmetric maps on those bases::

    G̃ ∝ α LG + β GR + γ LGR,    L = U_B diag(l) U_Bᵀ,    R = U_A diag(r) U_Aᵀ

and the methods differ in the weights l, r as functions of σ, and in (α, β, γ): see :data:`RULES`. The scale s is a common factor
of G̃ and drops out of every measure. Cosines and ranks are functions of three small matrices per layer (:class:`Projections`), so
that G̃ is never formed.

**On Theorem 1 of OD-LoRA (Theorem 3.1 of SDS-LoRA).** As printed, that ⟨G, G̃⟩ at fixed energy is largest for uniform singular values, it
is false: ⟨G, G̃⟩ is linear in σ², so putting all energy on the direction with the largest ‖Gv‖ wins. What does hold is about
directions, for given subspaces: cos(G, GAᵀA) and cos(G, BBᵀG), *each alone*, are largest for uniform singular values
(Cauchy-Schwarz on Σσ²‖Gv‖² against Σσ⁴‖Gv‖²). Their sum has no such optimum in general. So read "alignment" as a cosine, and as a
measurement, not as what a theorem promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import as_number, check_choice
from ..ops import grouped_gram, grouped_qr, grouped_svd_product
from ..ops._tensor_checks import check_list, check_same_length, check_same_shapes

Weights = Callable[[Tensor, float], Tensor]


def _scaled(sigma: Tensor, damping: float) -> Tensor:
    return sigma


def _squared(sigma: Tensor, damping: float) -> Tensor:
    return sigma**2


def _isometric(sigma: Tensor, damping: float) -> Tensor:
    return _nonzero(sigma).to(sigma.dtype)


def _inverted(sigma: Tensor, damping: float) -> Tensor:
    return torch.where(_nonzero(sigma), sigma / (sigma**2 + damping), 0.0)


def _projected(sigma: Tensor, damping: float) -> Tensor:
    return torch.where(_nonzero(sigma), sigma**2 / (sigma**2 + damping), 0.0)


def _nonzero(sigma: Tensor) -> Tensor:
    """Which directions exist: a rank-deficient factor (B at the start) passes nothing along the others."""
    return sigma > 1e-6 * sigma[..., :1]


#: (α, β, γ) of ``α LG + β GR + γ LGR``.
SUM, TANGENT, CORE = (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """How a method passes G on.

    Attributes:
        equivalent: the weights l(σ), r(σ) of the equivalent gradient.
        gradient: h(σ) of the gradients that its optimizer accumulates: ``∇A = h(Σ_B) U_BᵀG``, ``∇B = G U_A h(Σ_A)`` up to rotations.
        terms: (α, β, γ).
    """

    equivalent: Weights
    gradient: Weights
    terms: tuple[float, float, float] = SUM


#: By method, in the notation above (damping δ).
RULES = {
    "lora": Rule(_squared, _scaled),  # s²(GAᵀA + BBᵀG)
    "sds": Rule(_squared, _scaled),  # s²(GQ_AQ_Aᵀ + Q_BQ_BᵀG): LoRA on bases, whose σ are 1
    "preconditioned": Rule(_projected, _inverted),  # s²(GP_A + P_BG): ScaledGD, ScaledAdamW; AltLoRA's two turns together
    "lora-rite": Rule(_projected, _isometric),  # the same step, from unmagnified gradients
    "lora-pro": Rule(_projected, _inverted, TANGENT),  # GP_A + P_BG - P_BGP_A: G's projection onto the tangent space
    "oplora": Rule(_projected, _inverted, TANGENT),  # one sweep, U before V, to first order in lr
    "lora-xs": Rule(_squared, _scaled, CORE),  # s²BBᵀGAᵀA
    "lora-sb": Rule(_projected, _inverted, CORE),  # P_BGP_A, Theorem 2 of LoRA-SB
}

#: The rule of each optimizer, by class name.
RULE_OF = {
    "SDSLoRA": "sds",
    "ODLoRA": "sds",
    "ScaledGD": "preconditioned",
    "ScaledAdamW": "preconditioned",
    "AltLoRA": "preconditioned",
    "AltLoRAPlus": "preconditioned",
    "LoRAPro": "lora-pro",
    "LoRARITE": "lora-rite",
    "OPLoRA": "oplora",
    "LoRASB": "lora-sb",
}


def rule(method: str) -> Rule:
    """The rule of this name.

    Raises:
        ValueError: there is none.
    """
    check_choice("diagnostics", "method", method, RULES)
    return RULES[method]


def _check_factors(function: str, **lists: Sequence[Tensor]) -> None:
    """Refuse lists of matrices that are empty, of different lengths, or not of one width, dtype and device."""
    (_, first), *_ = lists.items()
    for argument, factors in lists.items():
        check_list(function, argument, factors)
        if not len(factors):
            raise ValueError(f"{function}: {argument} is empty; pass one factor at least")
        for index, factor in enumerate(factors):
            if factor.shape[1] != first[0].shape[1]:
                raise ValueError(f"{function}: {argument}[{index}] must have {first[0].shape[1]} columns, got {tuple(factor.shape)}")
    check_same_length(function, **lists)


def _check_values(function: str, argument: str, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Refuse what are no singular values (…, k), or not of this shape."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        what = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{function}: {argument} must be a floating-point tensor of singular values, got {what}")
    if values.ndim == 0 or not values.shape[-1] or (shape is not None and values.shape != shape):
        raise ValueError(f"{function}: {argument} must be {shape or '(…, k) with k ≥ 1'}, got {tuple(values.shape)}")


def _check_measured(function: str, p: Projections, sigma_b: Tensor, sigma_a: Tensor, damping: float) -> None:
    if not isinstance(p, Projections):
        raise TypeError(f"{function}: p must be Projections, got {type(p).__name__}")
    for argument, values in (("sigma_b", sigma_b), ("sigma_a", sigma_a)):
        _check_values(function, argument, values, tuple(p.core.shape[:2]))
    as_number(function, "damping", damping, 0.0)


@dataclass(frozen=True)
class Projections:
    """All that the measures need of N gradients, fp64: ``C = U_BᵀG`` (r, d_in) and ``D = GU_A`` (d_out, r) enter by their Grams.

    norm2: ‖G‖² (N,); left: CCᵀ (N, r, r); right: DᵀD (N, r, r); core: U_BᵀGU_A (N, r, r).
    """

    norm2: Tensor
    left: Tensor
    right: Tensor
    core: Tensor

    @staticmethod
    @torch.no_grad()
    def of(gradient: Tensor, basis_b: Tensor, basis_a: Tensor) -> Projections:
        """Of one G (d_out, d_in), U_B (d_out, r) and U_A (d_in, r); N = 1. Two thin GEMMs and no wait for the device.

        Raises:
            TypeError, ValueError: they are not real matrices of these shapes.
        """
        for argument, matrix in (("gradient", gradient), ("basis_b", basis_b), ("basis_a", basis_a)):
            check_list("Projections", argument, [matrix])
        if gradient.shape != (len(basis_b), len(basis_a)) or basis_b.shape[1] != basis_a.shape[1]:
            raise ValueError(
                f"Projections: gradient must be (d_out, d_in), basis_b (d_out, r) and basis_a (d_in, r), got {tuple(gradient.shape)}, "
                f"{tuple(basis_b.shape)} and {tuple(basis_a.shape)}"
            )
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        c, d = basis_b.to(gradient.dtype).mT @ gradient, gradient @ basis_a.to(gradient.dtype)
        core = c @ basis_a.to(gradient.dtype)
        norm = torch.linalg.vector_norm(gradient).double()
        c, d = c.double(), d.double()
        return Projections((norm**2)[None], (c @ c.mT)[None], (d.mT @ d)[None], core.double()[None])

    @staticmethod
    def concatenate(parts: Sequence[Projections]) -> Projections:
        """Many layers as one batch."""
        return Projections(*(torch.cat([getattr(p, key) for p in parts]) for key in ("norm2", "left", "right", "core")))


@dataclass(frozen=True)
class Frames:
    """Bases and singular values of N factors of one rank: ``X_i = U_i diag(σ_i) (…)ᵀ``.

    bases: U_i (d_i, r); sigma: (N, r) in fp64, descending.
    """

    bases: list[Tensor]
    sigma: Tensor


@torch.no_grad()
def frames(factors: Sequence[Tensor]) -> Frames:
    """Of tall factors (d_i, r) of one rank, dtype and device: one grouped QR and one batched r × r SVD for all.

    Raises:
        TypeError, ValueError: there are none, or they are something else.
    """
    _check_factors("frames", factors=factors)
    qs, rs = grouped_qr(list(factors))
    u, sigma, _ = torch.linalg.svd(rs.double())
    return Frames([q @ rotation.to(q.dtype) for q, rotation in zip(qs, u, strict=True)], sigma)


def alignment(p: Projections, sigma_b: Tensor, sigma_a: Tensor, method: str = "lora", damping: float = 0.0, ratio: float = 1.0) -> Tensor:
    """The cosine of G and the equivalent gradient G̃ of ``method``, (N,); NaN where G or G̃ is zero.

    Args:
        p: projections of the gradients onto the bases.
        sigma_b, sigma_a: (N, r), as :func:`frames` gives them.
        method: a key of :data:`RULES`.
        damping: δ of the preconditioned family.
        ratio: the learning rate of B over that of A (LoRA+).

    Raises:
        TypeError, ValueError: an unknown method, singular values that do not fit ``p``, a negative δ or a ratio that is not positive.
    """
    chosen = rule(method)
    _check_measured("alignment", p, sigma_b, sigma_a, damping)
    as_number("alignment", "ratio", ratio, positive=True)
    left, right = chosen.equivalent(sigma_b, damping), chosen.equivalent(sigma_a, damping)
    return _cosine(p, left, right * ratio if chosen.terms == SUM else right, chosen.terms)


def _cosine(p: Projections, left: Tensor, right: Tensor, terms: tuple[float, float, float]) -> Tensor:
    c, d, e = p.left.diagonal(dim1=-2, dim2=-1), p.right.diagonal(dim1=-2, dim2=-1), p.core**2

    def both(x: Tensor, y: Tensor) -> Tensor:  # ⟨U_B diag(x) U_Bᵀ G, G U_A diag(y) U_Aᵀ⟩
        return torch.einsum("ni,nij,nj->n", x, e, y)

    alpha, beta, gamma = terms
    inner = alpha * (left * c).sum(-1) + beta * (right * d).sum(-1) + gamma * both(left, right)
    norm2 = alpha**2 * (left**2 * c).sum(-1) + beta**2 * (right**2 * d).sum(-1) + gamma**2 * both(left**2, right**2)
    norm2 = norm2 + 2 * alpha * beta * both(left, right) + 2 * gamma * (alpha * both(left**2, right) + beta * both(left, right**2))
    return inner / (norm2 * p.norm2).sqrt()


def gradient_ranks(
    p: Projections, sigma_b: Tensor, sigma_a: Tensor, method: str = "lora", damping: float = 0.0, *, scaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Effective ranks (N,) of ∇A and ∇B as ``method`` accumulates them (SDS-LoRA Figure 1(a)).

    Args:
        scaled: False leaves the singular values out: ``U_BᵀG`` and ``GU_A`` for every method.

    With an r × r core in place of A and B (LoRA-XS, LoRA-SB) both are the rank of its gradient.

    Raises:
        TypeError, ValueError: an unknown method, singular values that do not fit ``p``, a negative δ.
    """
    chosen = rule(method)
    _check_measured("gradient_ranks", p, sigma_b, sigma_a, damping)
    weights = chosen.gradient if scaled else _isometric
    h_b, h_a = weights(sigma_b, damping), weights(sigma_a, damping)
    if chosen.terms == CORE:
        values = torch.linalg.svdvals(h_b[..., None] * p.core * h_a[..., None, :])
        return effective_rank(values), effective_rank(values)
    right = p.right
    if scaled and chosen.terms == TANGENT:  # ∇B is that of (I - L)G
        kept = chosen.equivalent(sigma_b, damping)
        right = right - p.core.mT @ ((2 * kept - kept**2)[..., None] * p.core)

    def values_of(gram: Tensor, h: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(h[..., None] * gram * h[..., None, :]).clamp(min=0).sqrt()

    return effective_rank(values_of(p.left, h_b)), effective_rank(values_of(right, h_a))


def effective_rank(singular_values: Tensor) -> Tensor:
    """``exp`` of the entropy of the normalized singular values (…, k) → (…); between 1 and k, NaN for a zero matrix.

    Raises:
        TypeError, ValueError: they are no singular values.
    """
    _check_values("effective_rank", "singular_values", singular_values)
    shares = singular_values / singular_values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def stable_rank(singular_values: Tensor) -> Tensor:
    """``‖·‖_F² / ‖·‖₂²`` from the singular values (…, k) → (…); NaN for a zero matrix.

    Raises:
        TypeError, ValueError: they are no singular values.
    """
    _check_values("stable_rank", "singular_values", singular_values)
    return (singular_values**2).sum(-1) / singular_values.amax(-1) ** 2


@torch.no_grad()
def stable_ranks(factors: Sequence[Tensor]) -> Tensor:
    """``‖X‖_F² / ‖X‖₂²`` (N,) of tall factors (d_i, r) of one rank (SDS-LoRA Figure 5), from one grouped Gram.

    Raises:
        TypeError, ValueError: there are none, or they are something else.
    """
    _check_factors("stable_ranks", factors=factors)
    grams = grouped_gram([factor.detach() for factor in factors], dtype=torch.float64)
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1) / torch.linalg.eigvalsh(grams)[..., -1]


def subspace_drift(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """Cosine ``⟨Q_new, Q_old⟩ / r`` (N,) of bases (d_i, r) with orthonormal columns (SDS-LoRA Figure 4): 1 where nothing moved.

    Raises:
        TypeError, ValueError: there are none, or they do not have the same shapes one by one.
    """
    _check_factors("subspace_drift", new=new, old=old)
    check_same_shapes("subspace_drift", "new", new, "old", old)
    return torch.stack([(n * o).sum() / n.shape[1] for n, o in zip(new, old, strict=True)]).double()


@torch.no_grad()
def delta_spectrum(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """Singular values (N, k), descending, of ``left_i @ right_iᵀ`` for factors (m_i, k) and (n_i, k); the product is never formed.

    Raises:
        TypeError, ValueError: there are none, or they are not of one k.
    """
    _check_factors("delta_spectrum", lefts=lefts, rights=rights)
    width = lefts[0].shape[1]
    if all(factor.shape[0] >= width for factor in (*lefts, *rights)):
        return grouped_svd_product(list(lefts), list(rights), width)[1].double()
    # [Q_B B] is wider than it is tall when 2r exceeds the layer: there QR leaves a smaller triangle.
    spectra = []
    for left, right in zip(lefts, rights, strict=True):
        values = torch.linalg.svdvals(torch.linalg.qr(left.double())[1] @ torch.linalg.qr(right.double())[1].mT)
        spectra.append(torch.cat([values, values.new_zeros(width - len(values))]))
    return torch.stack(spectra)
