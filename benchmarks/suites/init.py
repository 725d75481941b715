"""What happens once in a run: the re-parametrization of SDS-LoRA, and the dense truncated SVDs of LoRA-SB's initialization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowrank_kernels.ops import grouped_svd, grouped_svd_product

from ..harness import Case, Trial
from ..naive.sds_lora import svd_of_product
from ..shapes import MODELS
from . import Setting, on, suite
from .optimizer import Factors, at_least_single, make_factors

#: One (U, s, V) for each layer.
Triples = list[tuple[Tensor, Tensor, Tensor]]
#: Share of the best rank-r approximation's energy that LoRA-SB's start may miss.
MISSING_ENERGY = 0.005


def trial(run: Callable[[], Triples], judge: Callable[[Triples], tuple[float, float]], backend: str = "auto", ours: bool = False) -> Trial:
    found: Triples = []

    def call() -> None:
        found[:] = run()

    return Trial(call, lambda: judge(found), on(backend), ours=ours)


class ProductJudge:
    """``max|UΣVᵀ − BA|`` and ``max|UᵀU − I|`` relative to ``max|BA|`` and 1: within twice the naive code's, plus 8·eps."""

    def __init__(self, factors: Factors) -> None:
        self.products = [(B.double(), A.double()) for A, B, _, _ in factors.layers()]
        own = self._error(naive_products(factors))
        self.tolerance = 2 * own + 8 * torch.finfo(factors.params[0].dtype).eps

    def _error(self, found: Triples) -> float:
        worst = torch.zeros((), dtype=torch.float64, device=found[0][0].device)
        for (left, right), triple in zip(self.products, found, strict=True):
            u, s, v = (t.double() for t in triple)
            # Of a product of that size, some columns are enough: every singular direction is in all of them.
            exact = left @ right[:, :64]
            identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            residual = (u * s @ v[:64].mT - exact).abs().max() / exact.abs().max()
            worst = torch.stack([worst, residual, *((q.mT @ q - identity).abs().max() for q in (u, v))]).max()
        return worst.item()

    def __call__(self, found: Triples) -> tuple[float, float]:
        return self._error(found), self.tolerance


def naive_products(factors: Factors) -> Triples:
    """One layer after the other, in fp32 at least."""
    dtype, wide = factors.params[0].dtype, at_least_single(factors.params[0].dtype)
    found = [svd_of_product(B.to(wide), A.mT.to(wide)) for A, B, _, _ in factors.layers()]
    return [(u.to(dtype), s, v.to(dtype)) for u, s, v in found]


def batched_products(factors: Factors) -> Triples:
    """Stacked by shape: batched QRs and one batched SVD of all cores."""
    wide, layers = at_least_single(factors.params[0].dtype), factors.layers()
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (A, B, _, _) in enumerate(layers):
        groups.setdefault((B.shape[0], A.shape[1]), []).append(index)
    thin, order = [], []
    for indices in groups.values():
        left = torch.linalg.qr(torch.stack([layers[i][1] for i in indices]).to(wide))
        right = torch.linalg.qr(torch.stack([layers[i][0].mT for i in indices]).to(wide))
        thin.append((left, right))
        order += indices
    u, s, vh = torch.linalg.svd(torch.cat([left.R @ right.R.mT for left, right in thin]))
    found: Triples = [None] * len(layers)  # type: ignore[list-item]
    sizes = [len(indices) for indices in groups.values()]
    for (left, right), us, ss, vhs, indices in zip(thin, u.split(sizes), s.split(sizes), vh.split(sizes), groups.values(), strict=True):
        lefts, rights, dtype = left.Q @ us, right.Q @ vhs.mT, layers[0][0].dtype
        for place, index in enumerate(indices):
            found[index] = (lefts[place].to(dtype), ss[place], rights[place].to(dtype))
    return found


def our_products(factors: Factors) -> Triples:
    layers = factors.layers()
    us, ss, vs = grouped_svd_product([B for _, B, _, _ in layers], [A.mT for A, _, _, _ in layers], layers[0][0].shape[0])
    return list(zip(us, ss, vs, strict=True))


