"""PEFT layers that compute with our kernels, and the decoupled layer as a PEFT configuration. Needs ``peft``; imported on demand.

Both go through PEFT's plug point for custom layers (``LoraConfig._register_custom_module``): the model is an ordinary ``PeftModel``, its
files are ordinary LoRA files, and ``PeftModel.from_pretrained`` reads them without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._checks import as_integer
from ..ops import lora_linear
from .layer import Call, example_input, is_plain, linear_calls, runs_forward_of, scale_of


class KernelLinear(PeftLinear):
    """PEFT's LoRA layer over an ``nn.Linear``; its forward is :func:`~lowrank_kernels.ops.lora_linear`, one differentiable operation.

    What that operation does not express (several active adapters, DoRA and other variants, merged or disabled adapters, a bias of
    ``lora_B``, per-sample adapter names, a base layer, factors or a dropout that have hooks or another forward) is computed by PEFT's own
    forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if args or kwargs else self._expressed()
        if found is None:
            return super().forward(x, *args, **kwargs)
        base, first, second, dropout, scale = found
        p = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
        return lora_linear(x, base.weight, base.bias, first.weight, second.weight, scale, dropout=p, training=dropout.training)

    def _example_calls(self) -> Iterator[Call]:
        """One forward and one backward call, for ``explain``; none where PEFT's own forward computes."""
        found = self._expressed()
        if found is not None:
            base, first, *_ = found
            yield from linear_calls(base, example_input(base, base.weight.dtype), first.out_features)

    def _expressed(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Module, float] | None:
        """The base layer, the factors, the dropout and the scale that the operation needs; None where PEFT has to compute."""
        adapters, base = self.active_adapters, self.base_layer
        if (
            self.disable_adapters
            or self.merged
            or len(adapters) != 1
            or adapters[0] not in self.lora_A
            or adapters[0] in self.lora_variant
            or self.lora_bias[adapters[0]]
        ):
            return None
        (adapter,) = adapters
        first, second, dropout = self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter]
        if (
            not (runs_forward_of(nn.Dropout, dropout) or runs_forward_of(nn.Identity, dropout))
            or not (isinstance(base, nn.Linear) and is_plain(base))
            or not (isinstance(first, nn.Linear) and is_plain(first))  # OPLoRA watches it, and the next, by hooks
            or not (isinstance(second, nn.Linear) and is_plain(second))
        ):
            return None
        return base, first, second, dropout, self.scaling[adapter]


def _kernel_linear(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """A :class:`KernelLinear`; None hands the layer on to PEFT's own classes, as for quantized layers."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return KernelLinear(target, adapter_name, **kwargs) if isinstance(base, nn.Linear) and is_plain(base) else None


def with_kernels(config: LoraConfig) -> LoraConfig:
    """Let the layers that ``config`` makes over plain ``nn.Linear`` layers compute with our kernels; returns ``config``.

    ``get_peft_model(model, with_kernels(LoraConfig(r=16)))``; with ``PeftModel.from_pretrained`` pass the configuration as ``config=``.

    Factors of another dtype than the input are cast to it: over a bf16 or fp16 base PEFT keeps them in fp32, and computes in fp32; ours
    computes in the base's dtype (sums in fp32), as under autocast.

    Raises:
        TypeError: ``config`` is no ``LoraConfig``.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"with_kernels: config must be a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({nn.Linear: _kernel_linear})  # type: ignore[dict-item]
    return config


class DecoupledLoraConfig(LoraConfig):
    """``LoraConfig`` for ``SDSLoRA`` and ``ODLoRA``: layers of PEFT's rank 2r that hold ``[A; Q_Aᵀ]`` and ``[Q_B B]`` (OD-LoRA, Eq. 4).

    Saved, it is a plain ``LoraConfig(r=2*rank, lora_alpha=2*rank*s)``, and what is saved beside it a plain LoRA adapter that computes the
    same without this package: the exact export is the file itself.

    Args:
        rank: r, the trained rank.
        alpha: α.
        rank_scaling: "rslora", s = α/√r (the papers'), or "lora", s = α/r.
        rank_pattern: trained ranks of layers, by regular expression as in ``LoraConfig``; where one matches it is r above, in s too.
        alpha_pattern: the same of α; beside a rank_pattern, by the rule "rslora", with the same keys.
        options: everything else of ``LoraConfig``, except ``r``, ``lora_alpha``, ``use_rslora``, ``use_dora`` and ``init_lora_weights``.

    Raises:
        TypeError, ValueError: an argument that this configuration decides itself, or a bad rank, α, pattern or rule.
    """

    of_twice_the_rank = True  # whoever writes rank=r here knows that r is trained: the optimizers need not say so

    def __new__(cls, *args: Any, **options: Any) -> LoraConfig:  # type: ignore[misc]
        # dataclasses.replace, with all of LoraConfig's fields, as from add_weighted_adapter: of other adapters, and so a plain LoRA.
        if options.keys() >= {field.name for field in fields(LoraConfig) if field.init}:
            return with_kernels(LoraConfig(**options))
        return super().__new__(cls)

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 4.0,
        rank_scaling: str = "rslora",
        *,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        decided = {"r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights"} & set(options)
        if decided:
            raise TypeError(f"DecoupledLoraConfig: {', '.join(sorted(decided))} follow from rank, alpha and rank_scaling; leave them out")
        rank = as_integer("DecoupledLoraConfig", "rank", rank)
        scale = scale_of("DecoupledLoraConfig", rank, alpha, rank_scaling)
        ranks, alphas = _pattern("rank_pattern", rank_pattern), _pattern("alpha_pattern", alpha_pattern)
        ranks = {key: as_integer("DecoupledLoraConfig", f"rank_pattern[{key!r}]", value) for key, value in ranks.items()}
        options["rank_pattern"] = {key: 2 * value for key, value in ranks.items()}
        options["alpha_pattern"] = _alpha_pattern(rank, alpha, rank_scaling, ranks, alphas)
        super().__init__(r=2 * rank, lora_alpha=2 * rank * scale, **options)  # type: ignore[arg-type]
        with_kernels(self)


def _pattern(argument: str, pattern: object) -> dict[str, Any]:
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise TypeError(f"DecoupledLoraConfig: {argument} must be a dictionary by regular expressions, got {pattern!r:.80}")
    return dict(pattern)


def _alpha_pattern(rank: int, alpha: float, rank_scaling: str, ranks: dict[str, int], alphas: dict[str, Any]) -> dict[str, float]:
    """PEFT's α, 2r·s: by the rule α/r that is 2α, whatever r. By α/√r it depends on both, and a key must say both."""
    if rank_scaling == "lora":
        ranks = {}
    elif ranks and alphas and list(ranks) != list(alphas):
        raise ValueError(
            f"DecoupledLoraConfig: with rank_scaling='rslora' rank_pattern and alpha_pattern must have the same keys in one order, got "
            f"{list(ranks)} and {list(alphas)}: a layer's s = α/√r is made of both; repeat a rank, or an alpha, under the other's keys"
        )
    both = {key: (ranks.get(key, rank), alphas.get(key, alpha)) for key in [*ranks, *alphas]}
    return {key: 2 * r * scale_of("DecoupledLoraConfig", r, of_key, rank_scaling) for key, (r, of_key) in both.items()}
