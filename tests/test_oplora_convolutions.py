"""OPLoRA on convolutions, which are linear layers of their patches."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from _oplora import LR, every_gradient, every_kind, make
from torch import Tensor, nn

from benchmarks.naive.oplora import OPLoRALayer
from lowrank_kernels import pairs

#: Of a base layer; PEFT's A has its kernel, stride and padding.
CONVOLUTIONS = {
    "2d": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "2d, oblong": lambda: nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(0, 1)),
    "2d, same": lambda: nn.Conv2d(3, 8, (2, 3), padding="same"),
    "2d, pointwise": lambda: nn.Conv2d(3, 8, 1),
    "1d": lambda: nn.Conv1d(3, 8, 5, stride=2, padding=2),
}


class Convolved(nn.Module):
    """A convolution and a linear layer behind it, adapted by PEFT, with random factors."""

    def __init__(self, kind: str, channels_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = CONVOLUTIONS[kind]().double(), nn.Linear(8, 5).double()
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["convolution", "head"]), self)
        self.positions = (7, 6) if kind.startswith("2d") else (11,)
        self.pairs = pairs(self, convolutions=True)
        for pair in self.pairs:
            for factor in (pair.A, pair.B):
                factor.data = torch.randn(factor.shape, dtype=torch.float64) / 4
                if channels_last and factor.ndim == 4:
                    factor.data = factor.data.to(memory_format=torch.channels_last)

    def batch(self, step: int) -> Tensor:
        return torch.randn(4, 3, *self.positions, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.convolution(x).flatten(2).mT)).square().mean()

    def deltas(self) -> list[Tensor]:
        return [pair.scale * pair.B.detach().flatten(1) @ pair.A.detach().flatten(1) for pair in self.pairs]

    def dense_gradients(self, layers: list[OPLoRALayer], step: int) -> list[tuple[Tensor, Tensor]]:
        """(S, X) of both layers, G = SᵀX by autograd through whole weights; of the convolution S = I and X = G."""
        base, a = self.convolution.base_layer, self.convolution.lora_A.default
        convolve = nn.functional.conv2d if len(self.positions) == 2 else nn.functional.conv1d
        whole, head = (layer.delta_weight().requires_grad_() for layer in layers)
        x = self.batch(step)
        y = base(x) + convolve(x, whole.view(8, 3, *a.kernel_size), stride=a.stride, padding=a.padding)
        hidden = torch.tanh(y.flatten(2).mT)
        output = hidden @ (self.head.base_layer.weight + head).T + self.head.base_layer.bias
        output.square().mean().backward()
        return [(torch.eye(8, dtype=torch.float64), whole.grad), (torch.eye(5, dtype=torch.float64), head.grad)]


@pytest.mark.parametrize("channels_last", [False, True])
@every_gradient
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions_follow_the_algorithm_box_on_dense_gradients(convolution: str, gradient: str, channels_last: bool) -> None:
    if channels_last and not convolution.startswith("2d"):
        pytest.skip("a layout of 2-d convolutions")
    model = Convolved(convolution, channels_last)
    optimizer = make(model, gradient=gradient, sketch_width=100)
    assert optimizer._handles and len(optimizer._pairs) == 2
    optimizer._create_state()
    layers = []
    for pair in model.pairs:
        start, settings = optimizer.state[pair.A]["momentum_v"].clone(), {"lr": LR, "momentum": 0.8}
        factors = pair.A.detach().flatten(1).clone(), pair.B.detach().flatten(1).clone()
        layers.append(OPLoRALayer(*factors, pair.scale, proximal=1e-3, momentum_start=start, **settings))
    first = model.deltas()
    for step in range(20):
        for layer, (s, x) in zip(layers, model.dense_gradients(layers, step), strict=True):
            layer.step(s, x)
        optimizer.zero_grad()
        model(model.batch(step)).backward()
        optimizer.step()
    for delta, layer, start in zip(model.deltas(), layers, first, strict=True):
        expected = layer.delta_weight()
        assert float((expected - start).norm()) > 1e-3
        assert float((delta - expected).norm() / expected.norm()) <= 1e-9


@every_kind
def test_convolutions_in_micro_batches_overlapped_and_resumed(kind: dict) -> None:
    """As one batch on a contiguous layout; the metric's X are the patches."""
    whole, parts = Convolved("2d"), Convolved("2d", channels_last=True)
    optimizers = make(whole, sketch_width=100, **kind), make(parts, sketch_width=100, **kind)
    overlapped = Convolved("2d", channels_last=True)
    early = make(overlapped, sketch_width=100, overlap=True, **kind)
    for step in range(6):
        if step == 3:
            saved, optimizer = copy.deepcopy(optimizers[1].state_dict()), optimizers[1]
            optimizer.close()
            optimizers = optimizers[0], make(parts, sketch_width=100, **kind)
            optimizers[1].load_state_dict(saved)
        x = whole.batch(step)
        for model, optimizer in ((whole, optimizers[0]), (overlapped, early)):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        optimizers[1].zero_grad()
        for half in x.split(2):
            (parts(half) / 2).backward()
        optimizers[1].step()
    for model in (parts, overlapped):
        for mine, theirs in zip(model.deltas(), whole.deltas(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_other_convolutions_are_left_to_adamw_with_a_notice() -> None:
    """Groups and three dimensions (PEFT), and a transposed A."""
    model = nn.Module()
    model.grouped, model.deep, model.plain = nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(3, 4, 2), nn.Conv2d(3, 4, 2)
    with pytest.warns(UserWarning, match="groups"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["grouped", "deep", "plain"]), model)
    model.transposed = nn.Module()
    model.transposed.lora_A = nn.ModuleDict({"default": nn.ConvTranspose2d(2, 5, 3, bias=False)})
    model.transposed.lora_B = nn.ModuleDict({"default": nn.ConvTranspose2d(5, 2, 1, bias=False)})
    with pytest.warns(UserWarning, match=r"6 adapter parameter\(s\).*convolutions in groups, transposed or 3-d.*get AdamW: grouped"):
        optimizer = make(model)
    assert [pair.name for pair in optimizer._pairs] == ["plain.default"]
    del model.plain
    with pytest.raises(ValueError, match="no pair of low-rank factors"):
        make(model)
