"""LoRA-SB and LoRA-XS: what every optimizer promises, the paper's theorems, low precision."""

from __future__ import annotations

import copy
import sys

import pytest
import test_optimizers_arguments
import test_optimizers_checkpoints
import test_optimizers_checkpoints_refused
import test_optimizers_frozen
import test_optimizers_groups
import test_optimizers_step
import torch
from _lora_sb import full_gradients, init, make_batches, mse, network, xs_model
from _models import loss_of, pair_delta
from _optimizers import run
from torch import Tensor, nn

import lowrank_kernels as lk
from benchmarks.naive.lora_sb import LoRASBLayer, optimal_gradient
from lowrank_kernels import pairs

# ---------------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("update", ["adam", "sgd", "sgd-momentum"])
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (test_optimizers_checkpoints.test_state_is_created_by_the_first_step, {}),
        (test_optimizers_checkpoints.test_checkpoint_probe_moves_nothing, {}),
        (test_optimizers_checkpoints.test_low_precision_parameters_keep_float32_state_through_a_checkpoint, {}),
        (test_optimizers_checkpoints_refused.test_checkpoints_that_do_not_fit_are_refused_before_anything_changes, {}),
        (test_optimizers_checkpoints.test_copies_of_model_and_optimizer_go_on_alike, {"copier": copy.deepcopy}),
        (test_optimizers_groups.test_add_param_group, {}),
        (test_optimizers_step.test_activation_checkpointing_and_accumulation_change_nothing, {"reentrant": False}),
        (test_optimizers_step.test_activation_checkpointing_and_accumulation_change_nothing, {"reentrant": True}),
        (test_optimizers_checkpoints.test_resume_in_the_middle_bit_for_bit, {}),
        (test_optimizers_step.test_capturable_and_tensor_lr_change_nothing, {}),
        (test_optimizers_frozen.test_a_parameter_that_is_unfrozen_late_starts_anew, {}),
        (test_optimizers_step.test_launches_do_not_depend_on_the_number_of_layers, {}),
        (test_optimizers_arguments.test_adamws_checks, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_every_optimizer_promises(test, arguments, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[test.__module__], "make_model", xs_model)
    method = {"update": update[:4].rstrip("-")} | ({"momentum": 0.5} if update == "sgd-momentum" else {})
    test(lambda params, **k: lk.LoRASB(params, **{"lr": 1e-2, **method, **k}), **arguments)


def test_groups_closures_and_schedulers() -> None:
    model, twin = xs_model(), xs_model()
    optimizer = lk.LoRASB([{"params": [(n, p)], "lr": 1e-2} for n, p in model.named_parameters() if p.requires_grad])
    plain = lk.LoRASB(twin, lr=1e-2)
    assert len(optimizer.param_groups) == 3, "the user's groups stay the user's groups"
    schedulers = [torch.optim.lr_scheduler.LinearLR(each, total_iters=10) for each in (optimizer, plain)]
    for step in range(15):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        run(twin, plain, step, step + 1)
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(pairs(model), pairs(twin), strict=True):
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-12, atol=0)


def test_the_update_cannot_be_edited_mid_run() -> None:
    model = xs_model()
    optimizer = lk.LoRASB(model, lr=1e-2, update="sgd", momentum=0.9)
    run(model, optimizer, 0, 1)
    optimizer.param_groups[0].update(update="adam", momentum=0.0)
    with pytest.raises(ValueError, match="LoRASB: update of param_groups.* from 'sgd' to 'adam'"):
        run(model, optimizer, 1, 2)


def test_explain_names_the_core(capsys) -> None:
    model = xs_model(dtype=torch.float32)
    explanation = lk.explain(model, lk.LoRASB(model))
    assert {c.operation for c in explanation.choices} >= {"lora_linear", "lora_linear_backward", "grouped_adamw_", "grouped_gram"}
    assert "core" in capsys.readouterr().out


