"""LoRA-SB (Ponkshe et al. 2024): training of the core R of ``ΔW = s·B R A`` by the optimal gradient of its Theorem 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import check_choice
from ..backends.lists import on_device, partition
from ..backends.versions import Seen
from ..ops import grouped_eigh, grouped_gram
from ..pairs import core_owners
from ..parallel.shards import FLATTENED, KEEP_WHOLE, is_sharded
from ._shared.arguments import AdamWOptions, ParamsT
from ._shared.base import LowRankOptimizer
from ._shared.pairing import Core
from ._shared.state import moments

UPDATES = ("adam", "sgd")


class LoRASB(LowRankOptimizer):
    """AdamW or SGD on the cores R, with the gradient whose step ``s·B g A`` in weight space is closest to the full gradient G (Theorem 2)::

        g = s⁻² (BᵀB)⁻¹ ∂R (AAᵀ)⁻¹,      ∂R = s·Bᵀ G Aᵀ

    For orthonormal factors and s = 1 that is ∂R itself. Factors stored in bf16 are orthonormal to three digits only; the correction, from
    the factors as they are stored, keeps the step optimal all the same, because ∂R is summed in fp32. The inverse Gram
    matrices are taken in fp64, once: the factors are constant (and anew when something has written to them; not through ``.data``, whose
    writes torch does not count).

    Under ``update="sgd"`` ΔW does not depend on s (Theorem 4), under "adam" it does, as with every method that normalizes the gradient of
    its own parameters. The model is adapted with ``method="xs"`` and started by :func:`~lowrank_kernels.lora_sb_init`. Parameters that
    are no cores (heads, norms) get AdamW in either case.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`. ``scale`` is not used:
            s is read from the layers, which must live in this process since they hold A and B.
        update: "adam"; or "sgd", which is ``torch.optim.SGD`` on g, with decoupled weight decay.
        momentum: μ of ``m ← μ m + g``, for "sgd" only; 0 keeps no state for the cores. OneCycleLR and CyclicLR cycle ``betas`` instead:
            pass them ``cycle_momentum=False``.

    Raises:
        ValueError: no core among ``params``, arguments out of range; at a step, a core whose factors are zero or rank deficient.
    """

    trains_pairs, trains_cores = False, True
    fixed = frozenset({"update"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        update: str = "adam",
        momentum: float = 0.0,
        **options: Unpack[AdamWOptions],
    ) -> None:
        self._kept_whitening: dict[Any, tuple[Seen, Tensor, Tensor]] = {}
        method = {"update": update, "momentum": momentum}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, method_defaults=method, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept_whitening = {}  # not part of a copy or a checkpoint: made anew from the factors

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        check_choice(type(self).__name__, "update", group["update"], UPDATES)
        if group["momentum"] and group["update"] == "adam":
            raise ValueError(f"{type(self).__name__}: momentum is for update='sgd'; Adam's is betas[0]")

    def _accept_as_given(self) -> None:
        super()._accept_as_given()
        for core in self._cores:
            params = self.param_groups[core.position[0]]["params"]
            if core.position[1] >= len(params) or params[core.position[1]].ndim != 2:
                raise RuntimeError(f"{type(self).__name__}: {core.name} was a matrix and is none any more: {FLATTENED}")
            if is_sharded(params[core.position[1]]):
                raise RuntimeError(
                    f"{type(self).__name__}: {core.name} is sharded (a DTensor), and a step needs the whole core; {KEEP_WHOLE}"
                )

    def _keeps_state(self, group: dict[str, Any]) -> bool:
        return group["update"] == "adam" or bool(group["momentum"])

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        if group["update"] == "adam":
            return super()._factor_state(group, part, rank)
        return moments(part, "exp_avg") if self._keeps_state(group) else {}

    def _update(self) -> None:
        self._step_rest()
        for cores in self._alike_cores():
            self._step_cores(cores)

    def _alike_cores(self) -> Iterable[list[Core]]:
        """The cores in lists of one device, dtype, rank and parameter group."""

        def kind(core: Core) -> tuple[Any, ...]:
            r = self._at(core.position)
            return r.device, r.dtype, len(r), core.position[0]

        return partition(self._cores, kind).values()

    def _step_cores(self, cores: list[Core]) -> None:
        group = self.param_groups[cores[0].position[0]]
        left, right = self._whitening(cores)
        params = [self._at(core.position) for core in cores]
        active = [i for i, p in enumerate(params) if p.grad is not None]
        for i, core in enumerate(cores):
            if params[i].grad is None:
                self._miss(group, core.position[1])
        if not active:
            return
        if len(active) < len(cores):
            left, right = (torch.stack([maps[i] for i in active]) for maps in (left, right))  # a list as an index is copied to the device
        # A two-sided map. One side could be a map of the moment step, but then the gradients would be stacked for the other all the same.
        # W(WᵀgW)Wᵀ, not (WWᵀ)g(WWᵀ): the entries of the inverses cancel, at the price of cond(B)² cond(A)².
        stacked = torch.stack([params[i].grad for i in active])  # type: ignore[misc]
        mapped = left @ (left.mT @ stacked.to(left.dtype) @ right) @ right.mT
        options: dict[str, Any] = {}
        if group["update"] == "sgd":
            options, weight = self._sgd(group)
            mapped *= weight
        grads = mapped.to(stacked.dtype)
        members = [cores[i].position[1] for i in active]
        self._adamw(cores[0].position[0], members, is_factor=True, is_second=False, grads=list(grads), **options)

    def _whitening(self, cores: list[Core]) -> tuple[Tensor, Tensor]:
        """W and V with ``WWᵀ = s⁻²(BᵀB)⁻¹`` and ``VVᵀ = (AAᵀ)⁻¹``, (N, r, r) each, in fp64."""
        live = core_owners()
        layers: list[Any] = []
        for core in cores:
            layer = live.get(id(self._at(core.position)))
            if layer is None:
                raise ValueError(f"{type(self).__name__}: the layer of the core {core.name} is gone, and with it its factors A and B")
            layers.append(layer)
        factors = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
        key = (cores[0].position[0], factors[0].device, len(factors[0]), self._at(cores[0].position).dtype)
        kept = self._kept_whitening.get(key)
        if kept is None or not kept[0].still(factors):
            scales = on_device([1 / core.scale for core in cores], factors[0].device)
            left = _whitening_of([layer.lora_B for layer in layers], cores) * scales[:, None, None]
            kept = self._kept_whitening[key] = Seen(factors), left, _whitening_of([layer.lora_A.mT for layer in layers], cores)
        return kept[1:]

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        yield from super()._example_calls()
        live = core_owners()
        for cores in self._alike_cores():
            tall = [live[id(self._at(core.position))].lora_B.detach() for core in cores]  # type: ignore[operator]
            rank = tall[0].shape[1]
            grams = torch.empty(len(tall), rank, rank, dtype=torch.float64, device=tall[0].device)
            yield "grouped_gram", tall[0].device.type, (tall, None, grams)


def _whitening_of(tall: list[Tensor], cores: list[Core]) -> Tensor:
    """W with ``WWᵀ = (XᵀX)⁻¹`` of every factor X (d, r), in fp64: XW has orthonormal columns."""
    whitening = torch.empty(len(tall), tall[0].shape[1], tall[0].shape[1], dtype=torch.float64, device=tall[0].device)
    for members in partition(range(len(tall)), lambda i: tall[i].dtype).values():
        values, vectors = grouped_eigh(grouped_gram([tall[i] for i in members], dtype=torch.float64))
        floor = values[:, -1] * values.shape[1] * torch.finfo(torch.float64).eps
        for index, full_rank in zip(members, (values[:, 0] > floor).tolist(), strict=True):
            if not full_rank:
                raise ValueError(
                    f"LoRASB: a constant factor of {cores[index].name} is zero, rank deficient or not finite, so that Theorem 2 has no "
                    "unique answer; start the model by lora_sb_init or initialize(model, 'svd'), with a lower rank if need be"
                )
        whitening[members] = vectors / values.sqrt()[:, None, :]
    return whitening
