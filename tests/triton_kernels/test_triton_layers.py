"""Low-rank layers and their dropout in Triton, against the reference in fp64: in the interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _triton_kernels import WIDE, assert_accurate
from torch import Tensor

pytest.importorskip("triton")
from lowrank_kernels.backends import reference
from lowrank_kernels.backends.triton import dropout, lora_linear, lora_shared

pytestmark = pytest.mark.usefixtures("nan_scratch")


def enough(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of a large size, what splits the sums too: without a GPU's table of tiles, those of wide dtypes have half the tokens and columns."""
    return size // 2 if size > 256 and WIDE[dtype] == dtype and device.type == "cpu" else size


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank, tokens", [(1, 70), (8, 530), (33, 40), (128, 40), (4, 0)])
@pytest.mark.parametrize("kind, drop", [("plain", "nothing"), ("plain", "mask"), ("decoupled", "seed"), ("core", "seed")])
def test_lora_linear(device: torch.device, dtype: torch.dtype, rank: int, tokens: int, kind: str, drop: str) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    d_in, d_out, tokens = 70, 50, enough(tokens, dtype, device)
    if tokens > 100 and drop == "seed":
        drop = "mask"  # random bits are slow in the interpreter; the test of tile shapes below draws them for many tokens
    for base in (True, False):
        x, grad, a, b = make(d_in, tokens).mT, make(tokens, d_out), make(rank, d_in), make(d_out, rank)
        weight, bias = (make(d_out, d_in), make(d_out)) if base else (None, None)
        q_a, q_b = (make(rank, d_in), make(d_out, rank)) if kind == "decoupled" else (None, None)
        wide_core = torch.randn(rank, rank, dtype=torch.float64, device=device).mT if kind == "core" else None
        core = None if wide_core is None else wide_core.to(torch.promote_types(dtype, torch.float32))
        keep = 1.0 if drop == "nothing" else 0.75
        mask = torch.rand(tokens, d_in, device=device) < keep if drop == "mask" else None
        # The reference gets the mask, the kernels the seed.
        seed, theirs_mask = None, mask
        if drop == "seed":
            seed = torch.randint(-(2**62), 2**62, (1,), device=device)
            theirs_mask = reference.dropout.dropout_mask(seed, tokens, d_in, keep)
        narrow = (x, weight, bias, a, b, q_a, q_b)
        exact = tuple(None if t is None else t.double() for t in narrow)
        tail, their_tail = (0.7, mask, keep), (0.7, theirs_mask, keep)
        cores = (core, core, None if core is None else core.double())
        outs = [
            lora_linear.lora_linear(*narrow, *tail, cores[0], seed),
            reference.lora_linear.lora_linear(*narrow, *their_tail, cores[1]),
            reference.lora_linear.lora_linear(*exact, *their_tail, cores[2]),
        ]
        for out, theirs, truth in zip(*outs, strict=True):
            assert_accurate(out, theirs, truth, "forward")
        has_core = core is not None
        for needs in (
            [True, base, base, True, True, has_core],
            [False, False, False, True, False, False],
            [True, False, False, False, False, has_core],
            [False] * 5 + [has_core],
        ):
            grads = []
            for f, (xx, w, _, aa, bb, qa, qb), g, hidden, rest, last in (
                (lora_linear.lora_linear_backward, narrow, grad, outs[1][1], tail, (cores[0], seed)),
                (reference.lora_linear.lora_linear_backward, narrow, grad, outs[1][1], their_tail, (cores[1],)),
                (reference.lora_linear.lora_linear_backward, exact, grad.double(), outs[2][1], their_tail, (cores[2],)),
            ):
                grads.append(f(g, xx, w, aa, bb, qa, qb, hidden, *rest, needs, *last))
            assert len(grads[0]) == sum(needs)
            for out, theirs, truth in zip(*grads, strict=True):
                assert out.shape == truth.shape
                assert_accurate(out, theirs, truth, "backward")