def test_adamw_is_lora_xs_and_decays_no_core() -> None:
    model = xs_model()
    before = [pair.core.detach().clone() for pair in pairs(model)]
    optimizer, reference = lk.AdamW(model), torch.optim.AdamW([nn.Parameter(r.clone()) for r in before], lr=1e-3, weight_decay=0.0)
    loss_of(model, 0).backward()
    for pair, p in zip(pairs(model), reference.param_groups[0]["params"], strict=True):
        p.grad = pair.core.grad.clone()
    optimizer.step(), reference.step()
    for pair, p in zip(pairs(model), reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(pair.core, p, rtol=1e-12, atol=1e-14)


def test_the_naive_twin_walks_the_same_way() -> None:
    for update in ("adam", "sgd"):
        model = xs_model()
        for pair in pairs(model):  # neither orthonormal nor well conditioned
            pair.B.mul_(torch.linspace(0.2, 3, 3, dtype=torch.float64))
        twins = [LoRASBLayer(p.B.clone(), p.core.detach(), p.A.clone(), p.scale, lr=1e-2, update=update) for p in pairs(model)]
        optimizer = lk.LoRASB(model, lr=1e-2, update=update)
        for step in range(12):
            optimizer.zero_grad()
            weights = [layer.base_layer.weight for layer in model if isinstance(layer, lk.LowRankLinear)]
            bare = network()
            for module, weight, twin in zip(bare[::2], weights, twins, strict=True):
                module.weight.data.copy_(weight + twin.delta_weight())
            loss_of(bare, step).backward()
            loss_of(model, step).backward()
            optimizer.step()
            for module, twin in zip(bare[::2], twins, strict=True):
                twin.step(module.weight.grad)
        for pair, twin in zip(pairs(model), twins, strict=True):
            torch.testing.assert_close(pair_delta(pair), twin.delta_weight(), rtol=1e-9, atol=1e-11)


def test_a_scheduled_momentum_is_that_of_sgd() -> None:
    """What was added up before counts as much as it did then: nothing is rescaled where μ changes."""
    model = xs_model()
    optimizer = lk.LoRASB(model, lr=1e-2, update="sgd", momentum=0.3)
    cores = [nn.Parameter(pair.core.detach().clone()) for pair in pairs(model)]
    reference = torch.optim.SGD(cores, lr=1e-2, momentum=0.3)
    for step, momentum in enumerate((0.3, 0.3, 0.9, 0.9, 0.5)):
        for each in (optimizer, reference):
            each.zero_grad()
            each.param_groups[0]["momentum"] = momentum
        loss_of(model, step).backward()
        for pair, core in zip(pairs(model), cores, strict=True):
            core.grad = optimal_gradient(pair.B, pair.A, pair.core.grad, pair.scale)
        optimizer.step(), reference.step()
        for pair, core in zip(pairs(model), cores, strict=True):
            torch.testing.assert_close(pair.core, core, rtol=1e-11, atol=1e-13)


# --------------------------------------------------------------------------------------------------------------- the theorems


def test_theorem_2_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    b, a, g = (torch.randn(shape, dtype=torch.float64) for shape in ((11, 3), (3, 8), (11, 8)))
    scale = 0.3
    ours = optimal_gradient(b, a, scale * b.mT @ g @ a.mT, scale)
    dense = torch.linalg.lstsq(scale * torch.kron(b, a.mT.contiguous()), g.reshape(-1, 1)).solution.reshape(3, 3)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    # And that is the step that the optimizer takes.
    model = lk.adapt(nn.Sequential(nn.Linear(8, 11, bias=False).double()), method="xs", rank=3, alpha=3 * scale)
    (pair,) = pairs(model)
    pair.A.copy_(a), pair.B.copy_(b)
    optimizer = lk.LoRASB(model, lr=0.5, update="sgd")
    model(torch.eye(8, dtype=torch.float64)).backward(g.mT)
    optimizer.step()
    torch.testing.assert_close(pair.core.detach(), -0.5 * dense, rtol=1e-10, atol=1e-12)


def test_the_step_is_the_gradient_projected_whatever_the_condition_of_the_factors() -> None:
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -4, 4, dtype=torch.float64)
    (q_b, q_a), (turn_b, turn_a) = (
        [torch.linalg.qr(torch.randn(d, 4, dtype=torch.float64))[0] for d in sizes] for sizes in ((11, 8), (4, 4))
    )
    g = torch.randn(11, 8, dtype=torch.float64)
    model = lk.adapt(nn.Sequential(nn.Linear(8, 11, bias=False).double()), method="xs", rank=4, alpha=2)
    (pair,) = pairs(model)
    pair.B.copy_(q_b * spectrum @ turn_b), pair.A.copy_((q_a * spectrum @ turn_a).mT)
    optimizer = lk.LoRASB(model, lr=1.0, update="sgd")
    model(torch.eye(8, dtype=torch.float64)).backward(g.mT)
    optimizer.step()
    expected = -q_b @ q_b.mT @ g @ q_a @ q_a.mT
    assert (pair_delta(pair) - expected).norm() < 5e-8 * expected.norm()


