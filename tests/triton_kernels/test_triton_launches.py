"""Launches of Triton's kernels, and when the backend is chosen."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from lowrank_kernels.backends import force, launch_count, select
from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.triton import adamw, damped_inverse, eigh, gram, polar, preconditioner, solve, sylvester

pytestmark = pytest.mark.usefixtures("nan_scratch")


def test_launches_do_not_grow_with_the_number_of_layers(device: torch.device) -> None:
    counts = []
    for layers in (6, 24):
        xs = [torch.randn(6 + i % 5, 2, device=device) for i in range(layers)]
        before = launch_count()
        with force("triton"):
            args = (xs, None, [torch.empty_like(x) for x in xs], torch.empty(layers, 2, 2, device=device))
            select("grouped_qr", device.type, args).implementation.function(*args)
            stepped, numbers = Stepped(xs, xs, [], []), Numbers(0.1, 0.9, 0.9, 1e-8, 0.0, 1, [], False, False)
            args = (stepped, Maps(), [], None, numbers)
            select("grouped_adamw_", device.type, args).implementation.function(*args)
            grams = torch.empty(layers, 2, 2, device=device)
            gram.grouped_gram(xs, None, grams)
            solve.grouped_solve(grams, xs, 1.0, False, [torch.empty_like(x) for x in xs])
            preconditioner.grouped_preconditioner(grams.double(), grams, 1.0, 1.0, False, grams, torch.empty_like(grams))
            polar.grouped_polar(xs[: layers // 3], [torch.empty_like(x) for x in xs[: layers // 3]])
            eigh.grouped_eigh(grams, torch.empty(layers, 2, device=device), torch.empty_like(grams))
            sylvester.grouped_sylvester(*[grams.double()] * 3, grams.double())
            damped_inverse.grouped_damped_inverse(grams, 1.0, torch.empty_like(grams))
            news = torch.empty(layers, 2, 2, 2, device=device)
            adamw.grouped_adamw_(stepped, Maps(*[grams] * 4), [1] * layers, news, numbers)
        counts.append(launch_count() - before)
    assert counts[0] == counts[1] == 7 + 2 + 2 + 1 + 9 + 3 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is the default")
def test_never_chosen_by_default_on_the_cpu() -> None:
    x = torch.randn(8, 2)
    assert select("grouped_qr", "cpu", ([x], None, [x], torch.empty(1, 2, 2))).implementation.backend != "triton"