class EnergyJudge:
    """The share of the exact rank-r energy that is missing, on the worst layer; at most :data:`MISSING_ENERGY`."""

    def __init__(self, xs: list[Tensor], rank: int) -> None:
        self.xs = xs
        self.best = []
        for x in xs:
            wide = x.double() if x.shape[0] <= x.shape[1] else x.double().mT
            self.best.append(torch.linalg.eigvalsh(wide @ wide.mT)[-rank:].sum().item())

    def __call__(self, found: Triples) -> tuple[float, float]:
        missing = []
        for x, (u, _, v), best in zip(self.xs, found, self.best, strict=True):
            # ‖X − UUᵀXVVᵀ‖² = ‖X‖² − ‖UᵀXV‖² for orthonormal U and V
            q_u, q_v = torch.linalg.qr(u.double())[0], torch.linalg.qr(v.double())[0]
            missing.append(1 - (q_u.mT @ x.double() @ q_v).square().sum().item() / best)
        return max(missing), MISSING_ENERGY


def sign_matrices(setting: Setting) -> list[Tensor]:
    """Signs of Gaussian gradients for one block: the flattest spectrum that LoRA-SB meets."""
    generator = setting.generator()
    block = setting.layers[: len(setting.layers) // MODELS[setting.model].blocks]
    return [torch.randn(shape, generator=generator, device=setting.device).sign().to(setting.dtype) for shape in block]


def full_svd(xs: list[Tensor], rank: int) -> Triples:
    found = [torch.linalg.svd(x.to(at_least_single(x.dtype)), full_matrices=False) for x in xs]
    return [(u[:, :rank], s[:rank], vh[:rank].mT) for u, s, vh in found]


def svd_lowrank(xs: list[Tensor], rank: int, iterations: int) -> Triples:
    found = [torch.svd_lowrank(x.to(at_least_single(x.dtype)), q=min(rank + 8, *x.shape), niter=iterations) for x in xs]
    return [(u[:, :rank], s[:rank], v[:, :rank]) for u, s, v in found]


def tuned_svd_lowrank(xs: list[Tensor], rank: int, judge: EnergyJudge) -> Trial:
    """``torch.svd_lowrank`` with as few iterations as reach the bar (of 2, 4, 8, …, 64; its default is 2)."""
    for iterations in (2, 4, 8, 16, 32, 64):
        error, tolerance = judge(svd_lowrank(xs, rank, iterations))
        if error <= tolerance:
            break
    return trial(partial(svd_lowrank, xs, rank, iterations), judge)


def our_svd(xs: list[Tensor], rank: int) -> Triples:
    us, ss, vs = grouped_svd(xs, rank)
    return list(zip(us, ss, vs, strict=True))


@suite("init", "reparametrize", "lora_sb_init")
def cases(setting: Setting) -> Iterator[Case]:
    """``grouped_svd_product`` of all layers; ``grouped_svd`` of one block's sign matrices."""
    common = {"shapes": setting.shapes, "rank": setting.rank, "dtype": setting.dtype, "device": setting.device}
    factors = make_factors(setting)
    product_judge = ProductJudge(factors)
    item, wide = setting.dtype.itemsize, at_least_single(setting.dtype)
    elements = sum(p.numel() for p in factors.params)
    yield Case(
        op="reparametrize",
        bytes=2 * item * elements,  # read A and B, write U and V
        flops={wide: 4 * elements * setting.rank},  # orthogonalize both, and turn what came out
        tensors=len(factors.params),
        providers={
            "naive": lambda: trial(lambda: naive_products(factors), product_judge),
            "torch-batched": lambda: trial(lambda: batched_products(factors), product_judge),
            **{
                f"ours-{backend}": lambda b=backend: trial(lambda: our_products(factors), product_judge, b, True)
                for backend in setting.backends
            },
        },
        rival="torch-batched",
        **common,
    )
    xs = sign_matrices(setting)
    energy_judge = EnergyJudge(xs, setting.rank)
    yield Case(
        op="lora_sb_init",
        bytes=item * sum(x.numel() + setting.rank * sum(x.shape) for x in xs),
        flops={wide: 4 * setting.rank * sum(x.numel() for x in xs)},  # X times r columns, and its transpose
        tensors=len(xs),
        providers={
            "naive": lambda: trial(lambda: full_svd(xs, setting.rank), energy_judge),
            "torch-svd-lowrank": lambda: tuned_svd_lowrank(xs, setting.rank, energy_judge),
            **{
                f"ours-{backend}": lambda b=backend: trial(lambda: our_svd(xs, setting.rank), energy_judge, b, True)
                for backend in setting.backends
            },
        },
        rival="torch-svd-lowrank",
        **common,
    )
