"""Wrong arguments of every operation: an error that names the argument, what it is and what it should be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _linalg import SINGLE, negated
from torch import Tensor

from lowrank_kernels import ops

X, TALLER, WIDE, THREE = torch.ones(9, 4), torch.ones(11, 4), torch.ones(3, 4), torch.ones(9, 3)
EYE = torch.eye(4)[None]
NUMBERS: dict[str, object] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def adamw(param: Tensor = X, **changed: object) -> None:
    """A step that is refused, and so changes nothing."""
    own = X.clone()
    try:
        ops.grouped_adamw_([own, param], [X, param], [X * 0, X * 0], [X * 0, X * 0], **NUMBERS | changed)
    finally:
        assert torch.equal(own, X)


SCALAR, SPARSE = torch.ones(()), EYE.to_sparse()
MISUSES: list[tuple[Callable[[], object], str]] = [
    (lambda: adamw(X.to_sparse()), r"grouped_adamw_: params\[1\] is torch.sparse_coo; only strided"),
    (lambda: adamw(step=0), r"grouped_adamw_: step counts from 1, .* got step=0"),
    (lambda: adamw(step=2, missed=[0, 2]), r"must be above missed; got step=2 and missed=2"),
    (lambda: adamw(missed=[0, 0.5]), r"missed\[1\] must be an integer, got 0.5"),
    (lambda: adamw(step="1"), r"step must be an integer, got '1'"),
    (lambda: adamw(step=torch.ones(2)), r"step must be one number, got a tensor of shape \(2,\)"),
    (lambda: adamw(lr=math.nan), r"lr must be finite, got nan"),
    (lambda: adamw(lr=None), r"lr must be a number, got None"),
    (lambda: adamw(betas=0.9), r"betas must be two numbers, such as \(0.9, 0.999\), got 0.9"),
    (lambda: adamw(betas=(0.9,)), r"betas must be two numbers"),
    (lambda: adamw(betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
    (lambda: adamw(eps=None), r"eps must be a number, got None"),
    (lambda: adamw(eps=-1.0), r"eps must be ≥ 0, got -1.0"),
    (lambda: ops.grouped_adamw_([X], (x for x in [X]), [], [], **NUMBERS), r"grads must be a list, got generator"),
    (lambda: ops.grouped_gram([X, X.to_sparse()]), r"xs\[1\] is torch.sparse_coo; only strided tensors are taken"),
    (lambda: ops.grouped_solve([EYE[0]], [X.mT]), r"grouped_solve: grams must be one stacked tensor \(N, r, r\), got list"),
    (lambda: ops.grouped_svd_product((x for x in [X]), [X], 2), r"grouped_svd_product: lefts must be a list, got generator"),
    (lambda: ops.lora_linear([X], None, None, THREE, THREE), r"lora_linear: x must be a tensor, got list"),
    (lambda: ops.lora_linear(X, None, None, THREE.mT, None), r"lora_linear: b must be a tensor, got NoneType"),
    (lambda: ops.grouped_lorsum_product([([X], [THREE])], [X], [1.0]), r"^grouped_lorsum_product: terms\[0\]"),
    (lambda: ops.grouped_gram([X, THREE]), r"xs\[1\] has 3 columns"),
    (lambda: ops.grouped_gram([X, X.double()]), r"xs\[1\] has dtype torch.float64, expected torch.float32"),
    (lambda: ops.grouped_gram([X.long()]), r"xs\[0\] has dtype torch.int64"),
    (lambda: ops.grouped_gram([X[0]]), r"xs\[0\] must have 2 dimensions"),
    (lambda: ops.grouped_gram([X, "X"]), r"xs\[1\] must be a tensor"),
    (lambda: ops.grouped_gram([X, X.to("meta")]), r"xs\[1\] is on meta"),
    (lambda: ops.grouped_gram([X], [TALLER]), r"xs\[0\] has 9 rows, ys\[0\] has 11"),
    (lambda: ops.grouped_gram([X, X], [X]), r"lists must have equal lengths, got xs: 2, ys: 1"),
    (lambda: ops.grouped_gram([X], [X.double()]), r"ys\[0\] has dtype"),
    (lambda: ops.grouped_gram([X], dtype=torch.bfloat16), r"grouped_gram: dtype must be"),
    (lambda: ops.grouped_gram([X.double()], dtype=SINGLE), r"grouped_gram: dtype must be torch.float64, got"),
    (lambda: ops.grouped_solve(EYE[0], [X.mT]), r"grams must be \(N, r, r\)"),
    (lambda: ops.grouped_solve(EYE.bfloat16(), [X.mT]), r"grouped_solve: grams must be fp32 or fp64, got torch.bfloat16"),
    (lambda: ops.grouped_solve(EYE, [X.mT], side="both"), r"side must be one of 'left', 'right'"),
    (lambda: ops.grouped_solve(EYE, [X.mT], -1.0), r"damping must be ≥ 0, got -1"),
    (lambda: ops.grouped_solve(EYE, [X.mT], math.nan), r"damping must be ≥ 0, got nan"),
    (lambda: ops.grouped_solve(EYE, [X.mT], math.inf), r"grouped_solve: damping must be finite, got inf"),
    (lambda: ops.grouped_solve(EYE, [X.mT], "x"), r"grouped_solve: damping must be a number, got 'x'"),
    (lambda: ops.grouped_solve(EYE, [X.mT], None), r"grouped_solve: damping must be a number, got None"),
    (lambda: ops.grouped_damped_inverse(EYE, torch.ones(2)), r"grouped_damped_inverse: damping must be a number, got tensor"),
    (lambda: ops.grouped_preconditioner(EYE.double(), 0.1, weight=math.nan), r"grouped_preconditioner: weight must be finite, got nan"),
    (lambda: ops.grouped_solve(EYE, [X.mT, X.mT]), r"grouped_solve: rhs must be as many matrices as grams, 1, got 2"),
    (lambda: ops.grouped_solve(EYE, [X]), r"rhs\[0\] of shape \(9, 4\) does not fit 4 × 4 Grams from the left"),
    (lambda: ops.grouped_solve(EYE, [X.mT], side="right"), r"rhs\[0\] of shape \(4, 9\) does not fit"),
    (lambda: ops.grouped_solve(EYE, EYE.long()), r"rhs has dtype torch.int64; use one of .*torch.float32"),
    (lambda: ops.grouped_solve(EYE, EYE.to("meta")), r"rhs is on meta, grams is on cpu; move both to one device"),
    (lambda: ops.grouped_solve(EYE, X.mT), r"stacked rhs must have 3 dimensions"),
    (lambda: ops.grouped_solve(EYE, EYE, out=negated(EYE)), r"grouped_solve: out is written, but negated lazily"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=X.mT), r"grouped_solve: out must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[]), r"lists must have equal lengths, got rhs: 1, out: 0"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[X]), r"out\[0\] has shape \(9, 4\), rhs\[0\] has \(4, 9\)"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[X.mT.double()]), r"out\[0\] has dtype torch.float64, expected torch.float32"),
    (lambda: ops.grouped_solve(EYE, EYE, out=EYE[0]), r"out must be \(1, 4, 4\) torch.float32 on cpu, like rhs; got \(4, 4\)"),
    (lambda: ops.grouped_solve(EYE, EYE, out=[EYE[0]]), r"out must be \(1, 4, 4\) .* got list"),
    (lambda: ops.grouped_gram(X), r"grouped_gram: xs must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_gram(None), r"grouped_gram: xs must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_qr(X), r"grouped_qr: xs must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_qr(None), r"grouped_qr: xs must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_qr([WIDE]), r"xs\[0\] must be tall"),
    (lambda: ops.grouped_qr([X, THREE]), r"xs\[1\] has rank 3"),
    (lambda: ops.grouped_qr([X], [TALLER]), r"previous\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_qr([X], out=[TALLER]), r"out\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_qr([X], [X, X]), r"previous: 2"),
    (lambda: ops.grouped_svd_product([X], [THREE], 2), r"rights\[0\] has 3 columns"),
    (lambda: ops.grouped_svd_product([X, X], [X], 2), r"lefts: 2, rights: 1"),
    (lambda: ops.grouped_svd_product([WIDE], [X], 2), r"lefts\[0\] must be tall"),
    (lambda: ops.grouped_svd_product([X], [X], 5), r"rank must be between 1 and 4"),
    (lambda: ops.grouped_svd_product([X], [X], 0), r"rank must be ≥ 1"),
    (lambda: ops.grouped_svd([X, WIDE], 4), r"rank must be between 1 and min\(3, 4\) of xs\[1\]"),
    (lambda: ops.grouped_svd([X], 2, oversample=-1), r"oversample must be ≥ 0"),
    (lambda: ops.grouped_svd([X], 2, iterations=-1), r"iterations must be ≥ 0"),
    (lambda: ops.grouped_svd([X], 2, out=[X]), r"grouped_svd: out must be a pair \(us, vs\) of lists of tensors, got 1 values"),
    (lambda: ops.grouped_svd([X], 2, out=X), r"out must be a pair .* got Tensor"),
    (lambda: ops.grouped_svd([X], 4, out=([X], [X])), r"out\[1\]\[0\] must have shape \(4, 4\), got \(9, 4\)"),
    (lambda: ops.grouped_svd_product([X], [X], 4, out=([X, X], [X])), r"out\[0\] must have 1 tensors, got 2"),
    (lambda: ops.grouped_svd_product([X], [X], 4, out=([X], [X.double()])), r"out\[1\]\[0\] has dtype torch.float64"),
    (lambda: ops.grouped_polar([X, THREE]), r"xs\[1\] must be tall with 4 columns"),
    (lambda: ops.grouped_polar([WIDE]), r"xs\[0\] must be tall"),
    (lambda: ops.grouped_polar([X], out=[TALLER]), r"out\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_polar([X], out=[X, X]), r"out: 2"),
    (lambda: ops.grouped_eigh([EYE[0]]), r"grouped_eigh: xs must be one stacked tensor"),
    (lambda: ops.grouped_eigh(EYE[0]), r"grouped_eigh: xs must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_eigvalsh(EYE[:, :3]), r"grouped_eigvalsh: xs must be \(N, r, r\), got \(1, 3, 4\)"),
    (lambda: ops.grouped_eigh(EYE.bfloat16()), r"grouped_eigh: xs must be fp32 or fp64, got torch.bfloat16"),
    (lambda: ops.grouped_sylvester(EYE, EYE, EYE), r"grouped_sylvester: left must be fp64, got torch.float32"),
    (
        lambda: ops.grouped_sylvester(EYE.double(), EYE, EYE),
        r"grouped_sylvester: right must be torch.float64 of shape .* got",
    ),
    (lambda: ops.grouped_sylvester(*[EYE.double()] * 2, EYE.double()[:, :3, :3]), r"grouped_sylvester: rhs must be .* got .* \(1, 3, 3\)"),
    (lambda: ops.grouped_sylvester([EYE], EYE, EYE), r"grouped_sylvester: left must be one stacked tensor"),
    (lambda: ops.grouped_damped_inverse([EYE[0]]), r"grouped_damped_inverse: rs must be one stacked tensor"),
    (lambda: ops.grouped_damped_inverse(EYE[0]), r"grouped_damped_inverse: rs must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_damped_inverse(EYE.long()), r"grouped_damped_inverse: rs must be fp32 or fp64"),
    (lambda: ops.grouped_damped_inverse(EYE, -1.0), r"grouped_damped_inverse: damping must be ≥ 0, got -1"),
    (lambda: ops.grouped_preconditioner([EYE[0]]), r"grouped_preconditioner: grams must be one stacked tensor"),
    (lambda: ops.grouped_preconditioner(EYE), r"grouped_preconditioner: grams must be fp64, got torch.float32"),
    (lambda: ops.grouped_preconditioner(EYE[0].double()), r"grouped_preconditioner: grams must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_preconditioner(EYE.double(), drifts=[EYE[0]]), r"drifts must be one stacked tensor .* got list"),
    (lambda: adamw(grad_maps=[EYE[0]], rank_dims=[1, 1]), r"grouped_adamw_: grad_maps must be one stacked tensor .* got list"),
    (lambda: adamw(grad_maps=EYE, rank_dims=[1, 1]), r"grad_maps must be torch.float32 of shape \(2, 4, 4\) on cpu, got .* \(1, 4, 4\)"),
    (lambda: ops.grouped_preconditioner(EYE.double(), math.nan), r"grouped_preconditioner: damping must be ≥ 0, got nan"),
    (
        lambda: ops.grouped_preconditioner(EYE.double(), dtype=torch.bfloat16),
        r"dtype must be torch.float64 or torch.float32",
    ),
    (
        lambda: ops.grouped_preconditioner(EYE.double(), drifts=EYE),
        r"drifts must be torch.float64 of shape \(1, 4, 4\)",
    ),
    (lambda: adamw(lr=10**400), r"grouped_adamw_: lr must be finite, got a number beyond"),
    (lambda: adamw(lr=torch.ones(1, dtype=torch.complex64)), r"lr must be a real number, got a tensor of dtype torch.complex64"),
    (lambda: adamw(step=torch.ones(1, device="meta")), r"step must be a tensor that holds a value, or a number, got one on meta"),
    (lambda: adamw(step=10**30), r"step must be ≤ 2147483647"),
    (lambda: adamw(betas=(0.9, "x")), r"betas\[1\] must be a number, got 'x'"),
    (lambda: adamw(maximize="x"), r"maximize must be True or False, got 'x'"),
    (lambda: adamw(bias_correction=None), r"bias_correction must be True or False"),
    (lambda: adamw(missed=np.zeros(2)), r"missed must be a list, got ndarray"),
    (lambda: adamw(grad_maps=EYE, rank_dims=torch.ones(2)), r"rank_dims must be a list, got Tensor"),
    (lambda: adamw(drifts=EYE.repeat(2, 1, 1).to_sparse(), rank_dims=[1, 1]), r"drifts is torch.sparse_coo; only strided"),
    *[
        (lambda dims=dims: adamw(grad_maps=EYE.repeat(2, 1, 1), rank_dims=dims), r"rank_dims must be 0 \(a factor \(r, d\)\) or 1")
        for dims in ([1.0, 1.0], [True, True], [torch.ones(()), 1])
    ],
    *[
        (lambda states=states: ops.grouped_adamw_([X], [X], states, [], **NUMBERS), r"exp_avgs must be a list, got")
        for states in (None, False, X[None], SCALAR, np.zeros((1, 9, 4)))
    ],
    (lambda: ops.grouped_adamw_([X], SCALAR, [], [], **NUMBERS), r"grads must be a list, got Tensor"),
    (lambda: ops.grouped_adamw_(None, [], [], [], **NUMBERS), r"params must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_adamw_([], [X], [], [], **NUMBERS), r"equal lengths, got params: 0, grads: 1"),
    (lambda: ops.grouped_adamw_([], [], [], [], **NUMBERS | {"lr": "x"}), r"lr must be a number, got 'x'"),
    (lambda: ops.grouped_adamw_([negated(X)], [X], [], [], **NUMBERS), r"params\[0\] is written, but negated lazily"),
    (lambda: ops.grouped_polar([X], out=[negated(X)]), r"out\[0\] is written, but negated lazily"),
    *[(lambda ys=ys: ops.grouped_gram([X], ys), r"grouped_gram: ys(\[0\])? must be a") for ys in ("x", [None], 5, SCALAR)],
    (lambda: ops.grouped_gram([X], [X[0]]), r"ys\[0\] must have 2 dimensions"),
    (lambda: ops.grouped_qr([X], SCALAR), r"grouped_qr: previous must be a list, got Tensor"),
    (lambda: ops.grouped_svd_product(SCALAR, [X], 2), r"lefts must be a list, got Tensor"),
    (lambda: ops.grouped_eigh(SPARSE), r"grouped_eigh: xs is torch.sparse_coo; only strided tensors are taken, call .to_dense"),
    (lambda: ops.grouped_damped_inverse(SPARSE), r"grouped_damped_inverse: rs is torch.sparse_coo"),
    (lambda: ops.grouped_solve(SPARSE, [X.mT]), r"grouped_solve: grams is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, SPARSE), r"grouped_solve: rhs is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, EYE, out=SPARSE), r"grouped_solve: out is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, EYE, 10**400), r"grouped_solve: damping must be finite"),
    (lambda: ops.grouped_preconditioner(EYE.double(), transposed="x"), r"transposed must be True or False, got 'x'"),
    *[(lambda rank=rank: ops.grouped_svd_product([X], [X], rank), r"rank must be an integer") for rank in ("x", 1.5, True, SCALAR)],
    *[
        (lambda name=name, value=value: ops.grouped_svd([X], **{"rank": 2, name: value}), rf"grouped_svd: {name} must be (an integer|≤)")
        for name in ("rank", "oversample", "iterations")
        for value in ("x", [], SCALAR, True, 1.5, 10**30)
    ],
]


@pytest.mark.parametrize(("call", "message"), MISUSES, ids=[message for _, message in MISUSES])
def test_misuse_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_flags_may_be_numpys() -> None:
    up, down = X.clone(), X.clone()
    for param, maximize in ((up, np.True_), (down, np.False_)):
        ops.grouped_adamw_([param], [X], [X * 0], [X * 0], **NUMBERS | {"maximize": maximize, "weight_decay": 0.0})
    assert ((up - X) * (X - down) > 0).all()
