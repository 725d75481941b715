"""The gradients of W0 that a start is made of: each layer's, summed over batches and ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_flag, as_integer, check_choice, first_few
from ..backends.dtypes import compute_dtype
from ..parallel.ranks import data_parallel_group
from ._model import uncalled_layers
from .layer import LowRankLinear

LossFunction = Callable[[nn.Module, Any], Tensor]

ACCUMULATORS = ("cpu", "device")


class _GradientSum:
    """The running sum of one layer's gradients: fp32 at least."""

    def __init__(self, layer: LowRankLinear, accumulate_on: str) -> None:
        device = layer.lora_A.device if accumulate_on == "device" else torch.device("cpu")
        self.total = torch.zeros(layer.out_features, layer.in_features, dtype=compute_dtype(layer.lora_A.dtype), device=device)
        self.weight = 1
        self.calls = 0

    def add(self, grad: Tensor, x: Tensor) -> None:
        """``∂yᵀ x`` of one backward pass through the layer, times the number of samples that its loss was the mean of."""
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
        self.calls += 1
        if self.total.dtype == grad.dtype and self.total.device == grad.device:
            self.total.addmm_(grad.mT, x, alpha=self.weight)  # nothing but the sum itself is ever held
        else:
            self.total.add_((grad.mT @ x).to(self.total.device), alpha=self.weight)


