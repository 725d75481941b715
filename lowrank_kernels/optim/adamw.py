"""AdamW for all parameters of a model in a constant number of launches."""

from __future__ import annotations

from ._shared.base import LowRankOptimizer


class AdamW(LowRankOptimizer):
    """AdamW (Loshchilov & Hutter), grouped: one launch for all parameters of a group that are of one kind (factors, the
    rest; with ``lr_ratio`` A, B, the rest) and one dtype, however many they are.

    A drop-in for ``torch.optim.AdamW`` with fp32 state for bf16 and fp16 parameters. The default weight decay is 0 for
    the low-rank factors it finds and AdamW's 0.01 for everything else.
    On a model adapted with ``method="xs"`` this is LoRA-XS.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, …: as ``torch.optim.AdamW``; what all optimizers here take beside them (``scale``,
            ``lr_ratio``, ``nonfinite_grads``, ``atomic``, …) is described where they share it, in the base class
            :class:`~lowrank_kernels.optim._shared.base.LowRankOptimizer`.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or out of range.
    """

    requires_pairs = False
    trains_cores = True
