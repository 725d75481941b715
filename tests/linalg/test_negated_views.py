"""Tensors that are negated lazily, as ``z.conj().imag`` is: read as what they stand for, refused where they would be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _linalg import CALLS, DOUBLE, for_every_operation, negated, on_every_backend, running
from torch import Tensor

from lowrank_kernels import AdamW, ops


@on_every_backend
@pytest.mark.parametrize(
    "operation", ["grouped_eigh", "grouped_damped_inverse", "grouped_preconditioner", "grouped_solve", "grouped_sylvester"]
)
def test_stacks_that_are_negated_lazily(backend: str, operation: str) -> None:
    xs = torch.randn(3, 9, 4, dtype=DOUBLE)
    stack = xs.mT @ xs + (torch.eye(4) if operation != "grouped_damped_inverse" else 0)
    stack = stack.triu() if operation == "grouped_damped_inverse" else stack
    rhs = torch.randn(3, 4, 4 if operation == "grouped_sylvester" else 5, dtype=DOUBLE)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "grouped_eigh": lambda s, _: ops.grouped_eigh(s)[0],
        "grouped_damped_inverse": lambda s, _: ops.grouped_damped_inverse(s, 0.1),
        "grouped_preconditioner": lambda s, _: ops.grouped_preconditioner(s, 0.1)[0],
        "grouped_solve": lambda s, r: ops.grouped_solve(s, r, 0.1),
        "grouped_sylvester": lambda s, r: ops.grouped_sylvester(s, s, r),
    }
    with running(operation, backend):
        torch.testing.assert_close(calls[operation](negated(stack), negated(rhs)), calls[operation](stack, rhs))


@on_every_backend
@for_every_operation
def test_lists_that_are_negated_lazily(backend: str, operation: str) -> None:
    xs = [torch.randn(rows, 4, dtype=DOUBLE) for rows in (30, 50, 30)]
    with running(operation, backend):
        expected, results = CALLS[operation](xs), CALLS[operation]([xs[0], negated(xs[1]), xs[2]])
    torch.testing.assert_close(results, expected)


@on_every_backend
@pytest.mark.parametrize("operation", ["grouped_gram", "grouped_qr", "grouped_lorsum", "grouped_lorsum_product"])
def test_second_lists_that_are_negated_lazily(backend: str, operation: str) -> None:
    """Optional ones, whose negation torch's dispatcher does not resolve."""
    xs, ys, zs = ([torch.randn(9, 4, dtype=DOUBLE) for _ in range(2)] for _ in range(3))
    calls: dict[str, Callable[[list[Tensor]], Any]] = {
        "grouped_gram": lambda y: ops.grouped_gram(xs, y),
        "grouped_qr": lambda y: ops.grouped_qr(xs, y),
        "grouped_lorsum": lambda y: ops.grouped_lorsum((xs, zs), [(xs, y)], [1.0]),
        "grouped_lorsum_product": lambda y: ops.grouped_lorsum_product([(xs, y)], zs, [1.0]),
    }
    with running(operation, backend):
        torch.testing.assert_close(calls[operation]([ys[0], negated(ys[1])]), calls[operation](ys))


@on_every_backend
def test_a_moment_step_of_what_is_negated_lazily(backend: str) -> None:
    params, grads = ([torch.randn(rows, 4) for rows in (5, 7)] for _ in range(2))
    outcomes, numbers = [], {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    for change in (torch.clone, negated):
        stepped, moments = [p.clone() for p in params], [[torch.zeros(rows, 4) for rows in (5, 7)] for _ in range(2)]
        with running("grouped_adamw_", backend):
            ops.grouped_adamw_(stepped, [change(g) for g in grads], *moments, **numbers)
        outcomes.append([*stepped, *moments[0], *moments[1]])
    torch.testing.assert_close(outcomes[1], outcomes[0])
    with pytest.raises(ValueError, match=r"params\[1\] is written, but negated lazily"):
        ops.grouped_adamw_([params[0], negated(params[1])], grads, *moments, **numbers)


def test_an_optimizer_steps_by_a_gradient_that_is_negated_lazily() -> None:
    start, grad = torch.randn(2, 6, 4)
    outcomes = []
    for change in (torch.clone, negated):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = change(grad)
        AdamW([parameter], lr=0.1).step()
        outcomes.append(parameter.detach())
    torch.testing.assert_close(outcomes[1], outcomes[0])
    parameter = torch.nn.Parameter(negated(start))
    parameter.grad = grad
    optimizer = AdamW([parameter], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] is written, but negated lazily"):
        optimizer.step()
    assert torch.equal(parameter.detach(), start) and optimizer._torn is None
