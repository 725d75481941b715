"""Where adapters start: at LoRA-SB's first full fine-tuning step (``lora_sb_init``); at singular vectors of W0 or of its gradient
(``initialize``)."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_integer, as_number, check_choice
from ..backends.dtypes import compute_dtype
from ..backends.lists import partition
from ..ops import grouped_svd
from ..parallel.shards import is_sharded
from ._gradients import BaseGradients, LossFunction, broadcast_from_first
from ._model import adapted_layers, check_model, parallel_wrapper
from .layer import LowRankLinear, holds_matrix, is_plain

UPDATES = ("adam", "sgd")
#: The starts of :func:`initialize`, and the adapters that they are for.
STARTS = {"svd": "xs", "pissa": "lora", "lora-ga": "lora"}
#: What an adapter's ΔW is, for messages.
_FORMS = {"xs": "s·B R A", "lora": "s·B A"}


@dataclass(frozen=True)
class InitReport:
    """What a start cost and what it kept.

    Attributes:
        energy: ``‖X_r‖_F² / ‖X‖_F²`` of every layer: the share that the singular vectors taken hold of the matrix X they were taken from:
            the update for LoRA-SB, W0 for "svd" and "pissa", the gradient (rank 2r) for "lora-ga".
        samples: how many samples the gradients were taken from, on all ranks together; 0 where none are needed.
        seconds: of the whole call; ``svd_seconds`` of it went into the truncated SVDs.
        accumulator_bytes: the running sums of the gradients, which lived on ``accumulator_device``.
        peak_memory_bytes: growth during the call of the peak of what the device had allocated (of the process's resident memory on a
            CPU): 0 if an earlier peak was higher, None where the system does not tell.
    """

    energy: dict[str, float]
    samples: int
    seconds: float
    svd_seconds: float
    accumulator_bytes: int
    accumulator_device: str
    peak_memory_bytes: int | None

    def __str__(self) -> str:
        worst = min(self.energy, key=self.energy.__getitem__)
        return (
            f"{len(self.energy)} layers from {self.samples} samples in {self.seconds:.1f} s ({self.svd_seconds:.2f} s of SVDs), "
            f"accumulators {self.accumulator_bytes / 2**20:.1f} MiB on {self.accumulator_device}; "
            f"least energy {self.energy[worst]:.4f} in {worst}"
        )


def lora_sb_init(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    lr: float,
    update: str = "adam",
    samples: int | None = None,
    accumulate_on: str = "cpu",
    oversample: int = 8,
    iterations: int | None = None,
    training: bool = False,
    progress: bool = True,
) -> InitReport:
    """Start every ``ΔW = s·B R A`` of ``model`` at the best rank-r approximation of full fine-tuning's first step (LoRA-SB, Eq. 1, 2, 7).

    ``ΔW_avg = −lr·sign(Σ ∇L(W0, x))`` (Adam's first step; for "sgd" ``−lr·mean ∇L``), truncated SVD ``U S Vᵀ``, ``B = U``, ``A = Vᵀ``,
    ``R = diag(S)/s``. Gradients are those of W0: whatever the adapters held before is left out, and overwritten. ΔW is not subtracted from
    W0; training starts one approximate step ahead. Call it before the optimizer is made.

    One backward pass per batch. Gradients of all layers never exist at once: each adapted layer forms ``∂yᵀ x`` when the backward pass
    reaches it, adds it to its sum and drops it. So frozen, quantized (the gradient is that of the dequantized weight) and tied weights
    (each use has its own) need nothing special. Weights, ``requires_grad``, ``.grad``, training mode, torch's random state and its
    switch for fast paths (off meanwhile) are afterwards what they were, even when something fails half-way; then the adapters are, too.

    Under ``torch.distributed`` every rank calls it with its own batches; sums are added over the ranks, and rank 0's factors are
    everybody's. The model inside a DDP wrapper is called, not the wrapper.

    Args:
        model: adapted with ``method="xs"``.
        batches: about a thousandth to a hundredth of the training data (the paper: 1/1000).
        loss_fn: ``loss_fn(model, batch)`` → the scalar loss, a mean over the batch's samples.
        lr: η, the learning rate that full fine-tuning would have; it sets the size of the start only.
        update: "adam" or "sgd", whose first step is approximated.
        samples: stop after the batch that completes so many samples (on this rank); None takes all batches. A batch counts as many as its
            first tensor has rows, and weighs as many.
        accumulate_on: where the sums of the gradients live, fp32 (fp64 for an fp64 model) and as large as the adapted weights: "cpu"; or
            "device", faster for models that leave enough memory.
        oversample, iterations: of :func:`lowrank_kernels.ops.grouped_svd`. The defaults keep 0.995 of the exact SVD's energy.
        training: take the gradients in training mode, as transformers' gradient checkpointing needs; False: without dropout. Running
            statistics of batch norms are as before in either case.
        progress: show a bar if ``tqdm`` is installed.

    Raises:
        TypeError, ValueError: no adapters of method "xs", sharded weights, no batch, a loss that is not a finite scalar or depends on no
            adapted layer, a layer that no gradient (the ``out_proj`` of ``nn.MultiheadAttention``, say) or a gradient that is not finite
            reached (named). Nothing was changed then.
    """
    root = check_model("lora_sb_init", model)
    layers = _layers_of("lora_sb_init", model, "xs")
    lr = as_number("lora_sb_init", "lr", lr, positive=True)
    check_choice("lora_sb_init", "update", update, UPDATES)
    _check_svd("lora_sb_init", oversample, iterations)
    meter = _CostMeter(next(iter(layers.values())).lora_A.device)
    gradients = BaseGradients("lora_sb_init", layers, accumulate_on, samples)
    gradients.sum_over(root, batches, loss_fn, training, progress)

    def first_step(name: str) -> Tensor:
        total = gradients.take(name)
        return total.sign_().mul_(-lr) if update == "adam" else total.mul_(-lr / gradients.seen)

    started = meter.seconds()
    factors, energy = _truncate(layers, first_step, oversample, iterations)
    for name, (u, s, v) in factors.items():
        _write(layers[name], u, v, torch.diag(s / layers[name].scale))
    return _report(energy, meter, started, gradients)


def initialize(
    model: nn.Module,
    start: str = "svd",
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    samples: int | None = None,
    accumulate_on: str = "cpu",
    gamma: float = 16.0,
    oversample: int = 8,
    iterations: int | None = None,
    training: bool = False,
    progress: bool = True,
) -> InitReport:
    """Start every adapter of ``model`` at singular vectors of its weight ``W0 = U S Vᵀ``, or of its gradient. The output stays as it is.

    * "svd", for ``ΔW = s·B R A``: LoRA-XS's own start (Bałazy et al. 2024), ``B = U_r diag(S_r)``, ``A = V_rᵀ``. R, which there is Gaussian
      with a standard deviation of 1e-5, is zero: ΔW = 0, its gradient is not, and nothing depends on a seed. Quantized weights are read
      through their layer, column by column of the identity.
    * "pissa", for ``ΔW = s·B A``: ``B₀ = U_r diag(S_r/s)^½``, ``A₀ = diag(S_r/s)^½ V_rᵀ`` (Meng et al. 2024, Eq. 2 and 3).
    * "lora-ga", for ``ΔW = s·B A``: of the gradient ``∇L(W0) = U S Vᵀ`` over ``batches``, ``A₀ = c V_{1…r}ᵀ``, ``B₀ = c U_{r+1…2r}`` with
      ``c = d_out^¼/√γ`` (Wang et al. 2024, Algorithm 1; meant for ``rank_scaling="rslora"``). The gradients are taken as in
      :func:`lora_sb_init`, whose arguments of the same names these are.

    The last two start at a product that is not zero, so **they change the base weights**, in place: ``W0 ← W0 − s·B₀A₀``, as PEFT does.
    The layers keep B₀ and A₀. Hence an adapter file holds them, and :func:`~lowrank_kernels.load_adapter` loads it over the original base
    model; :func:`~lowrank_kernels.delta_weights` and :func:`~lowrank_kernels.export_peft` are relative to the original W0. A weight that
    cannot change, since it is quantized or shared with another module, is refused; so is a layer with hooks or a forward of its own, which
    would compute from the changed weight what the adapter beside it does not make up for.

    Args:
        model: adapted with ``method="xs"`` for "svd", ``method="lora"`` for the others. Call it before the optimizer is made.
        start: "svd", "pissa" or "lora-ga".
        batches, loss_fn, samples, accumulate_on, training, progress: for "lora-ga" only.
        gamma: γ of "lora-ga": larger starts smaller.
        oversample, iterations: of :func:`lowrank_kernels.ops.grouped_svd`.

    Raises:
        TypeError, ValueError: no adapters of that method, an unknown start, weights that are sharded, not finite, quantized, shared, were
            changed by an earlier start or belong to a layer with hooks or a forward of its own, gradients as in :func:`lora_sb_init`, a
            rank too large. Nothing was changed then.
    """
    root = check_model("initialize", model)
    check_choice("initialize", "start", start, STARTS, hint="; LoRA-SB's is lora_sb_init")
    layers = _layers_of("initialize", model, STARTS[start])
    if start != "svd":
        check_changeable("initialize", root, layers)
    if {batches is not None, loss_fn is not None} != {start == "lora-ga"}:
        raise TypeError("initialize: 'lora-ga' needs batches= and loss_fn=, the other starts take neither")
    gamma = as_number("initialize", "gamma", gamma, positive=True)
    _check_svd("initialize", oversample, iterations)
    meter = _CostMeter(next(iter(layers.values())).lora_A.device)
    gradients: BaseGradients | None = None
    matrix: Callable[[str], Tensor] = partial(_finite_weight, layers)
    factor = 1
    if batches is not None and loss_fn is not None:
        for name, layer in layers.items():
            if 2 * layer.rank > min(layer.in_features, layer.out_features):
                raise ValueError(f"initialize: 'lora-ga' takes 2r singular vectors, too many for {name!r} with r = {layer.rank}")
        gradients = BaseGradients("initialize", layers, accumulate_on, samples)
        gradients.sum_over(root, batches, loss_fn, training, progress)
        matrix, factor = gradients.take, 2
    started = meter.seconds()
    factors, energy = _truncate(layers, matrix, oversample, iterations, factor)
    for name, (u, s, v) in factors.items():
        layer = layers[name]
        if start == "svd":
            _write(layer, u * s, v, torch.zeros_like(layer.lora_R))
        elif start == "pissa":
            root_s = (s / layer.scale).sqrt()
            layer.start_from((v * root_s).mT, u * root_s)
        else:
            c = layer.out_features**0.25 / math.sqrt(gamma)
            layer.start_from(c * v[:, : layer.rank].mT, c * u[:, layer.rank :])
    return _report(energy, meter, started, gradients)


def _report(energy: dict[str, float], meter: _CostMeter, started: float, gradients: BaseGradients | None) -> InitReport:
    seconds = meter.seconds()
    seen, held, where = (0, 0, str(meter.device)) if gradients is None else (gradients.seen, gradients.bytes, gradients.where)
    return InitReport(energy, seen, seconds, seconds - started, held, where, meter.peak_growth())


# -------------------------------------------------------------------------------------------------------------------- layers


def _layers_of(function: str, model: nn.Module, method: str) -> dict[str, LowRankLinear]:
    """The layers to start, none of them sharded or without memory."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.method == method}
    if not layers:
        raise ValueError(f"{function}: the model has no adapter ΔW = {_FORMS[method]}; adapt(model, method={method!r}, …) first")
    wrapper = parallel_wrapper(model)
    sharded = wrapper if wrapper is not None and "DistributedDataParallel" not in wrapper and wrapper != "DataParallel" else None
    for name, layer in layers.items():
        tensors = [*layer.parameters(), *layer.buffers()]
        if sharded or any(map(is_sharded, tensors)):
            raise ValueError(
                f"{function}: {name!r} is sharded ({sharded or 'DTensor'}), which is not supported; "
                "start the model before it is sharded, or load factors that were saved by save_adapter"
            )
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"{function}: {name!r} is on the meta device; materialize the model first")
    return layers


