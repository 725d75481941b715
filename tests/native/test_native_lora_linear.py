"""The compiled adapter of a linear layer against fp64, by the tolerance rule of the package."""

from __future__ import annotations

import itertools

import pytest
import torch
from _native import _csrc, assert_close_to_fp64
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import reference, registry
from lowrank_kernels.backends.native import lora_linear as native

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
# Tokens, d_in, d_out, r: fewer than a tile, tiles and what is left, more than one block of tokens, of widths, of sums over tokens.
SIZES = [(1, 1, 1, 1), (5, 7, 9, 3), (13, 33, 50, 8), (61, 200, 96, 4), (300, 100, 131, 16), (64, 530, 1030, 5), (700, 48, 97, 32)]


def layer(tokens: int, d_in: int, d_out: int, rank: int, decoupled: bool, biased: bool = True) -> dict[str, Tensor | None]:
    """Arguments of the forward operation, fp64, at the sizes of a real layer: all parts of y are of order one."""
    sizes = {"x": (tokens, d_in), "weight": (d_out, d_in), "bias": (d_out,), "a": (rank, d_in), "b": (d_out, rank)}
    sizes |= {"q_a": (rank, d_in), "q_b": (d_out, rank)}
    left_out = (set() if decoupled else {"q_a", "q_b"}) | (set() if biased else {"weight", "bias"})
    root = {"x": 1.0, "bias": 1.0, "b": rank, "q_b": rank}
    made = {name: torch.randn(size, dtype=torch.float64) / root.get(name, d_in) ** 0.5 for name, size in sizes.items()}
    return {name: None if name in left_out else tensor for name, tensor in made.items()}


def cast(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}


def assert_as_good(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for mine, torchs, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torchs.dtype and mine.shape == truth.shape and mine.is_contiguous()
        assert_close_to_fp64(mine, torchs, truth)


def both(given: dict[str, Tensor | None], grad: Tensor, needs: list[bool], module, mask: Tensor | None = None) -> list[Tensor]:
    """y, hidden and the gradients that are needed."""
    x, weight, bias, *factors = given.values()
    y, hidden = module.lora_linear(x, weight, bias, *factors, 0.3, mask, 0.5)
    return [y, hidden, *module.lora_linear_backward(grad, x, weight, *factors, hidden, 0.3, mask, 0.5, needs)]


@DTYPES
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(
    size: tuple[int, ...], decoupled: bool, dtype: torch.dtype, instruction_set: str, guarded_scratch: None
) -> None:
    given, grad = layer(*size, decoupled), torch.randn(size[0], size[2], dtype=torch.float64)
    needs = [True] * 5 + [False]
    ours, theirs, exact = (
        both(cast(given, t), grad.to(t), needs, module)
        for module, t in ((native, dtype), (reference.lora_linear, dtype), (reference.lora_linear, torch.float64))
    )
    assert_as_good(ours, theirs, exact)


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("biased", [False, True], ids=["alone", "on a base"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_every_choice_of_gradients(decoupled: bool, biased: bool, masked: bool) -> None:
    given = layer(70, 40, 30, 4, decoupled, biased)
    grad, mask = torch.randn(70, 30, dtype=torch.float64), torch.rand(70, 40) < 0.5 if masked else None
    for needs in itertools.product([False, True], repeat=5):
        if biased or not (needs[1] or needs[2]):
            chosen = [*needs, False]
            exact = both(given, grad, chosen, reference.lora_linear, mask)
            assert_as_good(both(given, grad, chosen, native, mask), exact, exact)


def test_no_number_depends_on_the_threads_or_on_the_other_tokens() -> None:
    given, grad = cast(layer(301, 520, 260, 8, True), torch.float32), torch.randn(301, 260)
    needs, before, results = [True, False, False, True, True, False], torch.get_num_threads(), []
    alone = dict(given, weight=None, bias=None)  # torch's own GEMM may depend on both
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both(alone, grad, needs, native))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))
    some = both(dict(alone, x=given["x"][100:117]), grad[100:117], needs, native)
    assert all(torch.equal(one, whole[100:117]) for one, whole in zip(some[:3], results[0], strict=False))


