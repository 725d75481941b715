"""``LowRankLinear``: a frozen ``nn.Linear`` with a low-rank adapter: plain, decoupled, or with constant factors around a trained core."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from .._checks import as_integer, as_number, check_choice
from ..backends.dtypes import FLOATING, autocast_dtype, compute_dtype
from ..backends.versions import Seen, version_of
from ..ops import lora_linear, lora_up
from ..pairs import count_switch, register_layer

if TYPE_CHECKING:
    from .shared import Projected, SharedInput

#: An operation, the device, what it is called for, and its arguments: what layers tell ``explain`` of themselves.
Call: TypeAlias = tuple[str, str, str, tuple[Any, ...]]

#: plain LoRA; decoupled (SDS-LoRA, OD-LoRA); constant factors around a trained core (LoRA-XS, LoRA-SB).
METHODS = ("lora", "sds", "xs")

#: What a compiled graph says whose layer is of the other kind now.
STALE = (
    "LowRankLinear: is_decoupled was written by others (as in an average of models) since the host read it, and the compiled graph is of "
    "the other kind of layer. Call eval() on the model after such a write, or the model once without torch.compile"
)


def holds_matrix(base: nn.Linear) -> bool:
    """Whether the layer's ``weight`` is an ordinary floating-point matrix: not quantized, not a tensor subclass."""
    weight = base.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def runs_forward_of(cls: type[nn.Module], module: nn.Module) -> bool:
    """Whether calling the module is nothing but the ``forward`` of ``cls``: it has no other one, also not replaced on the instance, as
    offloading frameworks do, and no hooks, which must run."""
    return (
        type(module).forward is cls.forward
        and "forward" not in module.__dict__
        and not (module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)
    )


def is_plain(base: nn.Linear) -> bool:
    """Whether calling the layer is nothing but ``F.linear(x, weight, bias)``, so that it may be fused with the adapter.

    False for quantized layers and other subclasses with a ``forward`` of their own, and as :func:`runs_forward_of` says.
    """
    return runs_forward_of(nn.Linear, base) and holds_matrix(base)


def example_input(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """One token (1, d_in) as the layer gets it: in its weight's dtype, in ``dtype`` if that is no ordinary matrix."""
    return torch.empty(1, base.in_features, dtype=base.weight.dtype if holds_matrix(base) else dtype, device=base.weight.device)


def linear_calls(base: nn.Linear, x: Tensor, rank: int, *, decoupled: bool = False, cored: bool = False) -> Iterator[Call]:
    """What :func:`~lowrank_kernels.ops.lora_linear` calls for x (1, d_in) over this layer, in the forward and in the backward pass."""
    weight, d_out, d_in = (base.weight.detach() if is_plain(base) else None), base.out_features, base.in_features
    core = x.new_empty(rank, rank, dtype=compute_dtype(x.dtype)) if cored else None
    a, b, hidden = x.new_empty(rank, d_in), x.new_empty(d_out, rank), (x if core is None else core).new_empty(1, rank)
    bases = (a, b) if decoupled else (None, None)
    what = f"{d_out} × {d_in}, r = {rank}{', decoupled' if decoupled else ', core' if cored else ''}"
    yield "lora_linear", x.device.type, what, (x, weight, None, a, b, *bases, 1.0, None, 1.0, core)
    needs = [True, False, False, not cored, not cored, cored]
    backward = (x.new_empty(1, d_out), x, weight, a, b, *bases, hidden, 1.0, None, 1.0, needs, core)
    yield "lora_linear_backward", x.device.type, what, backward


def check_settings(function: str, method: str, rank: int, dropout: float, dtype: torch.dtype | None) -> None:
    """Refuse adapter settings of a wrong type or out of range."""
    check_choice(function, "method", method, METHODS)
    as_integer(function, "rank", rank)
    as_number(function, "dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{function}: dropout must be in [0, 1), got {dropout}")
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"{function}: dtype must be one of {', '.join(map(str, FLOATING))} or None, got {dtype!r}")


