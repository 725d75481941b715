"""What holds for all compiled operations: one call, no result without memory, refusals, forks, and a missing extension."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from array import array

import pytest
import torch
from _native import _csrc
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import registry


@pytest.mark.parametrize(
    "operation",
    [
        "grouped_adamw_",
        "grouped_damped_inverse",
        "grouped_eigh",
        "grouped_gram",
        "grouped_polar",
        "grouped_preconditioner",
        "grouped_qr",
        "grouped_solve",
        "grouped_svd_product",
        "grouped_sylvester",
    ],
)
def test_one_call_whatever_the_number_of_layers(operation: str) -> None:
    counts = []
    for layers in (6, 60):
        xs = [torch.randn(40, 8) for _ in range(layers)]
        before, calls = registry.launch_count(), registry.call_counts().get((operation, "native"), 0)
        if operation == "grouped_adamw_":
            states = [torch.zeros(40, 8) for _ in xs]
            ops.grouped_adamw_(xs, xs, states, [s.clone() for s in states], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
        elif operation == "grouped_solve":
            ops.grouped_solve(torch.eye(8).repeat(layers, 1, 1), xs, side="right")
        elif operation in ("grouped_eigh", "grouped_damped_inverse"):
            getattr(ops, operation)(torch.eye(8).repeat(layers, 1, 1))
        elif operation == "grouped_preconditioner":
            ops.grouped_preconditioner(torch.eye(8, dtype=torch.float64).repeat(layers, 1, 1))
        elif operation == "grouped_sylvester":
            ops.grouped_sylvester(*[torch.eye(8, dtype=torch.float64).repeat(layers, 1, 1)] * 3)
        elif operation in ("grouped_gram", "grouped_polar", "grouped_qr"):
            getattr(ops, operation)(xs)
        else:
            ops.grouped_svd_product(xs, xs, 4)
        counts.append(registry.launch_count() - before)
        assert registry.call_counts()[operation, "native"] == calls + 1
    assert counts == [1, 1]


def test_empty_lists() -> None:
    ops.grouped_adamw_([], [], [], [], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    assert ops.grouped_qr([])[0] == []
    assert ops.grouped_polar([]) == []
    assert ops.grouped_gram([]).shape == (0, 0, 0)
    assert ops.grouped_solve(torch.empty(0, 8, 8), []) == []
    assert ops.grouped_svd_product([], [], 3)[0] == []


def _work_in_child(results: multiprocessing.Queue, x: Tensor) -> None:
    with registry.force("native"):
        qs, rs = ops.grouped_qr([x] * 8)
        p, zero = x.clone(), torch.zeros_like(x)
        ops.grouped_adamw_([p], [x], [zero], [zero.clone()], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    results.put((qs[0].numpy(), rs[0].numpy()))  # torch's own products may wait for ever in a forked child


def test_forked_child(threads: None) -> None:
    """OpenMP's threads do not survive a fork: the child must work, serially, and not wait for them for ever."""
    x = torch.randn(3000, 8)
    ops.grouped_qr([x] * 8)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_work_in_child, args=(results, x))
    child.start()
    try:
        q, r = map(torch.from_numpy, results.get(timeout=60))
    finally:
        child.kill()
        child.join()
    assert (q.mT @ q - torch.eye(8)).abs().max() < 1e-5 and (q @ r - x).abs().max() < 1e-4