def test_takes_any_strides() -> None:
    given, grad = layer(37, 20, 30, 4, True), torch.randn(37, 30, dtype=torch.float64)
    strided = {name: None if t is None else (t.T.contiguous().T if t.ndim == 2 else t) for name, t in given.items()}
    needs = [True] * 5 + [False]
    exact = both(given, grad, needs, reference.lora_linear)
    assert_as_good(both(strided, grad.T.contiguous().T, needs, native), exact, exact)


def test_who_takes_a_call() -> None:
    def backend(dtype: torch.dtype, rank: int, **more: Tensor) -> str:
        x, a, b = torch.ones(2, 40, dtype=dtype), torch.ones(rank, 40, dtype=dtype), torch.ones(50, rank, dtype=dtype)
        before = registry.call_counts()
        ops.lora_linear(x, None, None, a, b, **more)
        return next(key[1] for key, count in registry.call_counts().items() if count > before.get(key, 0))

    assert backend(torch.float32, 32) == backend(torch.float64, 1) == "native"
    for dtype, rank, more, why in (
        (torch.bfloat16, 4, {}, "x is torch.bfloat16"),
        (torch.float32, 33, {}, "r = 33: above 32"),
        (torch.float32, 4, {"core": torch.ones(4, 4)}, "a core"),
    ):
        with pytest.raises(registry.BackendError, match=why):
            backend(dtype, rank, **more)
        with registry.force("native,lora_linear=reference"):
            assert backend(dtype, rank, **more) == "reference"


@pytest.mark.parametrize("wrong", ["a", "b", "y", "hidden"])
def test_compiled_code_refuses_what_does_not_fit(wrong: str) -> None:
    tensors = {"x": torch.ones(3, 4), "a": torch.ones(2, 4), "b": torch.ones(5, 2), "y": torch.ones(3, 5), "hidden": torch.ones(3, 2)}
    for other in (torch.ones(3, 7), tensors[wrong].double(), torch.ones(*tensors[wrong].shape, 2)[..., 0]):
        given = dict(tensors, **{wrong: other})
        with pytest.raises(ValueError, match="lora_linear: needs contiguous matrices of one dtype"):
            _csrc.adapter_forward(given["x"], [given["a"]], [given["b"]], 1.0, given["y"], [given["hidden"]], 1)


def test_compiled_code_refuses_calls_that_miss_something() -> None:
    x, a, b, y, hidden = torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 2), torch.ones(3, 5), torch.ones(3, 2)
    message = "lora_linear: needs contiguous matrices of one dtype"
    for arguments in (
        (x, [a], [b, b], 1.0, y, [hidden]),
        (x, [a], [b], 1.0, y, []),
        (x, [a], [b], 1.0, y, [hidden, hidden]),
        (x, [], [b], 1.0, y, [hidden]),
        (x, [a], [], 1.0, y, [hidden]),
        (None, [], [b], 1.0, y, [None]),  # nothing to read
    ):
        with pytest.raises(ValueError, match=message):
            _csrc.adapter_forward(*arguments, 1)
    message = "needs contiguous matrices|nothing to begin with|a gradient without what it is made of|not a strided tensor"
    for arguments in (
        (None, x, None, None, [], [a], [], 1.0, x, a, None),
        (None, x, None, None, [None], [a], [], 1.0, x, a, None),
        (None, None, None, None, [hidden], [a], [], 1.0, x, a, None),
        (None, x, None, None, [hidden], [], [], 1.0, x, None, None),
        (None, None, hidden, None, [hidden], [a], [], 1.0, x, None, b),
        (y, None, None, None, [], [], [b], 1.0, None, None, b),
        (y, None, None, None, [hidden, hidden], [], [b], 1.0, None, None, None),
        (y, None, hidden, x[:2], [], [a], [b], 1.0, x, None, None),
    ):
        with pytest.raises(ValueError, match=message):
            _csrc.adapter_backward(*arguments, 1)