def check_changeable(function: str, root: nn.Module, layers: Mapping[str, LowRankLinear]) -> None:
    """Refuse layers whose base weight ``W0 ← W0 − s·B₀A₀`` must not or cannot change.

    Raises:
        ValueError: it is no floating-point matrix (quantized), it is computed from other parameters (weight norm), another module holds it
            too, an earlier start has changed it, or its layer does more than to multiply by it (hooks, a forward of its own).
    """
    if not layers:
        return
    uses = Counter(p.data_ptr() for module in root.modules() for p in module._parameters.values() if p is not None and not p.is_meta)
    for name, layer in layers.items():
        base = layer.base_layer
        if layer.start_A is not None:
            raise ValueError(f"{function}: an earlier start has changed the base weight of {name!r}; begin with a fresh base model")
        if not holds_matrix(base):
            raise ValueError(
                f"{function}: this start changes base weights, and {name!r} has a {type(base.weight).__name__} of {base.weight.dtype}; "
                "leave it out of target_modules, or start a model with floating-point weights and quantize it then"
            )
        if not is_plain(base):  # W0 − s·B₀A₀ goes through it, the adapter's + s·B₀A₀ beside it
            raise ValueError(
                f"{function}: this start changes base weights, and {name!r} would not compute what it did: its {type(base).__name__} has "
                "hooks or a forward of its own; leave it out of target_modules, or remove the hooks first"
            )
        if "weight" not in base._parameters:  # a write would go into what is computed anew when it is read
            raise ValueError(
                f"{function}: this start changes base weights, and that of {name!r} is no parameter but computed (weight norm, another "
                "parametrization); leave it out of target_modules, or remove the parametrization first"
            )
        if not base.weight.is_meta and uses[base.weight.data_ptr()] > 1:
            raise ValueError(
                f"{function}: this start changes base weights, and that of {name!r} is shared with another module; untie them "
                "or leave it out of target_modules"
            )
        if not layer.scale > 0:
            raise ValueError(f"{function}: the scale of {name!r} must be positive, got {layer.scale}")


