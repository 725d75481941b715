"""The compiled ``lora_down`` and ``lora_up`` against fp64, by the tolerance rule of the package."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_native_lora_linear import DTYPES, assert_as_good, cast
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import registry
from lowrank_kernels.backends.native import lora_shared as native
from lowrank_kernels.backends.reference import lora_shared as reference

# Tokens, d_in, d_out, r, rows of all stacked factors.
SIZES = [(1, 1, 1, 1, 2), (13, 33, 50, 8, 19), (300, 100, 131, 4, 12), (64, 530, 1030, 16, 48), (700, 48, 97, 32, 96)]
KINDS = pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])


def layers(tokens: int, d_in: int, d_out: int, rank: int, rows: int, decoupled: bool) -> dict[str, Tensor | None]:
    """Factors of all layers, one layer, and what comes back to them; fp64, all results of order one."""
    sizes = {"x": (tokens, d_in), "a": (rows, d_in), "on_a": (tokens, rows), "grad_x": (tokens, d_in)}
    sizes |= {"weight": (d_out, d_in), "bias": (d_out,), "b": (d_out, rank), "grad": (tokens, d_out)}
    sizes |= {"q": (rows, d_in), "on_q": (tokens, rows), "q_b": (d_out, rank)} if decoupled else {}
    root = {"a": d_in, "q": d_in, "weight": d_in, "b": rank, "q_b": rank}
    given: dict[str, Tensor | None] = {"q": None, "on_q": None, "q_b": None}
    return given | {name: torch.randn(size, dtype=torch.float64) / root.get(name, 1) ** 0.5 for name, size in sizes.items()}


def everything(given: dict[str, Tensor | None], rank: int, module) -> list[Tensor]:
    """What all operations give, of a slice of the activations as it comes."""
    g = given
    hidden, hidden_q = module.lora_down(g["x"], g["a"], g["q"])
    of_x, of_a = module.lora_down_backward(g["grad_x"], g["on_a"], g["on_q"], g["x"], g["a"], g["q"])
    last, last_q = (None if t is None else t[:, -rank:] for t in (hidden, hidden_q))
    y = module.lora_up(g["x"], g["weight"], g["bias"], last, g["b"], last_q, g["q_b"], 0.3)
    needs = [True, True, True, last_q is not None]
    grads = module.lora_up_backward(g["grad"], g["weight"], last if last_q is None else last_q, g["b"], g["q_b"], 0.3, needs)
    # Slices of one product come from the reference.
    return [t.contiguous() for t in (hidden, hidden_q, of_x, of_a, y, *grads) if t is not None]


@DTYPES
@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(size: tuple[int, ...], decoupled: bool, dtype: torch.dtype, instruction_set: str, guarded_scratch: None) -> None:
    given, rank = layers(*size, decoupled), size[3]
    made = [(native, dtype), (reference, dtype), (reference, torch.float64)]
    assert_as_good(*(everything(cast(given, t), rank, module) for module, t in made))


@KINDS
def test_every_choice_of_gradients(decoupled: bool) -> None:
    g = layers(70, 40, 30, 4, 12, decoupled)
    kept = {name: None if t is None else t.clone() for name, t in g.items()}

    def compare(operation: str, *arguments: object) -> None:
        ours, exact = ([t for t in getattr(module, operation)(*arguments) if t is not None] for module in (native, reference))
        assert_as_good(ours, [t.contiguous() for t in exact], exact)

    for need_x, *needs in itertools.product([False, True], repeat=4):
        if decoupled or not needs[2]:
            weight, hidden = g["weight"] if need_x else None, torch.randn(70, 4, dtype=torch.float64) if needs[1] else None
            compare("lora_up_backward", g["grad"], weight, hidden, g["b"], g["q_b"], 0.3, [need_x, *needs])
    for left_out in itertools.product([False, True], repeat=4):
        grad_x, on_a, x, a = (None if out else g[name] for name, out in zip(("grad_x", "on_a", "x", "a"), left_out, strict=True))
        q, on_q = None if a is None else g["q"], g["on_q"]
        if on_a is not None or on_q is not None:
            compare("lora_down_backward", grad_x, on_a, on_q, x, a, q)
    assert all(torch.equal(t, kept[name]) for name, t in g.items() if t is not None)  # nothing given is changed


def test_no_number_depends_on_the_threads_or_on_the_other_tokens() -> None:
    given, before, results = cast(layers(301, 520, 260, 8, 24, True), torch.float32), torch.get_num_threads(), []
    given |= {"weight": None, "bias": None}  # torch's own GEMM may depend on both

    def alone(given: dict[str, Tensor | None]) -> list[Tensor]:
        g = given
        hidden, hidden_q = native.lora_down(g["x"], g["a"], g["q"])
        on_x, of_a = native.lora_down_backward(g["grad_x"], g["on_a"], g["on_q"], g["x"], g["a"], g["q"])
        y = native.lora_up(None, None, None, hidden[:, :8], g["b"], hidden_q[:, :8], g["q_b"], 0.3)
        on, of_b, on_q = native.lora_up_backward(g["grad"], None, hidden_q[:, :8], g["b"], g["q_b"], 0.3, [False, True, True, True])
        return [hidden, hidden_q, on_x, y, on, on_q, of_a, of_b]

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(alone(given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))
    some = alone(given | {name: given[name][100:117] for name in ("x", "on_a", "on_q", "grad_x", "grad")})
    assert all(torch.equal(one, whole[100:117]) for one, whole in zip(some[:6], results[0], strict=False))


def test_takes_any_strides() -> None:
    given = layers(37, 20, 30, 4, 12, True)
    strided = {name: None if t is None else (t.T.contiguous().T if t.ndim == 2 else t) for name, t in given.items()}
    exact = everything(given, 4, reference)
    assert_as_good(everything(strided, 4, native), exact, exact)
    for on_a, x in ((None, strided["x"]), (strided["on_a"], None)):
        down = [strided["grad_x"], on_a, strided["on_q"], x, strided["a"], strided["q"]]
        of_x, of_a = native.lora_down_backward(*down)
        assert of_a is None
        assert_as_good([of_x], *[[reference.lora_down_backward(*down)[0]]] * 2)
    up = [None, None, None, strided["on_a"][:, :4], strided["b"], strided["on_q"][:, 4:8], strided["q_b"], 0.3]
    assert_as_good([native.lora_up(*up)], *[[reference.lora_up(*up)]] * 2)


def test_who_takes_a_call() -> None:
    def backend(dtype: torch.dtype, rank: int, count: int) -> list[str]:
        x, factors = torch.ones(2, 40, dtype=dtype), [torch.ones(rank, 40, dtype=dtype)] * count
        before = registry.call_counts()
        _, hiddens, _ = ops.lora_down(x, factors)
        ops.lora_up(None, None, None, hiddens[0], torch.ones(50, rank, dtype=dtype))
        return [key[1] for key, count in registry.call_counts().items() if count > before.get(key, 0)]

    assert backend(torch.float32, 32, 3) == backend(torch.float64, 1, 2) == ["native", "native"]
    for dtype, rank, count, why in ((torch.bfloat16, 4, 3, "x is torch.bfloat16"), (torch.float32, 33, 3, "r = 99: above 96")):
        with pytest.raises(registry.BackendError, match=why):
            backend(dtype, rank, count)
    with pytest.raises(registry.BackendError, match="r = 33: above 32"):
        backend(torch.float32, 33, 2)
