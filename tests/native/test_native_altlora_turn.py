"""The compiled turn of AltLoRA against the operations of which it consists."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from _native import DTYPES, RANKS, matrix, wide
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import registry
from lowrank_kernels.backends.lists import Tall, gather
from lowrank_kernels.ops.altlora_turn import altlora_turn_as_gathered_


def altlora_turn(
    side: str, heights: tuple[tuple[int, int], ...], rank: int, dtype: torch.dtype, whole: bool, **options: Any
) -> list[Tensor]:
    """What a turn of factors (their heights, their partners') leaves, as a whole or as the operations that it consists of."""
    torch.manual_seed(7)
    state_dtype, second, taken = wide(dtype), options.pop("second", True), options.pop("taken", whole)
    layouts = ("rows", "rows", "columns of a wider one", "strided")  # as they are stored

    def stored(rows: int, i: int) -> Tensor:
        return matrix(rows, rank, dtype, layouts[i % 4]) if side == "B" else matrix(rank, rows, dtype, layouts[i % 4])

    params = [torch.nn.Parameter(stored(height, i)) for i, (height, _) in enumerate(heights)]
    state = {}
    for i, p in enumerate(params):
        p.grad = stored(heights[i][0], i)
        state[p] = {"exp_avg": torch.randn(p.shape, dtype=state_dtype)}
        if second:
            state[p]["exp_avg_sq"] = torch.rand(p.shape, dtype=state_dtype)
    stored_partners = [matrix(rows, rank, dtype) for _, rows in heights]
    partners = stored_partners if side == "A" else Tall([y.mT.contiguous() for y in stored_partners])
    behind = torch.randn(len(params), rank, rank, dtype=state_dtype)
    moved = torch.full_like(behind, torch.nan)
    found = gather(params, list(range(len(params))), state)
    assert found.layout is not None
    calls = registry.call_counts().get(("grouped_altlora_turn_", "native"), 0)
    with torch.no_grad():
        (partial(altlora_turn_as_gathered_, layout=found.layout) if whole else ops.grouped_altlora_turn_)(
            found.params, found.grads, found.exp_avgs, found.exp_avg_sqs, partners=partners, behind=behind, moved=moved, damping=1e-3,
            own_damping=1e-2, weight=0.25, rank_dims=[0 if side == "A" else 1] * len(params),
            **{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3, **options},
        )  # fmt: skip
    assert registry.call_counts().get(("grouped_altlora_turn_", "native"), 0) == calls + taken
    return [*params, *(value for values in state.values() for value in values.values()), behind, moved]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["A", "B"])
def test_altlora_turn_is_its_parts_to_the_bit(side: str, dtype: torch.dtype, threads: None) -> None:
    many = tuple((40 + 23 * (i % 7), 30 + 11 * (i % 5)) for i in range(19))
    cases = [(rank, many, {}) for rank in RANKS if rank < 30]
    cases += [
        (8, ((2500, 1100), (64, 3000), *many), {"missed": [i % 3 for i in range(21)], "maximize": True}),
        (4, ((40000, 20000), (30, 40)), {"second": False, "betas": (0.9, 0.0), "bias_correction": False}),  # shared by the threads
        (16, ((1, 1), (5, 0), (0, 5)), {}),
        (33, many[:3], {}),
        (128, many[:2], {}),
    ]
    for rank, heights, options in cases:
        wanted = altlora_turn(side, heights, rank, dtype, whole=False, **options)
        got = altlora_turn(side, heights, rank, dtype, whole=True, **options)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), (rank, heights)
        assert not got[-2].any()
        torch.set_num_threads(1)
        assert all(map(torch.equal, altlora_turn(side, heights, rank, dtype, whole=True, **options), got)), (rank, heights)
        torch.set_num_threads(2)


def test_altlora_turn_as_a_whole_only_where_its_parts_are_free() -> None:
    for forced in ("reference", "native,grouped_gram=reference", "native,grouped_adamw_=reference"):
        with registry.force(forced):
            altlora_turn("A", ((30, 20),), 4, torch.float32, whole=True, taken=False)


