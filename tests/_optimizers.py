"""Every optimizer of the package, in the variants that every one of its promises is tested with."""

from __future__ import annotations

import pytest
import torch
from _models import loss_of
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.backends.registry import implementations, operations

OPTIMIZERS = {
    "AdamW": lambda params, **k: lk.AdamW(params, **{"lr": 1e-2, **k}),
    "SDSLoRA": lambda params, **k: lk.SDSLoRA(params, **{"lr": 1e-2, "total_steps": 40, **k}),
    "AltLoRA": lambda params, **k: lk.AltLoRA(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "AltLoRA-joint": lambda params, **k: lk.AltLoRA(params, **{"lr": 1e-2, "damping": 1e-3, "order": "joint", **k}),
    "AltLoRAPlus": lambda params, **k: lk.AltLoRAPlus(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "AltLoRAPlus-A-freeze": lambda params, **k: lk.AltLoRAPlus(params, **{"lr": 1e-2, "order": "A", "freeze_idle": True, **k}),
    "ScaledGD": lambda params, **k: lk.ScaledGD(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "ScaledGD-momentum": lambda params, **k: lk.ScaledGD(params, **{"lr": 1e-2, "damping": 1e-3, "momentum": 0.5, **k}),
    "ScaledAdamW": lambda params, **k: lk.ScaledAdamW(params, **{"lr": 1e-2, **k}),
    "LoRAPro": lambda params, **k: lk.LoRAPro(params, **{"lr": 1e-2, **k}),
    "LoRARITE": lambda params, **k: lk.LoRARITE(params, **{"lr": 1e-2, **k}),
    "OPLoRA": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, **k}),
    "OPLoRA-dense-projected": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, "gradient": "dense", "momentum_mode": "projected", **k}),
    "OPLoRA-sketch": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, "gradient": "sketch", "sketch_width": 4, **k}),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def with_reference(backend: str) -> str:
    """For ``force``: a backend, and the reference for the operations that it does not have."""
    return ",".join([backend, *(f"{operation}=reference" for operation in operations() if backend not in implementations(operation))])


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, dtype: torch.dtype = torch.float64) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()
