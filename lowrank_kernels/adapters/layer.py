"""``LowRankLinear``: a frozen ``nn.Linear`` with a plain or decoupled low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lora_linear
from ..pairs import register_layer


class LowRankLinear(nn.Module):
    """``y = base(x) + x̃ ΔWᵀ`` with ``ΔW = s·B A`` (LoRA) or ``ΔW = s(Q_B A + B Q_Aᵀ)`` (SDS-LoRA Eq. 5, after its warm-up).

    Parameters and buffers (the base layer's are frozen and stay its own):
        ``lora_A`` (r, d_in), ``lora_B`` (d_out, r): the trainable factors; A starts Kaiming-uniform, B at zero.
        ``q_a`` = Q_Aᵀ (r, d_in), ``q_b`` = Q_B (d_out, r), ``is_decoupled``: only with ``method="sds"``. They are part of the
        ``state_dict``; an optimizer (``SDSLoRA``, ``ODLoRA``) writes them.

    Args:
        base_layer: the layer to adapt; kept as it is.
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
        self._merged_weight: Tensor | None = None
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

    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in), in the factors' dtype, without gradient."""
        with torch.no_grad():
            if self._decoupled:
                return self.scale * (self.q_b @ self.lora_A + self.lora_B @ self.q_a)
            return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self._merged_weight is not None:
            return nn.functional.linear(x, self._merged_weight, base.bias)
        q_a, q_b = (self.q_a, self.q_b) if self._decoupled else (None, None)
        adapter = (self.lora_A, self.lora_B, self.scale)
        if type(base) is nn.Linear:
            # The exact type: a subclass may keep something else than a plain matrix in `weight`, or hooks of its own.
            return lora_linear(x, base.weight, base.bias, *adapter, q_a=q_a, q_b=q_b, dropout=self.dropout, training=self.training)
        return base(x) + lora_linear(x, None, None, *adapter, q_a=q_a, q_b=q_b, dropout=self.dropout, training=self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, method={self.method!r}, dropout={self.dropout}, decoupled={self._decoupled}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.method == "sds":
            self._decoupled = bool(self.is_decoupled.item())

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and unpickling come through here and not through __init__.
        super().__setstate__(state)
        register_layer(self)
