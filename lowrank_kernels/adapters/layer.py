"""``LowRankLinear``: a frozen ``nn.Linear`` with a plain or decoupled low-rank adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lora_linear
from ..pairs import register_layer


def holds_matrix(base: nn.Linear) -> bool:
    """Whether the layer's ``weight`` is an ordinary floating-point matrix: not quantized, not a tensor subclass."""
    weight = base.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def is_plain(base: nn.Linear) -> bool:
    """Whether calling the layer is nothing but ``F.linear(x, weight, bias)``, so that it may be fused with the adapter.

    False for quantized layers and other subclasses with a ``forward`` of their own, for layers with hooks (they must
    run), and for layers whose ``forward`` was replaced on the instance, as offloading frameworks do.
    """
    return (
        type(base).forward is nn.Linear.forward
        and "forward" not in base.__dict__
        and not (base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks)
        and holds_matrix(base)
    )


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is replaced or written in place (inference tensors do not count their writes)."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


class LowRankLinear(nn.Module):
    """``y = base(x) + x̃ ΔWᵀ`` with ``ΔW = s·B A`` (LoRA) or ``ΔW = s(Q_B A + B Q_Aᵀ)`` (SDS-LoRA Eq. 5, after its warm-up).

    Parameters and buffers (the base layer's are frozen and stay its own):
        ``lora_A`` (r, d_in), ``lora_B`` (d_out, r): the trainable factors; A starts Kaiming-uniform, B at zero.
        ``q_a`` = Q_Aᵀ (r, d_in), ``q_b`` = Q_B (d_out, r), ``is_decoupled``: only with ``method="sds"``. They are part of the
        ``state_dict``; an optimizer (``SDSLoRA``, ``ODLoRA``) writes them.

    Args:
        base_layer: the layer to adapt; kept as it is. One that is not a plain ``nn.Linear`` (quantized, with hooks, …) is
            called as a module, and the adapter's part is added to what it returns.
        rank: r, at most ``min(d_in, d_out)``.
        scale: s.
        method: "lora" or "sds".
        dropout: probability of dropping an entry of the adapter's input.
        dtype: of the factors; None means the base weight's, but fp32 for bf16, fp16 and quantized weights.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    q_a: Tensor
    q_b: Tensor
    is_decoupled: Tensor

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
        if method not in ("lora", "sds"):
            raise ValueError(f"LowRankLinear: method must be 'lora' or 'sds', got {method!r}")
        d_in, d_out = base_layer.in_features, base_layer.out_features
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"LowRankLinear: rank must be between 1 and {min(d_in, d_out)} for a {d_out} × {d_in} layer, got {rank}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LowRankLinear: dropout must be in [0, 1), got {dropout}")
        weight = base_layer.weight
        if dtype is None:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.base_layer = base_layer
        self.in_features, self.out_features = d_in, d_out
        self.rank, self.scale, self.method, self.dropout = rank, float(scale), method, float(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.empty(d_out, rank, dtype=dtype, device=weight.device))
        if method == "sds":
            self.register_buffer("q_a", torch.zeros(rank, d_in, dtype=dtype, device=weight.device))
            self.register_buffer("q_b", torch.zeros(d_out, rank, dtype=dtype, device=weight.device))
            self.register_buffer("is_decoupled", torch.zeros((), dtype=torch.uint8, device=weight.device))
        self._decoupled = False
        self._merged = False
        self._merged_weight: Tensor | None = None
        self._merged_state: object = None
        self.reset_parameters()
        register_layer(self)

    def reset_parameters(self) -> None:
        """A Kaiming-uniform (as ``nn.Linear``), B zero, not decoupled: ΔW = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.method == "sds":
            self.q_a.zero_()
            self.q_b.zero_()
            self.decoupled = False

    @property
    def decoupled(self) -> bool:
        """Whether ΔW is ``s(Q_B A + B Q_Aᵀ)``; False: ``s·B A``. Saved with the state, as ``is_decoupled``."""
        return self._decoupled

    @decoupled.setter
    def decoupled(self, value: bool) -> None:
        if value and self.method != "sds":
            raise ValueError("LowRankLinear: a layer adapted with method='lora' cannot be decoupled; use method='sds'")
        if self.method == "sds":
            self.is_decoupled.fill_(value)
        self._decoupled = bool(value)

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
        self._merged_weight = self._merged_state = None
        if value:
            self._cached_weight()

    @property
    def weight(self) -> Tensor:
        """The effective weight ``W0 + ΔW`` (d_out, d_in), differentiable, for code that reads a Linear's weight instead of
        calling it (``nn.MultiheadAttention`` and its fast paths); no dropout there. A quantized base's own weight."""
        base = self.base_layer.weight
        if not holds_matrix(self.base_layer):
            return base
        return base + self._delta_weight().to(base.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def _delta_weight(self) -> Tensor:
        dtype = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if self._decoupled:
            return self.scale * (self.q_b.to(dtype) @ a + b @ self.q_a.to(dtype))
        return self.scale * (b @ a)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in), computed and returned in fp32 (fp64 for fp64 factors), without gradient."""
        return self._delta_weight()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W0 + ΔW`` (d_out, d_in) as a new tensor, summed in fp32 at least and rounded once to the base weight's dtype."""
        delta = self._delta_weight()
        base = self.base_layer.weight
        return (base.to(torch.promote_types(base.dtype, delta.dtype)) + delta).to(base.dtype)

    def _cached_weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # version counters cannot be traced; a compiled graph takes the cache as it finds it
            return self.merged_weight() if self._merged_weight is None else self._merged_weight
        tensors = [self.base_layer.weight, self.lora_A, self.lora_B]
        if self._decoupled:
            tensors += [self.q_a, self.q_b]
        state = (self.scale, *map(_state, tensors))
        if self._merged_weight is None or self._merged_state != state:
            self._merged_weight, self._merged_state = self.merged_weight(), state
        return self._merged_weight

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self._merged and not self.training:
            learning = torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad)
            if not learning:
                return nn.functional.linear(x, self._cached_weight(), base.bias)
        q_a, q_b = (self.q_a, self.q_b) if self._decoupled else (None, None)
        adapter = (self.lora_A, self.lora_B, self.scale)
        if is_plain(base):
            return lora_linear(x, base.weight, base.bias, *adapter, q_a=q_a, q_b=q_b, dropout=self.dropout, training=self.training)
        y = base(x)
        delta = lora_linear(x, None, None, *adapter, q_a=q_a, q_b=q_b, dropout=self.dropout, training=self.training)
        return y + delta.to(y.dtype)

    def extra_repr(self) -> str:
        state = f"decoupled={self._decoupled}, merged={self._merged}"
        return f"rank={self.rank}, scale={self.scale:g}, method={self.method!r}, dropout={self.dropout}, {state}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.method == "sds" and not self.is_decoupled.is_meta:
            self._decoupled = bool(self.is_decoupled.item())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        super()._apply(fn, recurse)
        self._merged_weight = None  # the next merged forward computes it where the parameters now are
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A merged layer is saved with its factors and the flag; the sum of the weights is computed anew.
        return self.__dict__ | {"_merged_weight": None, "_merged_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and unpickling come through here and not through __init__.
        super().__setstate__(state)
        register_layer(self)
