"""The two sides of the matrix: every optimizer of the package, and what a training stack may do with it.

An optimizer is one line of :data:`METHODS`. A feature is a function of a :class:`Cell`, decorated by :func:`feature`; it holds for
every method, or asserts the error by which a method refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk


@dataclass(frozen=True)
class Method:
    """How an optimizer is made.

    Attributes:
        optimizer: the class.
        options: for it, beside the learning rate; schedules are short, so that a dozen steps contain every phase of a method.
        adapter: ``method=`` of ``lowrank_kernels.adapt``.
        peft_rank: the rank of PEFT's layers, in units of the trained rank; None where it refuses them.
        capturable: the options that its ``capturable=True`` needs; None where it refuses.
        fsdp: how it trains sharded factors: "shards" (A along d_in only), "any" (whatever the sharding); None: it refuses them.
    """

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    adapter: str = "lora"
    peft_rank: int | None = 1
    capturable: dict[str, Any] | None = None
    fsdp: str | None = None

    @property
    def peft(self) -> bool:
        """Whether it trains PEFT's layers."""
        return self.peft_rank is not None


METHODS = {
    "AdamW": Method(lk.AdamW, capturable={}, fsdp="any"),
    "SDSLoRA": Method(lk.SDSLoRA, {"total_steps": 40, "warmup_steps": 3}, adapter="sds", peft_rank=2, fsdp="any"),
    "ODLoRA": Method(lk.ODLoRA, {"total_steps": 40, "rounds": 2, "round_steps": 2}, adapter="sds", peft_rank=2, fsdp="any"),
    "AltLoRA": Method(lk.AltLoRA, {"damping": 1e-3}, capturable={"order": "joint"}, fsdp="shards"),
    "AltLoRAPlus": Method(lk.AltLoRAPlus, {"damping": 1e-3}, capturable={"order": "joint"}, fsdp="shards"),
    "ScaledGD": Method(lk.ScaledGD, {"damping": 1e-3, "momentum": 0.5}, capturable={}, fsdp="shards"),
    "ScaledAdamW": Method(lk.ScaledAdamW, {"damping": 1e-3}, capturable={}, fsdp="shards"),
    "LoRAPro": Method(lk.LoRAPro, {"damping": 1e-3}, capturable={}, fsdp="shards"),
    "LoRARITE": Method(lk.LoRARITE, {"damping": 1e-3}, capturable={}),
    "OPLoRA": Method(lk.OPLoRA, {"momentum": 0.8}),
    "LoRASB": Method(lk.LoRASB, adapter="xs", peft_rank=None, capturable={}),
}

RANK = 3
TARGETS = ["up", "middle", "down"]
D_IN, CLASSES = 12, 5


