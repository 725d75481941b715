"""``lora_linear``: a frozen linear layer with a low-rank adapter, plain, decoupled or with an r×r core, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import as_flag, as_number
from ..backends.dropout import RESOLUTION, dropped
from ..backends.dtypes import FLOATING, autocast_dtype, cast, compute_dtype, under_autocast
from ..backends.registry import implementations, run, select
from ._library import LIBRARY, NAMESPACE, applies, define, is_eager, is_plain_eager, is_transformed, no_backward
from ._tensor_checks import check_tensor, check_tensor_on


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    q_a: Tensor | None = None,
    q_b: Tensor | None = None,
    core: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    capture: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """``y = x W0ᵀ + bias + x̃ ΔWᵀ`` with ``ΔW = s B A``, decoupled ``s (Q_B A + B Q_Aᵀ)`` (SDS-LoRA Eq. 5), or ``s B R A`` (LoRA-XS).

    The decoupled layer is the rank-2r LoRA ``s [Q_B B] [A; Q_Aᵀ]`` with half of each factor frozen: Q_A and Q_B are
    constants of the backward pass, ``∂A = s Q_Bᵀ G`` and ``∂B = s G Q_A`` (Eq. 6). With a core, ``∂R = s Bᵀ G Aᵀ`` (LoRA-SB Lemma 1).

    Args:
        x: (..., d_in); any number of leading dimensions.
        weight: the frozen W0 (d_out, d_in); None computes the adapter's part alone (for bases that are not plain tensors).
        bias: (d_out,) or None.
        a: (r, d_in).
        b: (d_out, r).
        scale: s.
        q_a: Q_Aᵀ, (r, d_in) with orthonormal rows; with ``q_b`` makes the layer decoupled.
        q_b: Q_B, (d_out, r) with orthonormal columns.
        core: R, (r, r); not together with q_a and q_b. It, the activations of width r on both sides of it and its gradient stay
            in fp32 at least, whatever the dtype of x: the correction of LoRA-SB's Theorem 2 gains nothing on a rounded gradient.
        dropout: probability with which an entry of the adapter's input x̃ is dropped (the base sees x whole). What is drawn comes from
            torch's generator of the device, so checkpointing with ``preserve_rng_state`` repeats it: where Triton takes the call (CUDA), a
            seed, from which the kernels compute the mask wherever they need it, with the probability of keeping rounded to a multiple
            of 2⁻¹⁶; elsewhere the mask itself, which is kept for the backward pass.
        training: False switches dropout off.
        capture: called in the backward pass, once for this forward call (recomputed or not), with what the full gradient
            ``∂L/∂ΔW = Sᵀx̃`` is made of: x̃ (tokens, d_in) and S = ∂L/∂y (tokens, d_out). Not called where A wants no gradient.
            It is a graph break for ``torch.compile``.

    Factors of another dtype than x are cast to it; their gradients come back in their own. Under ``torch.autocast``
    everything is cast as ``F.linear`` would cast it.
    No GEMM is done for a gradient that nobody asked for.
    Under ``torch.func`` transforms (grad, vmap, jvp, …), in forward mode and in ``torch.jit.trace`` torch's own operations compute it.
    So do they in a backward pass with ``create_graph=True``, which can be differentiated again (gradient penalties). Not in compiled
    graphs, and not by x where A is frozen and B or the core trains, as x is not kept then: an error says so, ``torch.func.grad`` can.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers do not fit, only one of q_a and q_b is given, or a core with them.
    """
    try:
        fits = _fits(x, weight, bias, a, b, q_a, q_b, core) and _are_ordinary(scale, dropout, training, capture)
    except AttributeError:  # something is no tensor
        fits = False
    if not fits:
        _check(x, weight, bias, a, b, q_a, q_b, core)
        scale, dropout = _check_options(scale, dropout, training, capture)
    dtype = autocast_dtype(x)
    x, a, b = cast(x, dtype), cast(a, dtype), cast(b, dtype)
    if weight is not None:
        weight = cast(weight, dtype)
    if bias is not None:
        bias = cast(bias, dtype)
    if q_a is not None and q_b is not None:
        q_a, q_b = (cast(q.detach() if q.requires_grad else q, dtype) for q in (q_a, q_b))
    if core is not None:
        core = cast(core, compute_dtype(dtype))
    mask, seed, keep = _draw(x, a.shape[0], dropout) if training and dropout > 0.0 else (None, None, 1.0)
    rest = (weight, bias, a, b, q_a, q_b, scale, mask, keep, core, seed)  # what the schema names after x, in its order
    if capture is not None and torch.is_grad_enabled():
        if is_transformed():
            raise RuntimeError("lora_linear: a torch.func transform or torch.jit.trace captures no full gradients; use loss.backward()")
        y = _captured(x.reshape(-1, x.shape[-1]), *rest, capture)
    elif is_plain_eager(x, weight, bias, a, b, q_a, q_b, core):
        return _eager(x, rest)
    else:
        rows = x.reshape(-1, x.shape[-1])
        y = _composed(rows, *rest) if is_transformed() else torch.ops.lowrank_kernels.lora_linear(rows, *rest)[0]
    return y.reshape(*x.shape[:-1], b.shape[0])


class _TensorSpec(NamedTuple):
    """All that the backends' ``verify`` functions look at in a tensor."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


