"""The naive methods are the oracle of the other tests; these tests hold them to the papers and to torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.naive.adamw import adamw_
from benchmarks.naive.oplora import Kronecker, OPLoRALayer
from benchmarks.naive.sds_lora import SDSLoRALayer, aligned_qr, is_refresh_step, svd_of_product


def quadratic(layer: SDSLoRALayer, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gradients of ½‖ΔW − target‖² by autograd through ΔW, with Q constant."""
    A, B = layer.A.clone().requires_grad_(), layer.B.clone().requires_grad_()
    delta = B @ A if layer.Q_A is None else layer.Q_B @ A + B @ layer.Q_A.T
    loss = 0.5 * (layer.scale * delta - target).square().sum()
    loss.backward()
    return A.grad, B.grad, loss.item()


def make_layer(total_steps: int = 60, **options) -> tuple[SDSLoRALayer, torch.Tensor]:
    A = torch.randn(4, 20, dtype=torch.float64) / 20**0.5
    target = torch.randn(30, 20, dtype=torch.float64)
    return SDSLoRALayer(A, torch.zeros(30, 4, dtype=torch.float64), 1.5, lr=0.02, total_steps=total_steps, **options), target


def test_adamw_is_torchs():
    params = [torch.randn(5, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step in range(1, 8):
        grads = [torch.randn_like(p) for p in params]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        optimizer.step()
        adamw_(params, grads, m, v, step=step, lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for ours, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, their.detach(), rtol=1e-13, atol=1e-14)


def test_refresh_schedule_by_hand():
    # T_total = 20, k = 5: intervals 1 for t ≤ 4, 2 for t ≤ 8, 3 for t ≤ 12, 4 for t ≤ 16, 5 up to 20 and beyond.
    steps = [t for t in range(1, 33) if is_refresh_step(t, 20, 5)]
    assert steps == [1, 2, 3, 4, 6, 8, 9, 12, 16, 20, 25, 30]
    assert [t for t in range(1, 10) if is_refresh_step(t, 20, 5, refresh_every=4)] == [4, 8]
    # The paper counts 0.46 · T_total refreshes for k = 5 (Table 7).
    assert sum(is_refresh_step(t, 10_000, 5) for t in range(1, 10_001)) / 10_000 == pytest.approx(0.46, abs=0.005)


def test_the_ceiling_does_not_suffer_from_floating_point():
    # k·t/T_total is a whole number at these t, and k * t / T_total in floating point may be a little more.
    for t_total in (300, 1230, 99_990):
        t = 3 * t_total // 5
        assert is_refresh_step(t, t_total, 5) == (t % 3 == 0)


def test_svd_of_product_is_the_svd():
    left, right = torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    U, sigma, V = svd_of_product(left, right)
    torch.testing.assert_close(U * sigma @ V.T, left @ right.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(left @ right.T)[:4], rtol=1e-12, atol=0)


def test_reparametrization_and_the_refresh_right_after_keep_delta_w():
    layer, target = make_layer()
    for _ in range(9):
        layer.step(*quadratic(layer, target)[:2])
    assert layer.Q_A is None
    before_warmup_ends = layer.A.clone()
    grads = quadratic(layer, target)[:2]
    m_before = [m.clone() for m in layer.exp_avgs]
    layer.step(*grads)
    # The last warm-up step is still plain LoRA: redo it by hand and compare.
    assert layer.Q_A is not None and layer.adam_step == 0 and not layer.exp_avgs[0].any() and not layer.exp_avg_sqs[1].any()
    assert m_before[0].any() and not torch.equal(before_warmup_ends, layer.A)
    delta = layer.delta_weight()
    layer.refresh()
    assert ((layer.delta_weight() - delta).norm() / delta.norm()).item() < 1e-12
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(layer.Q_A.T @ layer.Q_A, eye, rtol=0, atol=1e-13)
    # Equation 8 splits ΔW in two equal halves.
    torch.testing.assert_close(layer.scale * layer.Q_B @ layer.A, delta / 2, rtol=1e-10, atol=1e-12)


def test_warmup_is_lora_with_adamw():
    layer, target = make_layer(warmup_steps=10)
    A, B = layer.A.clone(), layer.B.clone()
    m, v = ([torch.zeros_like(A), torch.zeros_like(B)] for _ in range(2))
    for step in range(1, 11):
        G = layer.scale * B @ A - target
        adamw_([A, B], [layer.scale * B.T @ G, layer.scale * G @ A.T], m, v, step=step, lr=0.02)
        layer.step(*quadratic(layer, target)[:2])
    torch.testing.assert_close(layer.delta_weight(), layer.scale * B @ A, rtol=1e-11, atol=1e-12)


def test_training_goes_down_without_jumps():
    """Signs that were not aligned would throw ΔW about at the refreshes (by more than 30 % of its norm)."""
    layer, target = make_layer(total_steps=200)
    losses = []
    for _ in range(200):
        *grads, loss = quadratic(layer, target)
        losses.append(loss)
        layer.step(*grads)
        if layer.Q_A is not None:
            assert (aligned_qr(layer.Q_A, layer.Q_A) - layer.Q_A).abs().max() < 1e-12
    best = 0.5 * torch.linalg.svdvals(target)[8:].square().sum()  # ΔW has rank 2r at most
    assert best < losses[-1] < 0.8 * losses[0]
    assert max(b / a for a, b in itertools.pairwise(losses[11:])) < 1.05


@pytest.mark.parametrize("kfac", [False, True], ids=["plain", "kfac"])
def test_oplora_makes_everything_where_the_factors_are(kfac):
    """As on a GPU: tensors without memory do not mix with the CPU's either."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    metrics = tuple(Kronecker(tensor(width, 2), 0.9, 1.0, 1) for width in (9, 7)) if kfac else None
    layer = OPLoRALayer(tensor(3, 7), tensor(9, 3), 1.0, lr=0.1, momentum=0.9, momentum_start=tensor(7, 2), metrics=metrics)
    layer.step(tensor(5, 9), tensor(5, 7))
    assert layer.delta_weight().device.type == layer.M[0].device.type == "meta"