def _finite_weight(layers: Mapping[str, LowRankLinear], name: str) -> Tensor:
    matrix = _base_weight(layers[name].base_layer)
    if not (matrix.isfinite().all() and matrix.any()):
        raise ValueError(f"initialize: the weight of {name!r} is zero or not finite")
    return matrix


@torch.no_grad()
def _base_weight(base: nn.Linear) -> Tensor:
    """W0 (d_out, d_in) in fp32 at least."""
    if holds_matrix(base):
        return base.weight.detach().to(compute_dtype(base.weight.dtype))
    out = base(torch.eye(base.in_features, device=base.weight.device))  # a quantized weight
    return (out if base.bias is None else out - base.bias).to(torch.float32).mT.contiguous()


@torch.no_grad()
def _write(layer: LowRankLinear, b: Tensor, a_transposed: Tensor, core: Tensor) -> None:
    layer.lora_B.copy_(b)
    layer.lora_A.copy_(a_transposed.mT)
    layer.lora_R.copy_(core)


Triples = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def _truncate(
    layers: Mapping[str, LowRankLinear],
    matrix: Callable[[str], Tensor],
    oversample: int,
    iterations: int | None,
    factor: int = 1,
) -> tuple[dict[str, Triples], dict[str, float]]:
    """Leading ``factor·r`` singular triples of ``matrix(name)`` for every layer (rank 0's), and the share of its energy that they hold.

    Same-shaped layers go in one batch, but no batch is larger than the largest layer: that is the memory which the gradients needed.
    """

    def kind(name: str) -> tuple[Any, ...]:
        layer = layers[name]
        return layer.out_features, layer.in_features, layer.rank, layer.lora_A.device, _wide(layer)

    largest = max(layer.in_features * layer.out_features for layer in layers.values())
    factors: dict[str, Triples] = {}
    energy: dict[str, float] = {}
    for (d_out, d_in, rank, *_), names in partition(layers, kind).items():
        count = max(1, largest // (d_out * d_in))
        for chunk in (names[i : i + count] for i in range(0, len(names), count)):
            matrices = [matrix(name) for name in chunk]
            norms = torch.stack([x.norm() for x in matrices])
            us, ss, vs = grouped_svd(matrices, factor * rank, oversample=oversample, iterations=iterations)
            del matrices
            shares = (ss.norm(dim=1) / norms).square().tolist()
            factors |= dict(zip(chunk, zip(us, ss, vs, strict=True), strict=True))
            energy |= dict(zip(chunk, shares, strict=True))
    for triple in factors.values():
        for tensor in triple:
            broadcast_from_first(tensor)
    return factors, {name: energy[name] for name in layers}


def _wide(layer: LowRankLinear) -> torch.dtype:
    """What sums and decompositions of the layer's matrices are computed in: fp32 at least."""
    return compute_dtype(layer.lora_A.dtype)


def _check_svd(function: str, oversample: int, iterations: int | None) -> None:
    """Refuse, before the backward passes, what :func:`_truncate` could not take after them."""
    as_integer(function, "oversample", oversample, least=0)
    if iterations is not None:
        as_integer(function, "iterations", iterations, least=0)


# ---------------------------------------------------------------------------------------------------------------------- costs


class _CostMeter:
    """Time and peak memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = time.perf_counter()
        self._before, self._peak = self._memory()

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self._start

    def _memory(self) -> tuple[int | None, int | None]:
        """What is allocated now, and the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or sys.platform == "win32":
            return None, None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak

    def peak_growth(self) -> int | None:
        peak = self._memory()[1]
        if peak is None or self._before is None or self._peak is None:
            return None
        return peak - self._before if peak > self._peak else 0