def _by_seed(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether dropout is by a seed: where Triton takes the forward call. The one place that decides it.

    A seed costs no memory, but random bits in every kernel that needs the mask: on the CPU, and for a reference that expands it, the mask
    itself is cheaper. Every backend understands both, so a backward pass elsewhere, or a compiled graph for which this was decided
    once, is right in any case.
    """
    if device.type == "meta":
        return False
    x, a, b = (_TensorSpec(device, dtype, shape) for shape in ((1, 1), (rank, 1), (1, rank)))
    return select("lora_linear", device.type, (x, None, None, a, b, None, None, 1.0, None, 1.0)).implementation.backend == "triton"


# What torch.compiler.assume_constant_result does, without the import of torch's compiler that it takes.
_by_seed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _draw(x: Tensor, rank: int, dropout: float) -> tuple[Tensor | None, Tensor | None, float]:
    """A mask or a seed for one call, and the probability of keeping an entry; nothing is read on the host."""
    if _by_seed(x.device, x.dtype, index(rank)):  # index: traced, a symbolic rank becomes a number
        return None, torch.randint(2**63 - 1, (1,), device=x.device), max(1, round((1.0 - dropout) * RESOLUTION)) / RESOLUTION
    keep = 1.0 - dropout
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep).view(-1, x.shape[-1]), None, keep
    # A CPU draws one number after the other: 64 bits for two entries take a quarter of bernoulli_'s time, at 2⁻³² as resolution.
    bits = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 1) // 2,), device=x.device).view(torch.int32)
    return (bits[: x.numel()] <= max(1, round(keep * 2**32)) - 1 - 2**31).view(-1, x.shape[-1]), None, keep


def _composed(x: Tensor, *rest: Any) -> Tensor:
    """The operation in terms that any transform of torch's knows: the reference, which does nothing in place where there is no weight."""
    weight, bias, *adapter, mask, keep, core, seed = rest
    if seed is not None:
        mask = run("dropout_mask", x.device.type, seed, *x.shape, keep)
    reference = implementations("lora_linear")["reference"].function
    delta, _ = reference(x, None, None, *adapter, mask, keep, core)
    return delta if weight is None else F.linear(x, weight, bias) + delta


def _eager(x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """The operation for plain tensors, without its dispatcher; x as it was given."""
    weight, bias, a, b, *_, core, _ = rest
    if torch.is_grad_enabled() and (
        x.requires_grad
        or a.requires_grad
        or b.requires_grad
        or (core is not None and core.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, *rest, None)
    y, _ = run("lora_linear", x.device.type, flat(x), *rest)
    return _shaped(y, x.shape[:-1])


def flat(x: Tensor) -> Tensor:
    """(tokens, ·), of any number of leading dimensions."""
    return x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 2 else x[None]  # reshape takes longer


def _shaped(y: Tensor, leading: torch.Size) -> Tensor:
    """y (tokens, ·) with these leading dimensions, in place: a view would be one made without a graph, which must not be written
    afterwards (``ReLU(inplace=True)``)."""
    return y if len(leading) == 1 else y.contiguous().resize_(*leading, y.shape[1])


@torch._disable_dynamo
def _captured(*args: Any) -> Tensor:
    return _LoraLinear.apply(*args)


def _fits(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    core: Tensor | None,
) -> bool:
    """The quick form of :func:`_check`, for every call: True for ordinary arguments, False for what deserves a closer look."""
    if x.ndim == 0 or a.ndim != 2 or b.ndim != 2 or (q_a is None) != (q_b is None):
        return False
    for tensor in (x, weight, bias, a, b, q_a, q_b, core):
        if tensor is not None and tensor.layout is not torch.strided:
            return False
    device, dtype, a_shape, b_shape = x.device, x.dtype, a.shape, b.shape
    if x.shape[-1] != a_shape[1] or b_shape[1] != a_shape[0] or not (dtype in FLOATING and a.dtype in FLOATING and b.dtype in FLOATING):
        return False
    if a.device != device or b.device != device:
        return False
    if weight is None:
        base_fits = bias is None
    else:
        base_fits = weight.shape == (b_shape[0], a_shape[1]) and weight.dtype == dtype and weight.device == device
        if bias is not None:
            base_fits = base_fits and bias.shape == b_shape[:1] and bias.dtype == dtype and bias.device == device
    if core is not None:
        fits = q_a is None and core.shape == (a_shape[0], a_shape[0]) and core.device == device and core.dtype in FLOATING
        base_fits = base_fits and fits
    if q_a is None or q_b is None:
        return base_fits
    q_fit = q_a.shape == a_shape and q_b.shape == b_shape and q_a.device == device and q_b.device == device
    return base_fits and q_fit and q_a.dtype in FLOATING and q_b.dtype in FLOATING


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    core: Tensor | None,
) -> None:
    check_tensor("lora_linear", "x", x)
    given = {"weight": weight, "bias": bias, "a": a, "b": b, "q_a": q_a, "q_b": q_b, "core": core}
    for name, tensor in given.items():
        if tensor is not None or name in ("a", "b"):
            check_tensor_on("lora_linear", name, tensor, "x", x.device)
    if x.ndim == 0 or a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"lora_linear: need x (..., d_in), a (r, d_in), b (d_out, r); got {x.shape}, {a.shape}, {b.shape}")
    d_in, rank, d_out = x.shape[-1], a.shape[0], b.shape[0]
    if (q_a is None) != (q_b is None):
        raise ValueError(f"lora_linear: q_a and q_b come together, got only {'q_a' if q_b is None else 'q_b'}")
    if core is not None and q_a is not None:
        raise ValueError("lora_linear: a core and the bases q_a, q_b exclude each other; pass one of them")
    expected = {"a": (a, (rank, d_in)), "b": (b, (d_out, rank)), "weight": (weight, (d_out, d_in)), "bias": (bias, (d_out,))}
    expected |= {"q_a": (q_a, (rank, d_in)), "q_b": (q_b, (d_out, rank)), "core": (core, (rank, rank))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            hint = "; an adapted layer cannot be resized (do it before)" if name == "weight" else ""
            raise ValueError(f"lora_linear: {name} must be {shape} (x has d_in={d_in}, a has r={rank}), got {tuple(tensor.shape)}{hint}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not under_autocast(x.device.type):
            raise TypeError(f"lora_linear: {name} is {tensor.dtype}, x is {x.dtype}; cast one, or use torch.autocast")
    if weight is None and bias is not None:
        raise ValueError("lora_linear: a bias without a weight; add it to the base layer's output instead")


def _are_ordinary(scale: Any, dropout: Any, training: object, capture: object) -> bool:
    """The quick form of :func:`_check_options`; NaN and Inf differ from themselves."""
    if type(scale) is not float or scale - scale != 0.0 or type(dropout) not in (float, int) or not 0.0 <= dropout < 1.0:
        return False
    return (training is True or training is False) and (capture is None or callable(capture))


def _check_options(scale: Any, dropout: Any, training: Any, capture: Any) -> tuple[float, float]:
    """``scale`` and ``dropout`` as numbers."""
    scale, dropout = as_number("lora_linear", "scale", scale), as_number("lora_linear", "dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_linear: dropout must be in [0, 1), got {dropout}")
    as_flag("lora_linear", "training", training)
    if capture is not None and not callable(capture):
        raise TypeError(f"lora_linear: capture must be a function of x̃ and ∂L/∂y, or None, got {capture!r:.80}")
    return scale, dropout


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return run("lora_linear", x.device.type, x, *rest)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return run("lora_linear_backward", x.device.type, grad, x, *rest)


def _forward_fake(x: Tensor, weight: Any, bias: Any, a: Tensor, b: Tensor, q_a: Any, q_b: Any, scale: float, mask: Any, keep: float,
                  core: Tensor | None = None, seed: Any = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], b.shape[0]), (x if core is None else core).new_empty(x.shape[0], a.shape[0])


def _backward_fake(grad: Tensor, x: Tensor, weight: Any, a: Tensor, b: Tensor, q_a: Any, q_b: Any, hidden: Any, scale: float,
                   mask: Any, keep: float, needs: list[bool], core: Tensor | None = None, seed: Any = None) -> list[Tensor]:  # fmt: skip
    # x itself comes without columns where no gradient reads it.
    shapes = ((grad.shape[0], a.shape[1]), (b.shape[0], a.shape[1]), (b.shape[0],), a.shape, b.shape)
    grads = [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=False) if needed]
    return [*grads, core.new_empty(core.shape)] if core is not None and any(needs[5:]) else grads


def _save(ctx: Any, inputs: tuple[Any, ...], hidden: Tensor) -> None:
    """Keep alive until the backward pass what some requested gradient reads, and nothing else."""
    x, weight, _, a, b, q_a, q_b, scale, mask, keep, core, seed = inputs
    need_x, need_weight, need_bias, need_a, need_b, *_, need_core, _ = ctx.needs_input_grad[:12]
    ctx.save_for_backward(
        x if need_a or need_weight else None,
        weight if need_x else None,
        a,
        b,
        q_a,
        q_b,
        hidden if need_b or need_core else None,
        mask if need_x or need_a else None,
        core,
        seed if need_x or need_a else None,
    )
    ctx.needs = [need_x, need_weight, need_bias, need_a, need_b, need_core]
    ctx.scale, ctx.keep = scale, keep


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.capture = None
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx: Any, grad: Tensor, grad_hidden: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of all inputs, from what :func:`_save` kept and the one of y (tokens, d_out)."""
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing refuses a second look
    x, weight, a, b, q_a, q_b, hidden, mask, core, seed = saved
    needs = ctx.needs
    if ctx.capture is not None and needs[3]:
        kept = mask if seed is None else run("dropout_mask", x.device.type, seed, *x.shape, ctx.keep)
        ctx.capture(dropped(x, kept, ctx.keep).detach(), grad.detach())
    if x is None:
        x, known = grad.new_empty(grad.shape[0], 0), not (needs[0] and hidden is not None)
    else:
        x, known = flat(x), True
    backward: Callable[..., list[Tensor]]
    if not torch.is_grad_enabled() and is_plain_eager(grad, *saved):
        backward = _backward
    elif torch.is_grad_enabled() and known and is_eager():  # create_graph=True
        backward = implementations("lora_linear_backward")["reference"].function
        if hidden is not None and (needs[0] or needs[3]):  # what was kept is a constant
            mask, seed = (mask if seed is None else run("dropout_mask", x.device.type, seed, *x.shape, ctx.keep)), None
            into = (a if q_a is None else q_a).to(a.dtype if core is None else core.dtype)
            hidden = dropped(x, mask, ctx.keep).to(into.dtype) @ into.mT
    else:  # a node: traced, or to refuse a second derivative
        backward = torch.ops.lowrank_kernels.lora_linear_backward
    hidden = grad.new_empty(0) if hidden is None else hidden
    grads = backward(grad.contiguous(), x, weight, a, b, q_a, q_b, hidden, ctx.scale, mask, ctx.keep, needs, core, seed)
    found = iter(grads)
    of_x, of_weight, of_bias, of_a, of_b, of_core = [next(found) if needed else None for needed in needs]
    return of_x, of_weight, of_bias, of_a, of_b, None, None, None, None, None, of_core, None


class _LoraLinear(torch.autograd.Function):
    """The autograd of the operation without its dispatcher, for x of any number of dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *rest, capture = args
        y, hidden = run("lora_linear", x.device.type, flat(x), *rest)
        _save(ctx, (x, *rest), hidden)  # x as it was given: a view of it made here has no graph
        ctx.capture, ctx.leading = capture, x.shape[:-1]
        ctx.set_materialize_grads(False)
        return _shaped(y, ctx.leading)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 13
        of_x, *others = _gradients(ctx, flat(grad))
        return (None if of_x is None else of_x.reshape(*ctx.leading, of_x.shape[1]), *others, None)


_apply = applies(_LoraLinear)
define(
    "lora_linear",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor b, Tensor? q_a, Tensor? q_b, float scale, Tensor? mask, float keep, "
    "Tensor? core, Tensor? seed=None)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "lora_linear_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor a, Tensor b, Tensor? q_a, Tensor? q_b, Tensor hidden, float scale, "
    "Tensor? mask, float keep, bool[] needs, Tensor? core, Tensor? seed=None) -> Tensor[]",
    _backward,
    _backward_fake,
)
# Its result depends on what the forward pass kept as constants, so differentiating it would give wrong second derivatives.
no_backward(
    "lora_linear_backward",
    "second derivatives through a low-rank layer are for eager calls, without torch.compile and dispatch modes, and need the input, which "
    "is not kept where A is frozen and B or the core trains",
    "Let A train, or use torch.func.grad, which needs neither.",
)
torch.library.register_autograd(f"{NAMESPACE}::lora_linear", _autograd_backward, setup_context=_setup_context, lib=LIBRARY)
__all__ = ["lora_linear"]