@dataclass
class Cell:
    """One cell of the matrix: a method, a folder, and processes for what needs several."""

    name: str
    folder: Path
    ranks: Callable[..., list[Any]]

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def optimizer(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.method.optimizer(params, **{"lr": 1e-2, **self.method.options, **options})


@dataclass(frozen=True)
class Feature:
    """One row: its name in the documentation, and the test."""

    title: str
    check: Callable[[Cell], None]
    supports: Callable[[Method], bool]

    @property
    def row(self) -> str:
        """The row of docs/stacks.md."""
        supporting = [name for name, method in METHODS.items() if self.supports(method)]
        refusing = [name for name in METHODS if name not in supporting]
        if not supporting:
            by = "refused"
        elif len(refusing) > len(supporting):
            by = f"{', '.join(supporting)} only"
        else:
            by = f"all but {', '.join(refusing)}, which {'refuses' if len(refusing) == 1 else 'refuse'}" if refusing else "all"
        return f"| {self.title} | {by} |"


FEATURES: dict[str, Feature] = {}


def of_peft(method: Method) -> bool:
    """For :func:`feature`: the row is about PEFT's layers."""
    return method.peft


def feature(
    title: str, supports: Callable[[Method], bool] = lambda method: True
) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    """Make the function a row of the matrix, called ``title`` in docs/stacks.md; where it is not supported, the refusal is tested."""

    def register(check: Callable[[Cell], None]) -> Callable[[Cell], None]:
        tested = check
        if supports is of_peft:

            @functools.wraps(check)
            def tested(cell: Cell) -> None:
                check(cell) if cell.method.peft else assert_refuses_peft(cell)

        assert check.__name__ not in FEATURES and all(title != other.title for other in FEATURES.values())
        FEATURES[check.__name__] = Feature(title, tested, supports)
        return check

    return register


class Net(nn.Module):
    """Linear layers of different widths, a norm, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        # Widths that FSDP2 can shard along d_in over 2 and 4 ranks; 10 and 5 rows make uneven and empty shards.
        self.up, self.middle, self.down = nn.Linear(D_IN, 20), nn.Linear(20, 16), nn.Linear(16, 10)
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.middle(self.up(x).tanh()).tanh())))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A base model; the seed decides its weights."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def ours(cell: Cell, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The base model with our adapters."""
    model = net(seed, dtype)
    torch.manual_seed(seed + 1)
    settings = {"rank": RANK, "alpha": 2 * RANK, "rank_scaling": "lora", "target_modules": TARGETS, "modules_to_save": ["head"]}
    lk.adapt(model, method=cell.method.adapter, **settings | options)
    if cell.method.adapter == "xs":  # a core between zero factors cannot learn
        lk.initialize(model, "svd")
    return model


def with_peft(cell: Cell, seed: int = 0, base: nn.Module | None = None, **options: Any) -> peft.PeftModel:
    """The base model with PEFT's adapters, unmodified."""
    model = net(seed) if base is None else base
    torch.manual_seed(seed + 1)
    rank = RANK * (cell.method.peft_rank or 1)
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS, "modules_to_save": ["head"]}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


def models(cell: Cell) -> list[Callable[[Cell], nn.Module]]:
    """The kinds of adapters that the method trains: ours, and PEFT's."""
    return [ours, with_peft] if cell.method.peft else [ours]


def assert_refuses_peft(cell: Cell) -> None:
    """A method of our layers alone says so when it is given PEFT's."""
    with pytest.raises(ValueError, match=r"found no core lora_R .*adapt the model with method='xs'"):
        cell.optimizer(with_peft(cell))


def data(step: int, rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step, a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, D_IN, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :CLASSES].argmax(dim=1)).long()


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cross-entropy on the batch of a step."""
    x, y = data(step, dtype=dtype)
    return nn.functional.cross_entropy(model(x).float() if dtype != torch.float64 else model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """The plain loop; returns the losses."""
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module | dict[str, Tensor], other: nn.Module | dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal parameters and buffers, bit for bit unless told otherwise (relative to each tensor's largest element)."""
    mine, theirs = (x if isinstance(x, dict) else x.state_dict() for x in (model, other))
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        if tolerance == 0.0:
            assert torch.equal(value, theirs[name]), name
        else:
            error = (value.double() - theirs[name].double()).abs().max().item() if value.numel() else 0.0
            assert error <= tolerance * theirs[name].double().abs().max().clamp_min(1e-3).item(), (name, error)


def assert_moved(before: dict[str, Tensor], model: nn.Module) -> None:
    """Every pair and the head were trained."""
    after = model.state_dict()
    for part in (*TARGETS, "head"):
        moved = [name for name in after if part in name.split(".") and not torch.equal(before[name], after[name])]
        assert moved, f"{part} was not trained"


def state_copy(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """A deep copy of the optimizer's state and counters."""
    import copy

    return copy.deepcopy(optimizer.state_dict())


def assert_same_state(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal state dictionaries of optimizers, bit for bit."""
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in mine["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(value, theirs["state"][key][name]), (key, name)
    for group, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert group == other
