"""The layer with a core, ΔW = s B R A: gradients, dtypes, autocast, dropout, bad cores."""

from __future__ import annotations

import pytest
import torch
from _lora_sb import make_batches, network, xs_model
from torch import Tensor, nn

import lowrank_kernels as lk

# ---------------------------------------------------------------------------------------------------------------- the adapter


def test_the_layer_is_linear_with_the_sum_of_weights_and_exports_exactly(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = xs_model()
    x = make_batches(1)[0][0]
    bare = network()
    for module, delta in zip(bare[::2], lk.delta_weights(model).values(), strict=True):
        module.weight.data += delta
    expected = bare(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model.eval()
    merged = lk.merge(model)(x)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    lk.unmerge(model)
    errors = lk.export_peft(model, tmp_path / "peft")
    assert set(errors.values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path / "peft"), autocast_adapter_dtype=False)
    assert theirs.peft_config["default"].r == 3
    torch.testing.assert_close(theirs(x), expected, rtol=1e-10, atol=1e-11)
    lk.save_adapter(model, tmp_path / "xs.safetensors")
    loaded = lk.load_adapter(network(), tmp_path / "xs.safetensors").eval()
    assert torch.equal(loaded(x), model(x))
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == ["0.lora_R", "2.lora_R", "4.lora_R"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_core_and_its_dtypes(dtype: torch.dtype) -> None:
    model = xs_model(dtype=dtype, shapes=[(20, 12)])
    layer = model[0]
    wide = torch.promote_types(dtype, torch.float32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype and layer.lora_R.dtype == wide
    assert "lora_A" in dict(layer.named_buffers())
    x, y = make_batches(1, d_out=20, dtype=dtype)[0]
    model(x).backward(y)
    g = (y.double().mT @ x.double()) if dtype == torch.float64 else (y.to(wide).mT @ x.to(wide)).double()
    exact = layer.scale * layer.lora_B.double().mT @ g @ layer.lora_A.double().mT
    assert (layer.lora_R.grad.double() - exact).norm() <= 50 * torch.finfo(wide).eps * exact.norm()


def test_scale_is_one_unless_asked_for() -> None:
    assert lk.adapt(network(), method="xs", rank=2)[0].scale == 1.0
    assert lk.adapt(network(), method="xs", rank=2, alpha=8)[0].scale == 4.0


# --------------------------------------------------------------------------------------------------------------- the operation


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    f64 = {"dtype": torch.float64}
    shapes = {"x": (11, 13), "weight": (17, 13), "bias": (17,), "a": (3, 13), "b": (17, 3), "core": (3, 3)}
    return {name: torch.randn(shape, **f64).to(dtype) for name, shape in shapes.items()}


def layer_of(t: dict[str, Tensor], **options) -> Tensor:
    return lk.ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], 0.5, core=t["core"], **options)


def test_the_core_in_gradcheck_opcheck_and_compile() -> None:
    t = operands()
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    assert torch.autograd.gradcheck(lambda *args: layer_of(dict(zip(t, args, strict=True))), leaves)
    x, weight, _, a, b, core = (leaf.detach() for leaf in leaves)
    mask = torch.rand(11, 13) < 0.5
    torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear, (*leaves[:5], None, None, 0.5, mask, 0.5, leaves[5]))
    grad, hidden = torch.randn(11, 17, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    for needs in ([True] * 6, [False] * 5 + [True], [True] + [False] * 5):
        args = (grad, x, weight, a, b, None, None, hidden, 0.5, mask, 0.5, needs, core)
        torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear_backward, args)
    compiled = torch.compile(lambda *args: layer_of(dict(zip(t, args, strict=True))), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), layer_of(t))


@pytest.mark.parametrize(("wanted", "count"), [(("x", "core"), 5), (("core",), 2), (("x",), 4)], ids=str)
def test_no_product_for_a_gradient_that_nobody_asked_for(wanted: tuple[str, ...], count: int) -> None:
    t = operands()
    for name in wanted:
        t[name].requires_grad_()
    y = layer_of(t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(torch.ones_like(y))
    assert sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.events()) == count
    assert all((t[name].grad is not None) == (name in wanted) for name in t)


def test_the_core_stays_wide_under_autocast_and_with_dropout() -> None:
    t = operands(torch.float32)
    core = t["core"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer_of(t)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and core.grad.dtype == torch.float32
    narrow = {name: tensor.detach().bfloat16().float() for name, tensor in t.items()}
    exact = 0.5 * narrow["b"].mT @ torch.ones(17, 11) @ narrow["x"] @ narrow["a"].mT
    torch.testing.assert_close(core.grad, exact, rtol=1e-5, atol=1e-4)
    torch.manual_seed(1)
    dropped = layer_of(t, dropout=0.5)
    torch.manual_seed(1)
    mask = lk.ops.lora_linear(torch.ones(11, 13), None, None, torch.eye(13), torch.eye(13), dropout=0.5) != 0
    expected = nn.functional.linear(t["x"], t["weight"], t["bias"]) + 0.5 * (t["x"] * mask * 2) @ (t["b"] @ core @ t["a"]).mT
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-4)


def test_bad_cores_are_refused() -> None:
    t = operands()
    for change, error, message in (
        ({"core": torch.randn(3, 4)}, ValueError, r"core must be \(3, 3\)"),
        ({"core": torch.zeros(3, 3, dtype=torch.int8)}, TypeError, "core has dtype torch.int8"),
        ({"core": t["core"].to("meta")}, ValueError, "core is on meta"),
    ):
        with pytest.raises(error, match=message):
            layer_of(t | change)
    with pytest.raises(ValueError, match="exclude each other"):
        layer_of(t, q_a=t["a"], q_b=t["b"])