def test_entries_that_32_bits_cannot_reach_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of x that lie 2²⁹ entries apart: offsets within a row are 32-bit in the kernels."""
    seen: list[Tensor] = []
    monkeypatch.setattr(lora_linear, "launch", lambda kernel, grid, *args, **options: seen.append(args[1 if len(seen) == 1 else 0]))
    far, factor = torch.empty_strided((4, 8), (1, 1 << 29), device="meta"), torch.empty_strided((8, 2), (2, 1), device="meta")
    lora_linear.project(far, None, 1.0, factor, None, False)
    lora_linear.token_sum(torch.empty_strided((4, 2), (2, 1), device="meta"), far, None, 1.0, factor.mT, 1, 8)
    assert [x.stride() for x in seen] == [(8, 1), (8, 1)]


def test_factors_that_32_bits_cannot_reach_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a factor that lie 2²⁸ entries apart, as in a few columns of a large matrix."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(kernel: Any, grid: object, *args: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        seen[kernel.fn.__name__] = [named[name].stride() for name in ("first", "second") if name in named]

    monkeypatch.setattr(lora_linear, "launch", note)
    far = torch.empty_strided((8, 2), (1 << 28, 1), device="meta")
    by_rank = torch.empty_strided((8, 2), (1, 1 << 30), device="meta")
    x, hidden = torch.empty(4, 8, device="meta"), torch.empty(4, 2, device="meta")
    lora_linear.project(x, None, 1.0, far, by_rank, False)
    lora_linear.expand(x, None, None, 1.0, hidden, far, hidden, by_rank, False)
    lora_linear.output_grads(x, hidden, far, by_rank, 1.0, 1.0)
    assert seen["project_kernel"] == seen["expand_kernel"] == seen["output_grads_kernel"] == [(2, 1)] * 2


@pytest.mark.parametrize("tokens, columns", [(1, 1), (70, 130), (33, 8), (3, 777), (0, 5), (4, 0)])
def test_the_kernels_masks_are_the_references(device: torch.device, tokens: int, columns: int) -> None:
    for number in (0, 7, 2**31, 2**62 + 3, -1, -(2**63)):
        for keep in (0.5, 1 / 65536, 0.9000091552734375, 1.0):
            seed = torch.tensor([number], device=device)
            ours, theirs = (module.dropout_mask(seed, tokens, columns, keep) for module in (dropout, reference.dropout))
            assert ours.dtype == theirs.dtype == torch.bool and ours.device == theirs.device
            assert torch.equal(ours, theirs)


def test_every_kernel_and_every_tile_shape_drops_the_same(device: torch.device) -> None:
    """Forward, ∂x and ∂A by identity matrices, whose entries show x̃ itself; ranks and dtypes that differ in their tiles."""
    tokens, d = 300, 16
    seed, keep = torch.tensor([-12345678901234], device=device), 0.5
    mask = reference.dropout.dropout_mask(seed, tokens, d, keep)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, grad = torch.ones(tokens, d, device=device, dtype=dtype), torch.ones(tokens, d, device=device, dtype=dtype)
        for rank in (d, 70):  # the identity, padded with zeros
            a = torch.eye(rank, d, device=device, dtype=dtype)
            b = a.mT.contiguous()
            y, hidden = lora_linear.lora_linear(x, None, None, a, b, None, None, 1.0, None, keep, None, seed)
            assert torch.equal(y != 0, mask) and torch.equal(hidden[:, :d] != 0, mask)
            needs = [True, False, False, True, False, False]
            of_x, of_a = lora_linear.lora_linear_backward(grad, x, None, a, b, None, None, hidden, 1.0, None, keep, needs, None, seed)
            assert torch.equal(of_x != 0, mask)
            assert torch.equal(of_a[0].double(), mask.sum(0) / keep)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank, tokens", [(1, 70), (24, 530), (64, 40), (4, 0)])
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_lora_shared(device: torch.device, dtype: torch.dtype, rank: int, tokens: int, decoupled: bool) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    def compare(name: str, *args: object) -> None:
        exact = [a.double() if isinstance(a, Tensor) else a for a in args]
        calls = ((lora_shared, args), (reference.lora_shared, args), (reference.lora_shared, exact))
        outs = [getattr(module, name)(*data) for module, data in calls]
        outs = [out if isinstance(out, (tuple, list)) else [out] for out in outs]
        for out, theirs, truth in zip(*outs, strict=True):
            assert (out is None) == (truth is None)
            if truth is not None:
                assert out.shape == truth.shape
                assert_accurate(out, theirs, truth, name)

    d_in, d_out, tokens = 70, enough(330, dtype, device), enough(tokens, dtype, device)
    x, a, q = make(d_in, tokens).mT, make(rank, d_in), make(rank, d_in) if decoupled else None
    compare("lora_down", x, a, q)
    on_a, on_q, grad_x = make(tokens, rank), make(tokens, rank) if decoupled else None, make(tokens, d_in)
    for arguments in (
        (grad_x, on_a, on_q, x, a, q),
        (None, on_a, on_q, None, a, q),
        (None, on_a, None, x, None, None),
        (grad_x, None, on_q, x, a, q),
    ):
        if arguments[1] is not None or arguments[2] is not None:
            compare("lora_down_backward", *arguments)
    both = make(tokens, 2 * rank + 1)
    hidden, hidden_q = both[:, : 2 * rank : 2], both[:, rank : 2 * rank] if decoupled else None
    weight, bias, b, q_b = make(d_out, d_in), make(d_out), make(d_out, rank), make(d_out, rank) if decoupled else None
    compare("lora_up", x, weight, bias, hidden, b, hidden_q, q_b, 0.7)
    compare("lora_up", None, None, None, hidden, b, hidden_q, q_b, 0.7)
    grad = make(d_out, tokens).mT
    for needs in (
        [True, True, True, decoupled],
        [False, False, True, decoupled],
        [True, True, False, False],
        [False, False, False, decoupled],
    ):
        compare("lora_up_backward", grad, weight, hidden_q if decoupled else hidden, b, q_b, 0.7, needs)
