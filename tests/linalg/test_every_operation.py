"""What all operations promise: matrices of one call do not touch each other, inputs are not written, and what torch's transforms see."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import CALLS, DOUBLE, for_every_operation, in_both_dtypes, on_every_backend, running

from lowrank_kernels import ops
from lowrank_kernels.backends import force, implementations


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("operation", ["grouped_eigh", "grouped_damped_inverse"])
def test_one_matrix_that_is_not_finite_spoils_no_other(backend: str, dtype: torch.dtype, operation: str) -> None:
    xs = torch.randn(21, 5, 5, dtype=dtype)
    xs = (xs + xs.mT if operation == "grouped_eigh" else xs.triu()).contiguous()
    spoilt = xs.clone()
    spoilt[2, 1, 1], spoilt[9, 2, 4], spoilt[20, 0, 3] = math.nan, math.inf, -math.inf
    with running(operation, backend), torch.no_grad():
        if operation == "grouped_eigh":
            clean, results = [(*ops.grouped_eigh(x), ops.grouped_eigvalsh(x)) for x in (xs, spoilt)]
        else:
            clean, results = [(ops.grouped_damped_inverse(x, 0.1),) for x in (xs, spoilt)]
    for before, after in zip(clean, results, strict=True):
        for index in range(21):
            assert after[index].isnan().all() if index in (2, 9, 20) else torch.equal(after[index], before[index])


@on_every_backend
@in_both_dtypes
@for_every_operation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_own_matrix(backend: str, dtype: torch.dtype, operation: str, bad: float) -> None:
    xs = [torch.randn(rows, 4, dtype=dtype) for rows in (30, 50, 30, 30, 50)]
    spoilt = [x.clone() for x in xs]
    spoilt[1][7, 2] = bad
    spoilt[3][0, 0] = bad
    with running(operation, backend):
        clean, results = CALLS[operation](xs), CALLS[operation](spoilt)
    for index, (expected, result) in enumerate(zip(clean, results, strict=True)):
        if index in (1, 3):
            assert not result.isfinite().all(), f"{operation} hides what is not finite"
        else:
            # A batch of same-shaped matrices may be computed together, to rounding.
            torch.testing.assert_close(result, expected, rtol=0, atol=0 if operation != "grouped_svd" else 100 * torch.finfo(dtype).eps)


@on_every_backend
@for_every_operation
def test_inputs_are_not_written(backend: str, operation: str) -> None:
    xs = [torch.randn(rows, 4) for rows in (30, 50)]
    before = [x.clone() for x in xs]
    with running(operation, backend):
        CALLS[operation](xs)
    assert all(map(torch.equal, xs, before))


@for_every_operation
def test_no_backward(operation: str) -> None:
    xs = [torch.randn(rows, 4, requires_grad=True) for rows in (30, 50)]
    with pytest.raises(RuntimeError, match=f"{operation} has no backward.*no_grad"):
        sum(result.sum() for result in CALLS[operation](xs)).backward()


def test_empty_lists() -> None:
    assert ops.grouped_gram([]).shape[0] == 0
    assert ops.grouped_qr([])[0] == []
    assert ops.grouped_solve(torch.empty(0, 3, 3), []) == []
    assert ops.grouped_svd_product([], [], 2)[0] == []
    assert ops.grouped_svd([], 2)[0] == []
    assert ops.grouped_polar([]) == []
    assert ops.grouped_eigh(torch.empty(0, 3, 3))[1].shape == (0, 3, 3)
    assert ops.grouped_damped_inverse(torch.empty(0, 3, 3)).shape == (0, 3, 3)
    assert ops.grouped_sylvester(*[torch.empty(0, 3, 3, dtype=DOUBLE)] * 3).shape == (0, 3, 3)
    assert ops.grouped_preconditioner(torch.empty(0, 3, 3, dtype=DOUBLE))[0].shape == (0, 3, 3)


@on_every_backend
def test_opcheck(backend: str) -> None:
    namespace = torch.ops.lowrank_kernels
    xs = [torch.randn(rows, 4, dtype=DOUBLE) for rows in (9, 6)]
    strided = [x.mT.contiguous().mT for x in xs]
    spd = torch.stack([x.mT @ x for x in xs])
    previous, out, rs = [torch.linalg.qr(x)[0] for x in xs], [torch.empty_like(x) for x in xs], torch.empty(2, 4, 4, dtype=DOUBLE)
    moments = [[torch.rand(x.shape, dtype=DOUBLE) for x in xs] for _ in range(2)]
    lists = ([x.clone() for x in xs], strided, *moments)
    no_maps, maps = (None, None, None, None, [], None), (spd, spd.triu(), 0.1 * spd, spd.mT, [1, 1], rs.clone())
    numbers, tensors = (0.1, None, 0.9, 0.99, 1e-8, 0.01, 3, None), (0.0, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.01, 0, torch.tensor(3.0))
    for operation, overload, arguments in (
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *no_maps, *numbers, [], True, False)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists[:2], [], [], *no_maps, *numbers, [], False, True)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *maps, *numbers, [0, 2], True, True)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *maps, *tensors, [], True, False)),
        ("grouped_gram", namespace.grouped_gram, (strided, None, False)),
        ("grouped_gram", namespace.grouped_gram, (strided, xs, True)),
        ("grouped_qr", namespace.grouped_qr, (strided, None)),
        ("grouped_qr", namespace.grouped_qr, (xs, previous)),
        ("grouped_qr", namespace.grouped_qr_out, (xs, previous, out, rs)),
        ("grouped_solve", namespace.grouped_solve, (spd, xs, 0.1, False)),
        ("grouped_solve", namespace.grouped_solve, (spd, [x.mT for x in xs], 0.0, True)),
        ("grouped_solve", namespace.grouped_solve_out, (spd, xs, 0.1, False, out)),
        ("grouped_solve", namespace.grouped_solve_stacked, (spd, spd, 0.1, False)),
        ("grouped_solve", namespace.grouped_solve_stacked_out, (spd, rs, 0.1, True, rs.clone())),
        ("grouped_svd_product", namespace.grouped_svd_product, (xs, strided, 2)),
        ("grouped_svd", namespace.grouped_svd, (xs, 2, 1, None)),
        ("grouped_polar", namespace.grouped_polar, (strided,)),
        ("grouped_polar", namespace.grouped_polar_out, (xs, out)),
        ("grouped_eigh", namespace.grouped_eigh, (spd,)),
        ("grouped_eigh", namespace.grouped_eigvalsh, (spd.mT,)),
        ("grouped_damped_inverse", namespace.grouped_damped_inverse, (spd.triu(), 0.1)),
        ("grouped_sylvester", namespace.grouped_sylvester, (spd, spd.mT, spd.triu().mT)),
        ("grouped_preconditioner", namespace.grouped_preconditioner, (spd, None, 0.1, 1.0, False, torch.float32)),
        ("grouped_preconditioner", namespace.grouped_preconditioner, (spd.mT, spd.triu(), 0.1, 0.5, True, DOUBLE)),
    ):
        if backend in implementations(operation):
            with force(f"{operation}={backend}"):
                torch.library.opcheck(overload, arguments)


def test_forward_mode_is_refused() -> None:
    x = torch.randn(9, 4)
    for call in (
        lambda x: ops.grouped_gram([x]),
        lambda x: ops.grouped_qr([x])[1],
        lambda x: ops.grouped_solve(torch.eye(4)[None], x.mT[None]),
    ):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative .* detached"):
            torch.func.jvp(call, (x,), (x,))
        assert torch.equal(torch.func.jvp(lambda x, call=call: call(x.detach()) + x[0, 0] * 0, (x,), (x,))[0], call(x))


def test_functionalized_calls_are_the_eager_ones() -> None:
    x = torch.randn(9, 4)
    for call in (
        lambda x: ops.grouped_gram([x, x]),
        lambda x: ops.grouped_qr([x])[0][0],
        lambda x: ops.grouped_polar([x])[0],
        lambda x: ops.grouped_svd_product([x], [x], 2)[1],
        lambda x: ops.grouped_lorsum(([x], [x]), [([x], [x])], [0.5])[0][0],
    ):
        assert torch.equal(torch.func.functionalize(call)(x), call(x))