def scale_of(function: str, rank: int, alpha: float, rank_scaling: str) -> float:
    """s: α/r ("lora") or α/√r ("rslora"); what is none of these rules, or no α of a scale, is refused."""
    alpha = as_number(function, "alpha", alpha, positive=True)
    if rank_scaling not in ("lora", "rslora"):
        raise ValueError(f"{function}: rank_scaling must be 'lora' (s = α/r) or 'rslora' (s = α/√r), got {rank_scaling!r}")
    scale = alpha / (rank if rank_scaling == "lora" else math.sqrt(rank))
    if not scale:
        raise ValueError(f"{function}: alpha must be larger, got {alpha}: the scale s would be rounded to zero, and ΔW with it")
    return scale


class LowRankLinear(nn.Module):
    """``y = base(x) + x̃ ΔWᵀ`` with ``ΔW = s·B A`` (LoRA), ``s(Q_B A + B Q_Aᵀ)`` (SDS-LoRA Eq. 5,
    after its warm-up) or ``s·B R A`` (LoRA-XS).

    Parameters and buffers (the base layer's stay its own; :func:`~lowrank_kernels.adapt` freezes them, making a layer by hand does not, as
    with PEFT's: call ``layer.base_layer.requires_grad_(False)``, or what steps all parameters trains W0 too):
        ``lora_A`` (r, d_in), ``lora_B`` (d_out, r): the trainable factors; A starts Kaiming-uniform, B at zero.
        ``q_a`` = Q_Aᵀ (r, d_in), ``q_b`` = Q_B (d_out, r), ``is_decoupled`` (0: no; what is not 0, as in an average of models: yes):
        only with ``method="sds"``. They are part of the ``state_dict``; an optimizer (``SDSLoRA``, ``ODLoRA``) writes them.
        ``lora_R`` (r, r): only with ``method="xs"``, and the only parameter then, fp32 at least; ``lora_A`` and ``lora_B`` are buffers. All
        three are zero until ``lora_sb_init`` or ``initialize`` gives them values.
        ``start_A``, ``start_B``: None; or, after :meth:`start_from` (PiSSA, LoRA-GA), copies of the factors as they were then. The base
        weight holds ``W0 − s·B₀A₀`` from then on, and they are what tells it from W0.

    Args:
        base_layer: the layer to adapt; kept as it is. One that is not a plain ``nn.Linear`` (quantized, with hooks, …) is
            called as a module, and the adapter's part is added to what it returns.
        rank: r, at most ``min(d_in, d_out)``.
        scale: s.
        method: "lora", "sds" or "xs".
        dropout: probability of dropping an entry of the adapter's input.
        dtype: of the factors; None means the base weight's, but fp32 for bf16, fp16 and quantized weights. Constant factors
            ("xs") need no precision to be trained in: None is the base weight's dtype for them, and fp32 for quantized weights.

    Its gradients can be differentiated again, as :func:`~lowrank_kernels.ops.lora_linear` says.

    Raises:
        TypeError, ValueError: ``base_layer`` is no ``nn.Linear``, or another argument of a wrong kind or out of range.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_R: nn.Parameter
    start_A: Tensor | None
    start_B: Tensor | None
    q_a: Tensor
    q_b: Tensor
    is_decoupled: Tensor
    #: Set by optimizers that need the full gradient: called in the backward pass with the adapter's input (tokens, d_in), the gradient of
    #: the layer's output (tokens, d_out), and whether this begins a new accumulation (``lora_B.grad is None``).
    capture: Callable[[Tensor, Tensor, bool], None] | None = None
    #: Set while a start reads gradients (``starts.py``): gets the input and the base layer's output, which it hands on, in the adapter's
    #: place.
    _gradient_tap: Callable[[Tensor, Tensor], Tensor] | None = None
    # The buffer and its version of which ``_decoupled`` is the host's copy; the DDP wrapper in whose forward it was read.
    _decoupled_read: tuple[Tensor, int] | None = None
    _decoupled_wrapper: weakref.ref[nn.Module] | None = None
    #: Set by :func:`~lowrank_kernels.share_inputs`: the layers that may get the same input.
    shared_input: SharedInput | None = None

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        scale: float,
        *,
        method: str = "lora",
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"LowRankLinear: base_layer must be a torch.nn.Linear, got {type(base_layer).__name__}")
        check_settings("LowRankLinear", method, rank, dropout, dtype)
        scale = as_number("LowRankLinear", "scale", scale)
        d_in, d_out = base_layer.in_features, base_layer.out_features
        if rank > min(d_in, d_out):
            raise ValueError(f"LowRankLinear: rank must be between 1 and {min(d_in, d_out)} for a {d_out} × {d_in} layer, got {rank}")
        weight = base_layer.weight
        if dtype is None:
            dtype = compute_dtype(weight.dtype)
            if method == "xs" and holds_matrix(base_layer):
                dtype = weight.dtype
        self.base_layer = base_layer
        self.in_features, self.out_features = d_in, d_out
        # Python's numbers: files hold these, and NumPy's they could not.
        self.rank, self.scale, self.method, self.dropout = int(rank), scale, method, float(dropout)
        a, b = (torch.empty(shape, dtype=dtype, device=weight.device) for shape in ((rank, d_in), (d_out, rank)))
        if method == "xs":
            self.register_buffer("lora_A", a)
            self.register_buffer("lora_B", b)
            self.lora_R = nn.Parameter(torch.empty(rank, rank, dtype=compute_dtype(dtype), device=weight.device))
        else:
            self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        if method == "sds":
            self.register_buffer("q_a", torch.zeros(rank, d_in, dtype=dtype, device=weight.device))
            self.register_buffer("q_b", torch.zeros(d_out, rank, dtype=dtype, device=weight.device))
            # Of the factors' kind, and not an integer: averages of models (EMA) would be rounded, mostly to 0.
            self.register_buffer("is_decoupled", torch.zeros((), dtype=dtype, device=weight.device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._decoupled = False
        self._merged = False
        self._merged_weight: Tensor | None = None
        self._merged_from: tuple[float, Seen] | None = None
        self.reset_parameters()
        register_layer(self)

    def reset_parameters(self) -> None:
        """A Kaiming-uniform (as ``nn.Linear``), B zero, not decoupled; with a core, everything zero; or the factors' start: ΔW = 0."""
        if self.start_A is not None and self.start_B is not None:
            with torch.no_grad():
                self.lora_A.copy_(self.start_A)
                self.lora_B.copy_(self.start_B)
            return
        if self.method == "xs":
            for tensor in (self.lora_A, self.lora_B, self.lora_R):
                nn.init.zeros_(tensor)
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.method == "sds":
            self.q_a.zero_()
            self.q_b.zero_()
            self.decoupled = False

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Set the factors to ``A₀`` (r, d_in) and ``B₀`` (d_out, r) and leave the output as it is: ``W0 ← W0 − s·B₀A₀``, in place.

        The product of the factors as they are stored is subtracted in fp32 at least and rounded once to the weight's dtype, so that the
        same factors give the same weight again when an adapter is loaded over W0.

        Raises:
            TypeError, ValueError: not a plain LoRA over a plain ``nn.Linear`` (a quantized weight, hooks, a forward of its own), or one
                that was started before; factors of other shapes.
        """
        if self.method != "lora" or not is_plain(self.base_layer) or self.start_A is not None:
            raise ValueError("LowRankLinear: start_from needs plain LoRA over a plain nn.Linear whose weight no start has changed yet")
        for argument, factor, like in (("a", a, self.lora_A), ("b", b, self.lora_B)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"LowRankLinear: start_from takes tensors, got {argument}={factor!r:.80}")
            if factor.shape != like.shape:
                raise ValueError(f"LowRankLinear: {argument} of start_from must be {tuple(like.shape)}, got {tuple(factor.shape)}")
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        weight, delta = self.base_layer.weight, self._delta_weight()
        weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) - delta)

    @property
    def decoupled(self) -> bool:
        """Whether ΔW is ``s(Q_B A + B Q_Aᵀ)``; False: ``s·B A``. Saved with the state, as ``is_decoupled``.

        The host's copy of that buffer, read anew when the buffer was replaced or written by others (averaged models, broadcasts).
        While a graph is traced the copy is taken as it is, and the graph checks it against the buffer.
        """
        if self.method == "sds":
            buffer, read = self._buffers["is_decoupled"], self._decoupled_read
            if torch.compiler.is_compiling():
                self._check_decoupled(buffer)
            elif buffer is not None and (read is None or read[0] is not buffer or read[1] != version_of(buffer)):
                self._read_decoupled(buffer)
        return self._decoupled

    @decoupled.setter
    def decoupled(self, value: bool) -> None:
        if value and self.method != "sds":
            raise ValueError(f"LowRankLinear: a layer adapted with method={self.method!r} cannot be decoupled; use method='sds'")
        if self.method == "sds":
            self.is_decoupled.fill_(value)
            self._decoupled_read = self.is_decoupled, version_of(self.is_decoupled)
        self._note_decoupled(bool(value))

    def reread_decoupled(self) -> None:
        """Bring :attr:`decoupled` up to date also with a write that torch does not count, through ``.data``. What saves, copies, exports or
        merges the layer calls it, so that the layer goes on computing what that holds; a forward would wait for the device each time."""
        self._decoupled_read = None
        _ = self.decoupled

    def _check_decoupled(self, buffer: Tensor | None) -> None:
        """Write into the graph under way that the host's copy must be what the buffer holds: no guard sees a write into it. Not into those
        that train, whose optimizer reads the buffer itself, and which the check would cost a launch a layer."""
        if buffer is None or (self.training and torch.is_grad_enabled()) or torch._C._functorch.is_batchedtensor(buffer):
            return
        torch._assert_async(buffer if self._decoupled else buffer == 0, STALE)

    def _note_decoupled(self, value: bool) -> None:
        """The host's copy; optimizers ask whether any layer's has changed."""
        if value != self._decoupled:
            count_switch()
        self._decoupled = value

    def train(self, mode: bool = True) -> LowRankLinear:
        if not mode:
            _ = self.decoupled  # now, outside of a graph: an average of models is written by others, and often compiled
        return super().train(mode)

    def _read_decoupled(self, buffer: Tensor) -> None:
        """Bring the host's copy of ``is_decoupled`` up to date, if the buffer has a value that can be read."""
        if type(buffer) is not Tensor or buffer.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(buffer):
            return
        # DDP writes all buffers before every forward. Only the first time it may bring news (one rank has loaded, DDP was made): later
        # the ranks' optimizers switch together, and a read would stall the device once a layer.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        before = None if self._decoupled_wrapper is None else self._decoupled_wrapper()
        same = self._decoupled_read is not None and self._decoupled_read[0] is buffer
        if wrapper is None or before is not wrapper or not same:
            with _disable_current_modes():  # what is traced or counted here is the layer's work
                self._note_decoupled(bool(buffer.item()))
        if wrapper is not None:
            self._decoupled_wrapper = weakref.ref(wrapper)
        self._decoupled_read = buffer, version_of(buffer)

    @property
    def merged(self) -> bool:
        """Whether inference runs on one weight ``W0 + ΔW`` (see :func:`~lowrank_kernels.merge`).

        That weight is a cache beside the untouched base weight. It serves where no gradient is asked: in eval mode,
        under ``torch.no_grad()`` or with frozen factors. Training mode always uses the factors, so a forgotten
        ``merge`` neither loses a gradient nor drops dropout, and a changed factor makes the cache be computed anew.
        """
        return self._merged

    @merged.setter
    def merged(self, value: bool) -> None:
        if value and not is_plain(self.base_layer):
            raise ValueError(
                f"LowRankLinear: a {type(self.base_layer).__name__} with hooks, a quantized weight or a forward of its own cannot be merged"
            )
        self._merged = bool(value)
        self._merged_weight = self._merged_from = None
        if value:
            self.reread_decoupled()
            self._cached_weight()

    @property
    def weight(self) -> Tensor:
        """The effective weight ``W0 + ΔW`` (d_out, d_in), differentiable, for code that reads a Linear's weight instead of
        calling it (``nn.MultiheadAttention`` and its fast paths); no dropout there. A quantized base's own weight."""
        base = self.base_layer.weight
        if not holds_matrix(self.base_layer):
            return base
        self._check_size(base)
        return base + self._delta_weight().to(base.dtype)

    def _check_size(self, base: Tensor) -> None:
        if base.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"LowRankLinear: the base layer's weight is {tuple(base.shape)} now, the factors are those of a "
                f"{self.out_features} × {self.in_features} one; resize a layer (resize_token_embeddings) before it is adapted, or after "
                "merge(model, unload=True)"
            )

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def _delta_weight(self) -> Tensor:
        """What the factors add to the base layer's weight as it is now."""
        dtype = compute_dtype(self.lora_A.dtype)
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if self.decoupled:
            return self.scale * (self.q_b.to(dtype) @ a + b @ self.q_a.to(dtype))
        if self.method == "xs":
            a = self.lora_R.to(dtype) @ a
        return self.scale * (b @ a)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in), computed and returned in fp32 (fp64 for fp64 factors), without gradient; ``s(B A − B₀A₀)`` after a start."""
        self.reread_decoupled()
        left, right = self.delta_factors()
        return self.scale * (left @ right.mT)

    @torch.no_grad()
    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """``(left, right)``, (d_out, k) and (d_in, k), of ``ΔW = s · left @ rightᵀ``, in fp32 (fp64 for fp64 factors), without gradient.

        k is r; 2r for a decoupled layer, and after a start: ``B A − B₀A₀`` is ``[B − B₀  B₀] [A; A − A₀]``, a product in which nothing
        cancels, so that it is exactly zero at the start and keeps its digits near it.
        """
        dtype = compute_dtype(self.lora_A.dtype)
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if self.decoupled:
            a, b = torch.cat([a, self.q_a.to(dtype)]), torch.cat([self.q_b.to(dtype), b], dim=1)
        elif self.method == "xs":
            b = b @ self.lora_R.to(dtype)
        elif self.start_A is not None and self.start_B is not None:
            a, b = torch.cat([a, a - self.start_A.to(dtype)]), torch.cat([b - self.start_B.to(dtype), self.start_B.to(dtype)], dim=1)
        return b, a.mT

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W0 + ΔW`` (d_out, d_in) as a new tensor, summed in fp32 at least and rounded once to the base weight's dtype."""
        base = self.base_layer.weight
        self._check_size(base)
        delta = self._delta_weight()
        return (base.to(torch.promote_types(base.dtype, delta.dtype)) + delta).to(base.dtype)

    def _cached_weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # an exported graph holds the sum and not the cache
            return self.merged_weight()
        tensors = [self.base_layer.weight, self.lora_A, self.lora_B]
        if self.decoupled:
            tensors += [self.q_a, self.q_b]
        if self.method == "xs":
            tensors.append(self.lora_R)
        scale, seen = self._merged_from or (None, None)
        if self._merged_weight is None or scale != self.scale or seen is None or not seen.still(tensors):
            with torch.inference_mode(False):  # it outlives that mode, and autograd takes none of its tensors
                self._merged_weight = self.merged_weight()
            self._merged_from = self.scale, Seen(tensors)
        return self._merged_weight

    def forward(self, x: Tensor) -> Tensor:
        """``base(x) + x̃ ΔWᵀ`` (…, d_out) of x (…, d_in), x̃ being x with dropout; one product with ``W0 + ΔW`` where the merged weight
        serves (:attr:`merged`)."""
        base = self.base_layer
        if self._gradient_tap is not None:
            return self._gradient_tap(x, base(x))
        if self._serves_merged():
            return nn.functional.linear(x, self._cached_weight(), base.bias)
        if self.shared_input is not None:
            projected = self.shared_input.take(self, x)
            if projected is not None:
                return self._from_projected(x, projected)
        core = self.lora_R if self.method == "xs" else None
        q_a, q_b = (self.q_a, self.q_b) if self.decoupled else (None, None)
        adapter = (self.lora_A, self.lora_B, self.scale)
        options: dict[str, Any] = {"q_a": q_a, "q_b": q_b, "core": core, "dropout": self.dropout, "training": self.training}
        if self.capture is not None:
            options["capture"] = self._pass_on
        if is_plain(base):
            return lora_linear(x, base.weight, base.bias, *adapter, **options)
        y = base(x)
        delta = lora_linear(x, None, None, *adapter, **options)
        return y + delta.to(y.dtype)

    def _serves_merged(self) -> bool:
        """Whether a forward now runs on the merged weight."""
        if not self._merged or self.training:
            return False
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return False  # version counters cannot be traced: a graph with the cache in it would not see a factor change
        trained = (self.lora_R,) if self.method == "xs" else (self.lora_A, self.lora_B)
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained))

    def can_share(self, x: Tensor) -> bool:
        """Whether this layer could take the projections of x from a :class:`~lowrank_kernels.adapters.shared.SharedInput` now."""
        base, a = self.base_layer, self.lora_A
        if self.method == "xs" or self._gradient_tap is not None or self.capture is not None or (self.training and self.dropout > 0.0):
            return False
        if type(a) is not nn.Parameter or a.shape != (self.rank, self.in_features) or a.device != x.device:  # sharded, offloaded
            return False
        if x.ndim == 0 or x.shape[-1] != self.in_features or self._serves_merged():
            return False
        return base.weight.dtype == autocast_dtype(x) or autocast_dtype(x) != x.dtype or not is_plain(base)

    def _from_projected(self, x: Tensor, projected: Projected) -> Tensor:
        """:meth:`forward`, of which the projections to the rank are there already."""
        base, (passed, hidden, hidden_q) = self.base_layer, projected
        options = {"hidden_q": hidden_q, "q_b": None if hidden_q is None else self.q_b}
        if is_plain(base):
            return lora_up(passed, base.weight, base.bias, hidden, self.lora_B, self.scale, **options)
        y = base(x)
        return y + lora_up(None, None, None, hidden, self.lora_B, self.scale, **options).to(y.dtype)

    def _example_calls(self) -> Iterator[Call]:
        """One forward and one backward call of every operation that a forward in the present state uses, for ``explain``."""
        if self._serves_merged():
            return
        x = example_input(self.base_layer, self.lora_A.dtype)
        if self.shared_input is not None and self.shared_input.together(self, x):
            yield from self.shared_input.example_calls(self, x)
        else:
            yield from linear_calls(self.base_layer, x, self.rank, decoupled=self.decoupled, cored=self.method == "xs")

    def _pass_on(self, x: Tensor, grad: Tensor) -> None:
        if self.capture is not None:
            self.capture(x, grad, self.lora_B.grad is None)

    def extra_repr(self) -> str:
        state = f"decoupled={self.decoupled}, merged={self._merged}"
        return f"rank={self.rank}, scale={self.scale:g}, method={self.method!r}, dropout={self.dropout}, {state}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.reread_decoupled()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.start_A is None and f"{prefix}start_A" in state_dict:  # the base weight beside it has been changed
            self.start_A, self.start_B = torch.empty_like(self.lora_A), torch.empty_like(self.lora_B)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._merged_weight = self._merged_from = None
        self._decoupled_read = self._decoupled_wrapper = None
        if self.method == "sds":
            self._read_decoupled(self.is_decoupled)  # now: a compiled graph takes the host's copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        super()._apply(fn, recurse)
        self._merged_weight = self._merged_from = None  # the next merged forward computes it where the parameters now are
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.reread_decoupled()
        # A merged layer is saved with its factors and the flag; the sum of the weights is computed anew.
        caches = dict.fromkeys(("_merged_weight", "_merged_from", "_gradient_tap", "_decoupled_read", "_decoupled_wrapper"))
        return self.__dict__ | caches

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and unpickling come through here and not through __init__.
        super().__setstate__(state)
        register_layer(self)