def test_refusals_name_the_reason() -> None:
    wide_factor = torch.randn(300, 129)
    with pytest.raises(registry.BackendError, match="r = 129"):
        ops.grouped_qr([wide_factor])
    with pytest.raises(registry.BackendError, match="r = 129"):
        ops.grouped_svd_product([wide_factor], [wide_factor], 4)
    for operation in (ops.grouped_eigh, ops.grouped_damped_inverse, ops.grouped_preconditioner):
        with pytest.raises(registry.BackendError, match="r = 129"):
            operation(torch.eye(129, dtype=torch.float64)[None])
    with pytest.raises(registry.BackendError, match="r = 129"):
        ops.grouped_sylvester(*[torch.eye(129, dtype=torch.float64)[None]] * 3)
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = torch.zeros(2, 3, 4, 5)
    with pytest.raises(registry.BackendError, match="strides"):
        ops.grouped_adamw_([channels_last], [channels_last], [state], [state], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with pytest.raises(registry.BackendError, match="GEMM"):
        ops.lora_linear(x, None, None, torch.randn(2, 8), torch.randn(3, 2))


def test_tables_are_checked() -> None:
    u = torch.randn(8, 4)
    with pytest.raises(ValueError, match="sections"):
        _csrc.svd_product(2, array("q", [0] * 10), 0, 4, 2, u.data_ptr(), 1)


def test_lists_are_checked() -> None:
    x, rs = torch.randn(9, 4), torch.empty(1, 4, 4)
    empty = torch.empty(9, 4, device="meta")
    for wrong, said in (([x[:3]], "not tall"), ([x[0]], "no matrix"), ([x, x], "different lengths"), ([empty], "strided|memory")):
        with pytest.raises(ValueError, match=said):
            _csrc.qr(wrong, 0, None, None, 0, None, [x], 0, None, 0, 4, rs.data_ptr(), 1)
    with pytest.raises(ValueError, match="do not fit"):
        _csrc.qr([x], 0, None, None, 0, None, [x[:8]], 0, None, 0, 4, rs.data_ptr(), 1)
    tail = ([], [], 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, True, False, 0, 0, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="do not fit"):
        _csrc.adamw([x], [x[:8]], [], [], None, *tail)
    x.grad = x.clone()
    layout = _csrc.gather([x], [0], {x: {}}, "exp_avg", "exp_avg_sq")[-1]
    with pytest.raises(ValueError, match="a layout of other lists"):
        _csrc.adamw([x, x], [x, x], [], [], layout, *tail)
    with pytest.raises(ValueError, match="a layout of another list"):
        _csrc.gram([x, x], 0, _csrc.matrix_layout([x], 0), None, 0, None, 0, True, 4, 4, rs.data_ptr(), 1)


def test_results_and_operands_without_memory_are_refused() -> None:
    x, square = torch.randn(9, 4), torch.eye(4)[None]
    lorsum = array("q", [0] * 14), 1, array("q", [0] * 8)
    calls = {
        "grouped_qr": lambda: _csrc.qr([x], 0, None, None, 0, None, [x.clone()], 0, None, 0, 4, 0, 1),
        "grouped_svd_product": lambda: _csrc.svd_product(
            1, array("q", [*[x.data_ptr()] * 4, 9, 9, *[4, 1] * 4]), 0, 4, 2, 0, 1
        ),
        "grouped_gram": lambda: _csrc.gram([x], 0, None, None, 0, None, 0, True, 4, 4, 0, 1),
        "grouped_solve": lambda: _csrc.solve([x], [x.clone()], False, 0, False, 4, 0, 0.1, 1),
        "grouped_eigh": lambda: _csrc.eigh(1, 4, 0, square.data_ptr(), 16, 4, 1, 0, 0, 1),
        "grouped_damped_inverse": lambda: _csrc.damped_inverse(1, 4, 0, 0, 16, 4, 1, 0.1, square.data_ptr(), 1),
        "grouped_preconditioner": lambda: _csrc.preconditioner(1, 4, 0, square.data_ptr(), 0, 0.1, 1.0, False, 0, 0, 1),
        "grouped_sylvester": lambda: _csrc.sylvester(1, 4, *[square.data_ptr(), (16, 4, 1)] * 2, square.data_ptr(), 0, 1),
        "grouped_lorsum": lambda: _csrc.lorsum(1, *lorsum, 0, 0, 0, 1, 0.0, True, 1),
        "grouped_altlora_turn": lambda: _csrc.altlora_turn(
            [x], [x], [], [], None, [x], 0, None, [], [1], 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, False, False, 4, 0, 0, 0.1, 0.1, 1.0, 1
        ),
    }  # fmt: skip
    for what, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{what}: a tensor without memory \(fake, meta or distributed\)"):
            call()
    assert _csrc.gram([], 0, None, None, 0, None, 0, True, 4, 4, 0, 1) is None, "nothing is written"


def test_a_missing_extension_is_reported_once_with_its_cause() -> None:
    code = (
        "import sys, warnings; sys.modules['lowrank_kernels.backends.native._csrc'] = None\n"
        "import torch; from lowrank_kernels import ops; from lowrank_kernels.backends import registry\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ops.grouped_qr([torch.randn(9, 3)]); ops.grouped_qr([torch.randn(9, 3)])\n"
        "found = [str(w.message) for w in caught if 'native' in str(w.message)]\n"
        "assert len(found) == 1 and 'did not load' in found[0] and 'compiler' in found[0], found\n"
        "assert 'did not load' in registry.unavailable()['native']\n"
        "assert registry.call_counts()['grouped_qr', 'reference'] == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LOWRANK_KERNELS_BACKEND": ""})
