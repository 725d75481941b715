"""How an optimizer gets at the full gradients: the inputs X and the output gradients S of adapter layers, ours or another library's.

Both are seen in the backward pass, by a node that has X among its saved tensors. So recomputed layers (activation checkpointing of either
kind) are seen once, a forward pass without a backward pass leaves nothing behind, and a layer used several times is seen each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...pairs import owners
from ...parallel.ranks import may_lose_ranks
from .held_gradient import FullGradient, TokenFactors


@dataclass(frozen=True)
class Patches:
    """A convolution as a linear layer on patches: its kernel is a matrix (d_out, d_in·k·k), its tokens are the output's positions.

    Attributes:
        kernel, stride, dilation: of two dimensions; the first is 1 for a 1-d convolution.
        padding, mode: as ``torch.nn.functional.pad`` takes them.
        dims: 1 or 2.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str
    dims: int

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d) -> Patches:
        """Those of one without groups."""
        one = (1,) * (2 - len(module.kernel_size))
        kernel, stride, dilation = (one + tuple(size) for size in (module.kernel_size, module.stride, module.dilation))
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(kernel, stride, dilation, tuple(module._reversed_padding_repeated_twice), mode, len(module.kernel_size))

    def rows(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The input (…, d_in, *positions) as (tokens, d_in·k·k), the output's gradient (…, d_out, *positions) as (tokens, d_out)."""
        x, s = (t if t.ndim == self.dims + 2 else t[None] for t in (x, s))
        x = F.pad(x, self.padding, self.mode)
        x = x if self.dims == 2 else x.unsqueeze(2)
        patches = F.unfold(x, self.kernel, self.dilation, stride=self.stride)
        return patches.mT.reshape(-1, patches.shape[1]), s.flatten(2).mT.reshape(-1, s.shape[1])


class Recorder:
    """Receives X and S of one layer and adds them to ``gradient``.

    A copy (``deepcopy`` or ``pickle``, of a model say) is switched off, so that copies of a model do not collect what nobody reads; an
    optimizer that was copied together with its model switches its recorders on.

    Attributes:
        gradient: holds what was recorded.
        scale: what G was multiplied by where S is seen: s behind ``lora_B`` of other libraries, 1 in our layers.
        patches: how X and S of a convolution become matrices; None for a linear layer.
        active: whether anything is recorded.
        notify: called when something was.
        joined: whether the layer was last called in a DistributedDataParallel that may lose ranks, see :func:`watch_ranks`.
    """

    def __init__(self, gradient: FullGradient, scale: float = 1.0, patches: Patches | None = None) -> None:
        self.gradient, self.scale, self.patches, self.active = gradient, scale, patches, True
        self.pending: Tensor | None = None
        self.notify: Callable[[], object] | None = None
        self.joined = False
        self._task = -1

    def __call__(self, x: Tensor, s: Tensor, begins: bool) -> None:
        """``begins``: no ``.grad`` stands there yet. Then anything from an earlier backward pass is left over from an
        accumulation that was dropped, by ``model.zero_grad()`` for instance."""
        if not self.active:
            return
        task = torch._C._current_graph_task_id()
        if begins and task != self._task:
            self.gradient.clear()
        elif self.notify is not None and not self.gradient.empty and task != self._task:
            raise RuntimeError(
                "OPLoRA: a second backward pass before step(), and overlap=True has already used the first one's gradient; accumulate "
                "gradients with overlap=False"
            )
        self._task = task
        seen, x = x, x.to(s.dtype)  # as the GEMM saw it: under autocast other libraries' layers get a wider x
        if self.patches is not None:
            self.gradient.add(*self.patches.rows(x, s))
        else:
            kept = x is seen and isinstance(self.gradient, TokenFactors) and _is_the_users(x)
            x, s = x.reshape(-1, x.shape[-1]), s.reshape(-1, s.shape[-1])
            self.gradient.add(_copied(x) if kept else x, s)
        if self.notify is not None:
            self.notify()

    def clear(self) -> None:
        self.pending = None
        self.gradient.clear()

    def __getstate__(self) -> dict[str, Any]:
        self_without = {**self.__dict__, "pending": None, "notify": None, "active": False}
        self_without["gradient"] = _emptied(self.gradient)
        return self_without


def _is_the_users(x: Tensor) -> bool:
    """Whether X, the first input of the node whose backward pass is running, is a tensor that autograd did not make, or a view of one: a
    buffer of the user's, who may fill it with the next batch before ``step()`` reads it."""
    node = torch._C._current_autograd_node()
    found = node.next_functions[0][0]
    while found is not None and len(found.next_functions) == 1:  # as views have it
        found = found.next_functions[0][0]
    leaf = getattr(found, "variable", None)
    return found is None or (leaf is not None and leaf.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())


#: Where the last copy of :func:`_copied` is, as long as somebody holds it.
_last_copy: weakref.ref[Tensor] | None = None


def _copied(x: Tensor) -> Tensor:
    """A copy of X; layers that have one X in a backward pass, as query, key and value, get one copy."""
    global _last_copy
    made = None if _last_copy is None else _last_copy()
    now = (torch._C._current_graph_task_id(), x.data_ptr(), x._version, x.shape, x.stride(), x.dtype)
    if made is None or made.made_from != now:  # type: ignore[attr-defined]
        made = x.clone()
        # What was copied is held as well: no other tensor gets its address.
        made.made_from, made.original = now, x  # type: ignore[attr-defined]
        _last_copy = weakref.ref(made)
    return made


def _emptied(gradient: FullGradient) -> FullGradient:
    twin = object.__new__(type(gradient))
    twin.__dict__.update(gradient.__dict__)
    twin.clear()
    return twin


class _SeeGradient(torch.autograd.Function):
    """The identity on ``lora_B``'s output, with the adapter's input among its saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, recorder: Recorder, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recorder, ctx.layer = recorder, layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ctx.recorder(x.detach(), grad.detach(), ctx.layer.weight.grad is None)
        return None, grad, None, None


class _SeeInput:
    """Forward hook of ``lora_A``: its input is the adapter's, behind the dropout. Held until ``lora_B``'s forward, which follows."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.recorder.active:
            self.recorder.pending = args[0] if torch.is_grad_enabled() else None


class _SeeOutput:
    """Forward hook of ``lora_B``."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, self.recorder.pending = self.recorder.pending, None
        if x is None or not output.requires_grad:
            return None
        return _SeeGradient.apply(x, output, self.recorder, module)


def watch(a: nn.Module, b: nn.Module, recorder: Recorder) -> list[Any]:
    """Let ``recorder`` see an adapter that calls the modules ``a`` and then ``b`` (PEFT's, torchtune's); returns the hooks' handles."""
    return [a.register_forward_hook(_SeeInput(recorder)), b.register_forward_hook(_SeeOutput(recorder))]


class _SeeRanks:
    """Forward pre-hook of a layer. What runs outside of DistributedDataParallel, a recomputation or an evaluation, says nothing."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        joined = may_lose_ranks()
        if joined is not None:
            self.recorder.joined = joined


def watch_ranks(layer: nn.Module, recorder: Recorder) -> Any:
    """Let ``recorder`` know of ``join()``, which is to be seen in the forward pass alone; returns the hook's handle."""
    return layer.register_forward_pre_hook(_SeeRanks(recorder))


def unwatch(recorders: list[Recorder], handles: list[Any]) -> None:
    """Take the recorders out of our layers and the hooks off others', and drop what was recorded."""
    mine = {id(recorder) for recorder in recorders}
    for layer in owners().values():
        if id(getattr(layer, "capture", None)) in mine:
            layer.capture = None  # type: ignore[assignment]
    for recorder in recorders:
        recorder.active = False
        recorder.clear()
    for handle in handles:
        handle.remove()
    handles.clear()
