"""Models and batches for the tests of LoRA-XS and LoRA-SB."""

from __future__ import annotations

import torch
from _models import SHAPES
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels import pairs


def network(shapes=SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A tanh network that is not adapted."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for d_out, d_in in shapes:
        linear = nn.Linear(d_in, d_out, dtype=torch.float64)
        linear.weight.data.copy_(torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) / d_in**0.5)
        linear.bias.data.copy_(torch.randn(d_out, generator=generator, dtype=torch.float64) / d_in**0.5)
        layers += [linear.to(dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def xs_model(library: str = "", *, rank: int = 3, scale: float = 0.7, dtype: torch.dtype = torch.float64, shapes=SHAPES, seed: int = 0):
    """The contract's model, as LoRA-XS has it: orthonormal random factors and a random R."""
    model = lk.adapt(network(shapes, dtype, seed), method="xs", rank=rank, alpha=scale * rank)
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs(model):
        for tensor in (pair.A.mT, pair.B):
            tensor.copy_(torch.linalg.qr(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))[0])
        pair.core.data.copy_(torch.randn(rank, rank, generator=generator, dtype=torch.float64) / 10)
    return model


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def make_batches(count: int = 3, rows: int = 8, d_in: int = 12, d_out: int = 9, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(7)
    f64 = {"generator": generator, "dtype": torch.float64}
    return [(torch.randn(rows, d_in, **f64).to(dtype), torch.randn(rows, d_out, **f64).to(dtype)) for _ in range(count)]


def full_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """∇L(W0) of every Linear of a model that is not adapted."""
    weights = {name: module.weight.requires_grad_() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return dict(zip(weights, torch.autograd.grad(mse(model, batch), list(weights.values())), strict=True))


def init(model: nn.Module, batches, loss=mse, **options) -> lk.InitReport:
    return lk.lora_sb_init(model, batches, loss, **{"lr": 0.1, "progress": False, **options})