def test_what_is_written_is_what_was_given() -> None:
    """A layout says where tensors lie: that of other lists would have theirs written, so the operations take none."""
    given, other = (torch.nn.Parameter(torch.ones(9, 4)) for _ in range(2))
    given.grad, other.grad = torch.ones(9, 4), torch.ones(9, 4)
    numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    layout = gather([other], [0], {other: {}}).layout
    small = torch.zeros(1, 4, 4)
    turn = {"partners": [torch.ones(7, 4)], "behind": small, "moved": small.clone(), "damping": 0.1, "own_damping": 0.1, "weight": 1.0}
    with torch.no_grad():
        for call in (
            lambda **more: ops.grouped_adamw_([given], [given.grad], [], [], **numbers, **more),
            lambda **more: ops.grouped_altlora_turn_([given], [given.grad], [], [], **turn, rank_dims=[1], **numbers, **more),
        ):
            with pytest.raises(TypeError, match="layout"):
                call(layout=layout)
            assert torch.equal(given, other)
            call()
            assert not torch.equal(given, other)
            given.copy_(other)


def inference_stack() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(1, 4, 4)


STACK = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"moved": None}, "moved"),
        ({"moved": STACK.to_sparse()}, "moved is torch.sparse_coo"),
        ({"moved": torch.zeros(()).expand(1, 4, 4)}, "moved is expanded"),
        ({"moved": STACK, "behind": STACK}, "behind and moved share memory"),
        ({"moved": inference_stack()}, "moved is written, but an inference tensor"),
        ({"behind": inference_stack()}, "behind is written, but an inference tensor"),
        ({"behind": torch.nn.Parameter(STACK)}, "behind is written, but requires a gradient"),
        ({"behind": torch.zeros(1, 4, 3)}, "behind"),
        ({"own_damping": "x"}, "own_damping"),
        ({"own_damping": 10**400}, "own_damping must be finite"),
        ({"damping": None}, "damping"),
        ({"weight": math.nan}, "weight"),
        ({"rank_dims": [2]}, "rank_dims"),
        ({"rank_dims": [1.0]}, "rank_dims"),
        ({"partners": [torch.zeros(8, 3)]}, r"partners\[0\] must have 4 columns, the rank of params\[0\], got 3"),
        ({"params": lambda x, m, v: ([x, x], [m, m + 1], [v, v + 1])}, r"params\[0\] and params\[1\] share memory"),
        ({"params": lambda x, m, v: ([x[:, :1].expand(9, 4)], [m], [v])}, r"params\[0\] is expanded"),
        ({"params": lambda x, m, v: ([torch.nn.Parameter(x)], [m], [v])}, r"params\[0\] is written, but requires a gradient"),
        ({"params": lambda x, m, v: ([x], [m], [m])}, r"exp_avgs\[0\] and exp_avg_sqs\[0\] share memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_turn_that_is_refused_has_written_nothing(bad, named) -> None:
    x, m, v = torch.randn(9, 4), torch.zeros(9, 4), torch.zeros(9, 4)
    before = x.clone()
    params, exp_avgs, exp_avg_sqs = bad.get("params", lambda *one: tuple([tensor] for tensor in one))(x, m, v)
    n = len(params)
    stacks = {"behind": torch.zeros(n, 4, 4), "moved": torch.zeros(n, 4, 4)}
    numbers = {"damping": 1e-3, "own_damping": 1e-3, "weight": 1.0, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    arguments = {"partners": [torch.randn(8, 4)] * n, **stacks, "rank_dims": [1] * n, **numbers, "step": 1}
    arguments |= {name: value for name, value in bad.items() if name != "params"}
    # By the reference, which writes the moments before anything else.
    refused = pytest.raises((TypeError, ValueError, RuntimeError), match=f"grouped_altlora_turn_: {named}")
    with refused, registry.force("native,grouped_adamw_=reference"):
        ops.grouped_altlora_turn_(params, [torch.randn(9, 4)] * n, exp_avgs, exp_avg_sqs, **arguments)
    assert torch.equal(x, before) and not m.any() and not v.any()


def test_an_empty_turn_is_checked_too() -> None:
    numbers = {"damping": 0.1, "own_damping": 0.1, "weight": 1.0, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    given = {"partners": [], "behind": STACK[:0], "moved": STACK[:0], "rank_dims": [], **numbers, "step": 1}
    ops.grouped_altlora_turn_([], [], [], [], **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        ops.grouped_altlora_turn_([], [], [], [], **given, foo=1)
    with pytest.raises(ValueError, match="weight must be finite"):
        ops.grouped_altlora_turn_([], [], [], [], **given | {"weight": math.inf})