def test_theorem_3_a_small_step_lowers_the_loss_by_the_inner_product() -> None:
    model = xs_model()
    optimizer = lk.LoRASB(model, lr=1e-6, update="sgd")
    before = loss_of(model, 0)
    before.backward()
    predicted = sum((p.core.grad * optimal_gradient(p.B, p.A, p.core.grad, p.scale)).sum() for p in pairs(model))
    optimizer.step()
    fall = (before - loss_of(model, 0)).item()
    assert predicted > 0 and fall == pytest.approx(1e-6 * predicted.item(), rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_theorem_4_the_trajectory_does_not_depend_on_s(momentum: float) -> None:
    deltas = []
    for scale in (0.1, 1.0, 10.0):
        model = lk.adapt(network(), method="xs", rank=3, alpha=3 * scale)
        init(model, make_batches(), lr=1e-2)
        optimizer = lk.LoRASB(model, lr=0.05, update="sgd", momentum=momentum)
        run(model, optimizer, 0, 40)
        deltas.append(lk.delta_weights(model))
    for name, delta in deltas[1].items():
        for other in (deltas[0], deltas[2]):
            assert (other[name] - delta).norm() <= 1e-9 * delta.norm()


def test_theorem_5_the_first_sgd_step_is_the_best_rank_r_approximation() -> None:
    batch = make_batches(1)[0]
    gradients = full_gradients(network(), batch)
    model = lk.adapt(network(), method="xs", rank=3, alpha=1.5)
    init(model, [batch], update="sgd", oversample=20)
    for pair in pairs(model):
        pair.core.data.zero_()
    optimizer = lk.LoRASB(model, lr=0.3, update="sgd")
    mse(model, batch).backward()
    optimizer.step()
    for name, delta in lk.delta_weights(model).items():
        u, s, vh = torch.linalg.svd(gradients[name], full_matrices=False)
        torch.testing.assert_close(delta, -0.3 * u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-8 * float(s[0]))


def test_the_correction_keeps_bf16_factors_optimal() -> None:
    """The equivalent gradient's distance to the best one, on the factors as they are stored: at least ten times smaller with correction."""
    torch.manual_seed(0)
    d, rank, tokens = 256, 16, 64
    x, grad = torch.randn(tokens, d).bfloat16(), torch.randn(tokens, d).bfloat16()
    g = grad.double().mT @ x.double()
    model = lk.adapt(nn.Sequential(nn.Linear(d, d, bias=False).bfloat16()), method="xs", rank=rank)
    (pair,) = pairs(model)
    for factor in (pair.A.mT, pair.B):
        factor.copy_(torch.linalg.qr(torch.randn(d, rank))[0])
    optimizer = lk.LoRASB(model, lr=1.0, update="sgd")
    model(x).backward(grad)
    plain = pair.core.grad.double()
    optimizer.step()
    b, a = pair.B.double(), pair.A.double()
    best = b @ torch.linalg.solve(b.mT @ b, b.mT @ g @ a.mT) @ torch.linalg.inv(a @ a.mT) @ a
    corrected, uncorrected = ((b @ r @ a - best).norm() / best.norm() for r in (-pair.core.detach().double(), plain))
    assert pair.A.dtype == torch.bfloat16 and uncorrected > 1e-4
    assert corrected < 0.1 * uncorrected and corrected < 3e-6, (corrected, uncorrected)
