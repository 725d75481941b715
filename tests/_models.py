"""Small models for tests, adapted by either library for the decoupled methods with the same starting factors."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from lowrank_kernels import LowRankLinear, Pair, pairs

SHAPES = [(20, 12), (15, 20), (9, 15)]  # (d_out, d_in): ragged on purpose


def make_model(
    library: str, *, rank: int = 3, scale: float = 0.7, dtype: torch.dtype = torch.float64, shapes=SHAPES, seed: int = 0
) -> nn.Module:
    """A tanh network adapted for SDS-LoRA: ``library="ours"`` (our layers) or ``"peft"`` (unmodified rank-2r LoRA layers)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    layers: list[nn.Module] = []
    starts = []
    for d_out, d_in in shapes:
        linear = nn.Linear(d_in, d_out, dtype=dtype)
        linear.weight.data.copy_(random(d_out, d_in))
        linear.bias.data.copy_(random(1, d_out)[0])
        layers += [linear.requires_grad_(False), nn.Tanh()]
        starts.append(random(rank, d_in))
    model = nn.Sequential(*layers[:-1])
    if library == "ours":
        for index in range(0, len(model), 2):
            model[index] = LowRankLinear(model[index], rank, scale, method="sds")
    else:
        targets = [str(index) for index in range(0, len(model), 2)]
        config = peft.LoraConfig(r=2 * rank, lora_alpha=2 * rank * scale, target_modules=targets)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for pair, start in zip(pairs(model), starts, strict=True):
            pair.A[:rank].copy_(start)
    return model


def pair_delta(pair: Pair) -> Tensor:
    """ΔW of one pair as the model applies it, in both kinds of layers."""
    if isinstance(pair.layer, LowRankLinear):
        return pair.layer.delta_weight()
    return pair.scale * pair.B.detach() @ pair.A.detach()


def batch(step: int, d_in: int = 12, d_out: int = 9, rows: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a step: a function of the step alone, so that a resumed run sees the same data."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, d_out, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Mean squared error on the batch of ``step``."""
    x, y = batch(step, dtype=dtype)
    return (model(x) - y).square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with requires_grad."""
    return [p for p in model.parameters() if p.requires_grad]