class _Capture(torch.autograd.Function):
    """The identity on a layer's output y; its backward pass hands ``∂y`` and x to the layer's sum. The anchor makes y ask for one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, gradient: _GradientSum) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return y.clone()  # a view could not be changed in place, as `ReLU(inplace=True)` does

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.gradient.add(grad, x)
        return grad, None, None, None


def _capturing(gradient: _GradientSum) -> Callable[[Tensor, Tensor], Tensor]:
    anchors: dict[torch.device, Tensor] = {}

    def capture(x: Tensor, y: Tensor) -> Tensor:
        anchor = anchors.setdefault(y.device, torch.zeros((), device=y.device, requires_grad=True))
        return _Capture.apply(y, x, anchor, gradient)

    return capture


@contextlib.contextmanager
def _as_found(root: nn.Module, layers: Mapping[str, LowRankLinear], training: bool) -> Iterator[None]:
    """What taking gradients switches, put back at the end: capture, training mode, requires_grad, statistics, random state, and torch's
    fast path, in which an encoder whose parameters ask for no gradient calls no layer."""
    modes = [(module, module.training) for module in root.modules()]
    asking = [(p, p.requires_grad) for p in root.parameters()]
    norms = [module for module in root.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)] if training else []
    devices = {p.device for p, _ in asking if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.random.fork_rng(devices=sorted(device.index for device in devices)),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            root.train(bool(training))
            for p, _ in asking:
                p.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for layer in layers.values():
                layer._gradient_tap = None
            for module, mode in modes:
                module.training = mode
            for p, asked in asking:
                p.requires_grad_(asked)
            with torch.no_grad():
                for buffer, value in statistics:
                    buffer.copy_(value)


class BaseGradients:
    """The summed gradients of W0 for all layers, over all batches and ranks."""

    def __init__(self, function: str, layers: Mapping[str, LowRankLinear], accumulate_on: str, samples: int | None) -> None:
        check_choice(function, "accumulate_on", accumulate_on, ACCUMULATORS)
        if samples is not None:
            as_integer(function, "samples", samples)
        self.function, self.layers, self.samples, self.seen = function, layers, samples, 0
        self._accumulate_on = accumulate_on
        self._device = next(iter(layers.values())).lora_A.device
        self.where = "cpu" if accumulate_on == "cpu" else str(self._device)
        self.bytes = 0

    def sum_over(self, root: nn.Module, batches: Iterable[Any], loss_fn: LossFunction, training: bool, progress: bool) -> None:
        """Run the backward passes."""
        function = self.function
        if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
            raise TypeError(f"{function}: batches must be an iterable of batches, got one {type(batches).__name__}; wrap it in [ ]")
        if not callable(loss_fn):
            raise TypeError(f"{function}: loss_fn must be a function of the model and a batch, got {type(loss_fn).__name__}")
        for argument, flag in (("training", training), ("progress", progress)):
            as_flag(function, argument, flag)
        uncalled = [name for name in uncalled_layers(root) if name in self.layers]
        if uncalled:
            raise ValueError(
                f"{function}: no gradient can reach {first_few(map(repr, uncalled))}: nn.MultiheadAttention reads the weight of its "
                "out_proj and never calls the layer; leave it out of target_modules"
            )
        self._sums = {name: _GradientSum(layer, self._accumulate_on) for name, layer in self.layers.items()}
        self.bytes = sum(gradient.total.nbytes for gradient in self._sums.values())
        with _as_found(root, self.layers, training):
            for name, layer in self.layers.items():
                layer._gradient_tap = _capturing(self._sums[name])
            for index, batch in enumerate(_with_progress(batches, progress)):
                count = _sample_count(batch)
                for gradient in self._sums.values():
                    gradient.weight = count
                loss = loss_fn(root, batch)
                _check_loss(function, loss, index)
                loss.backward()
                del loss
                self.seen += count
                if self.samples is not None and self.seen >= self.samples:
                    break
        self.seen = _total(self.seen, self._device)
        if not self.seen:
            raise ValueError(f"{function}: batches is empty; pass at least one batch (a fresh iterator, if one was used up)")
        untouched = [name for name in self.layers if _total(self._sums[name].calls, self._device) == 0]
        if untouched:
            raise ValueError(
                f"{function}: no gradient reached {first_few(map(repr, untouched))}: the loss does not depend on it; leave it out of "
                "target_modules"
            )

    def take(self, name: str) -> Tensor:
        """One layer's sum, on its device; its memory is the caller's now."""
        total = _add_up(self._sums.pop(name).total.to(self.layers[name].lora_A.device))
        if not total.isfinite().all():
            raise ValueError(f"{self.function}: the gradient of {name!r} is not finite; look at the batches, or compute in a wider dtype")
        if not total.any():
            raise ValueError(f"{self.function}: no gradient reached {name!r}: it is zero in every entry; leave it out of target_modules")
        return total


def _check_loss(function: str, loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{function}: loss_fn must return a scalar tensor, the mean loss of the batch; it returned {what} for batch {index}"
        )
    if not loss.is_floating_point():
        raise ValueError(f"{function}: loss_fn must return a real number; it returned {loss.dtype} for batch {index}")
    if not loss.isfinite().item():
        raise ValueError(f"{function}: the loss of batch {index} is {loss.item()}; it must be finite")
    if not loss.requires_grad:
        raise ValueError(
            f"{function}: the loss of batch {index} depends on no adapted layer; "
            "call the model that loss_fn is given, without torch.no_grad() or detach()"
        )


def _sample_count(batch: Any) -> int:
    """Rows of the first tensor in a batch of nested sequences and mappings; 1 if there is none."""
    first = next(_tensors(batch), None)
    return 1 if first is None or first.ndim == 0 else first.shape[0]


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of nested sequences and mappings, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, (str, bytes)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress or not _is_first_rank():
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="gradients of W0", unit="batch")


def _is_first_rank() -> bool:
    ranks = data_parallel_group(None)
    return ranks is None or ranks.rank == 0


def _total(count: int, device: torch.device) -> int:
    return count if data_parallel_group(None) is None else int(_add_up(torch.tensor(count, dtype=torch.int64, device=device)))


def _add_up(tensor: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if data_parallel_group(None) is not None:
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_from_first(tensor: Tensor) -> None:
    """Rank 0's values for all ranks."""
    if data_parallel_group(None) is not None:
        torch.distributed.broadcast(tensor, 0)
